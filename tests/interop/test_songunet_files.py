"""EDM's weights of DDPM++ and NCSN++: safetensors of any width, and its pickles, never run."""

import pickle

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file
from support.golden import GOLDEN, golden_tensors

from diffit_jax import models
from diffit_jax.errors import UserError
from diffit_jax.experiment.config import build
from diffit_jax.interop import songunet
from diffit_jax.models import SongUNet
from diffit_jax.sampling import convert
from diffit_jax.sampling.request import config_for_weights
from diffit_jax.sampling.sample import sample

SNAPSHOT = GOLDEN / "edm_snapshot.pkl"


def test_a_snapshot_is_read_without_running_what_it_names():
    """Its source, were it run, would end the program."""
    model, variables = songunet.load(SNAPSHOT)
    sizes = dict(channels=8, channel_mults=(1, 2), embedding_mult=2, num_blocks=1)
    labels = dict(attention_sizes=(4,), num_classes=2, augment_labels=9, family="ncsnpp")
    assert model == SongUNet(8, 1, **sizes, **labels)
    assert songunet.process_of(SNAPSHOT) == "edm"
    names = {name for leaf in songunet.leaves_of(model) for name in leaf.names}
    resamples = ("dec.8x8_up.conv0", "dec.8x8_up.skip", "enc.4x4_aux_residual")
    resamples += ("enc.4x4_down.conv0", "enc.4x4_down.skip")
    everything = sorted(names | {f"{name}.resample_filter" for name in resamples})
    assert len(everything) == 153
    for leaf in songunet.leaves_of(model):
        node = variables
        for key in leaf.path.split("/"):
            node = node[key]
        draws = np.random.default_rng(everything.index(leaf.names[0]))
        theirs = draws.normal(size=leaf.theirs).astype(np.float32)
        np.testing.assert_array_equal(node, leaf.to_ours(theirs), err_msg=leaf.path)
        np.testing.assert_array_equal(leaf.to_theirs(np.asarray(node)), theirs)


def test_any_sizes_are_inferred(tmp_path):
    for number, model in enumerate(
        (
            SongUNet(8, 2, channels=16, channel_mults=(2, 1, 1), num_blocks=2, attention_sizes=()),
            SongUNet(16, channels=8, family="ncsnpp", attention_sizes=(16, 4), embedding_mult=3),
        )
    ):
        shapes = jax.eval_shape(lambda model=model: models.init_variables(model, jax.random.key(0)))
        draws = np.random.default_rng(number)
        variables = jax.tree.map(lambda leaf: draws.normal(size=leaf.shape), shapes)  # noqa: B023
        tensors = {}
        for leaf in songunet.leaves_of(model):
            node = variables
            for key in leaf.path.split("/"):
                node = node[key]
            tensors[f"model.{leaf.names[0]}"] = leaf.to_theirs(node.astype(np.float32))
        save_file(tensors, tmp_path / "w.safetensors")
        found, read = songunet.load(tmp_path / "w.safetensors")
        assert found == model
        # Without augmentation labels the usual config's augmentation would be refused.
        config = config_for_weights(None, str(tmp_path / "w.safetensors"))
        fitted = build(songunet.fit_config(config, tmp_path / "w.safetensors"))
        assert fitted.model == model.clone(dropout=0.13, attention="auto", dtype="bfloat16")
        assert not fitted.augmentation.num_labels
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype("f4")), read, variables)


class _Planted:
    def __reduce__(self):
        return print, ("run",)


def test_files_that_are_refused(tmp_path, capsys):
    path = tmp_path / "w.pkl"

    def refused(content, message):
        path.write_bytes(content)
        with pytest.raises(UserError, match=message) as caught:
            songunet.load(path)
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)

    whole = SNAPSHOT.read_bytes()
    refused(pickle.dumps({"ema": _Planted()}), r"builtins\.print, which is never run")
    refused(pickle.dumps({"ema": 3}), "no network by the name ema")
    refused(pickle.dumps([1]), "no network by the name ema")
    refused(b"", "no snapshot of EDM")
    for share in (0.1, 0.5, 0.99):
        refused(whole[: int(len(whole) * share)], "no snapshot of EDM")
    refused(whole.replace(b"torch._utils", b"nobody_utils", 1), "nobody_utils")
    assert "run" not in capsys.readouterr().out
    with pytest.raises(UserError, match="cannot be read"):
        songunet.load(tmp_path / "none.pkl")
    with pytest.raises(UserError, match="no section model"):
        songunet.fit_config({}, SNAPSHOT)

    tensors = golden_tensors("edm_ddpmpp.safetensors")
    for change, message in (
        ({"dec.8x8_in0.qkv.weight": None}, "missing dec.8x8_in0.qkv.weight"),
        ({"map_extra.weight": np.zeros(3, "f4")}, "extra map_extra.weight"),
        ({"enc.8x8_block0.conv1.weight": np.zeros((2, 2, 3, 3), "f4")}, "misshapen enc.8x8_block0"),
        ({"enc.8x8_block0.conv0.weight": np.zeros((33, 32, 3, 3), "f4")}, "33 channels where"),
        ({"map_layer0.weight": np.full((128, 32), np.nan, "f4")}, "not finite"),
    ):
        changed = {name: one for name, one in (tensors | change).items() if one is not None}
        save_file(changed, tmp_path / "w.safetensors")
        with pytest.raises(UserError, match=message):
            songunet.load(tmp_path / "w.safetensors")


def test_samples_and_a_run_of_a_snapshot(tmp_path):
    """`--weights` and `convert` take one as they take the released files."""
    config = config_for_weights(None, str(SNAPSHOT))
    assert config["process"]["name"] == "edm" and config["data"]["name"] == "cifar10"
    run = tmp_path / "run"
    convert.weights_to_workdir(SNAPSHOT, workdir=run, config=config)
    path = sample(run, seeds=range(2), overrides={"sampler.num_steps": 2})
    with np.load(path) as made:
        assert made["arr_0"].shape == (2, 8, 8, 1)
    with pytest.raises(UserError, match="not of a latent DiffiT"):
        convert.weights_to_workdir(SNAPSHOT, workdir=tmp_path / "b", config=config, slim=True)
    assert not (tmp_path / "b").exists()
