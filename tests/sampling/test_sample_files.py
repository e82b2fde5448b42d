"""Requests for samples: nothing of another one is replaced, the same one goes on wherever it was,
and what is not finite is said."""

import json
import os
import shutil

import jax
import numpy as np
import pytest
from PIL import Image
from support.configs import small_config, small_latent_config
from support.processes import checkpoints_of

from diffit_jax import models
from diffit_jax.errors import UserError
from diffit_jax.interop import official
from diffit_jax.models.diffit.latent import LatentDiffiT
from diffit_jax.runtime.console import in_short, parse_numbers
from diffit_jax.sampling import sample as sample_files
from diffit_jax.sampling.request import Run, SampleRequest, SamplingOptions, Weights, default_name
from diffit_jax.sampling.sample import sample, segments
from diffit_jax.sampling.sampler import Sampler
from diffit_jax.training.train import train


@pytest.fixture
def mine(latent_run, tmp_path):
    """A copy of the run, for samples of one test."""
    shutil.copytree(latent_run[0], tmp_path / "run")
    return tmp_path / "run"


def arrays_of(path):
    with np.load(path) as arrays:
        return arrays["arr_0"], arrays["arr_1"]


def record_of(path):
    return json.loads(path.with_suffix(".json").read_text())


# --- Names


def test_requests_have_names_of_their_own(mine):
    """As many files as requests; ADM's name is the beginning of all of them, and the whole of the
    default one's."""
    requests = [
        dict(seeds=range(2)),
        dict(seeds=[2, 3]),
        dict(seeds=range(2), labels="3"),
        dict(seeds=range(2), labels=[4]),
        dict(seeds=range(2), labels="random"),
        dict(seeds=range(2), overrides={"sampler.num_steps": 2}),
        dict(seeds=range(2), overrides={"sampler": "ddim", "sampler.eta": 0.5}),
        dict(seeds=range(2), overrides={"guidance": "none"}),
    ]
    paths = [sample(mine, **request_key) for request_key in requests] + [
        sample(Run(mine, checkpoint=4), seeds=range(2))
    ]
    names = [path.name for path in paths]
    assert names[0] == "latents_2x8x8x4.npz" and len(set(names)) == len(names), names
    assert all(name.startswith("latents_2x8x8x4") for name in names)
    assert {"latents_2x8x8x4-seeds=2-3.npz", "latents_2x8x8x4-checkpoint=4.npz"} < set(names)
    assert "latents_2x8x8x4-sampler=ddim,sampler.eta=0.5.npz" in names


def test_names_stay_short_and_typable():
    name = default_name("samples", (4, 8, 8, 3), {"labels": "golden retriever, 88/ü"})
    assert name == "samples_4x8x8x3-labels=golden_retriever_88_.npz"
    long = default_name("samples", (4, 8, 8, 3), {f"key{index}": index for index in range(40)})
    assert len(long) < 50 and long != default_name(
        "samples", (4, 8, 8, 3), {f"key{index}": index + 1 for index in range(40)}
    )


@pytest.mark.parametrize("numbers", [[0], [0, 1, 2, 3, 7], [5, 4, 3], list(range(1000)), [1, 1]])
def test_numbers_in_short_are_the_same_numbers(numbers):
    assert parse_numbers("--seeds", in_short(numbers)) == numbers


# --- Overwriting


def test_files_of_another_request_stay(mine, tmp_path):
    output = tmp_path / "s.npz"
    sample(mine, seeds=range(2), output=output)
    before = {path: path.read_bytes() for path in tmp_path.glob("s.*")}
    for change, message in (
        (dict(seeds=[1, 2]), r"s\.npz is there already and holds samples of another seeds \("),
        (
            dict(seeds=range(2), overrides={"sampler.num_steps": 2}),
            r"another sampling\.sampler\.num_steps \(4, now 2\): name another --output, or say "
            "--overwrite",
        ),
        (dict(seeds=range(2), labels="5"), "another labels"),
    ):
        with pytest.raises(UserError, match=message):
            sample(mine, output=output, **change)
    assert before == {path: path.read_bytes() for path in tmp_path.glob("s.*")}
    sample(mine, seeds=[1, 2], output=output, overwrite=True)
    assert before[output] != output.read_bytes()
    np.testing.assert_array_equal(arrays_of(output)[1], [1, 2])


@pytest.mark.parametrize("name", ["s.npz", "s.png", "s.json"])
def test_files_of_unknown_origin_stay(mine, tmp_path, name):
    (tmp_path / name).write_bytes(b"a holiday")
    with pytest.raises(UserError, match=rf"{name} is there already and is of unknown origin"):
        sample(mine, seeds=[0], output=tmp_path / "s.npz")
    assert (tmp_path / name).read_bytes() == b"a holiday" and not (
        tmp_path / "s.npz.parts"
    ).exists()
    sample(mine, seeds=[0], output=tmp_path / "s.npz", overwrite=True)
    with Image.open(tmp_path / "s.png") as image:
        assert image.mode == "RGB"


def test_the_same_request_again_draws_nothing(mine, tmp_path, monkeypatch, caplog):
    first = sample(mine, seeds=range(4))
    before = os.stat(first).st_mtime_ns
    monkeypatch.setattr(Sampler, "draw_batch", lambda *_: pytest.fail("it draws"))
    with caplog.at_level("INFO", logger="diffit_jax"):
        assert (
            sample(mine, seeds=range(4))
            == first
            == sample(mine, seeds=range(4), overwrite=True, overrides={"batch_per_device": 1})
        )
    assert "holds these samples already" in caplog.text and os.stat(first).st_mtime_ns == before


# --- What a request is known by


def interrupted(monkeypatch, after, *arguments, **request_key):
    """Draws so many batches of a request."""
    draw_batch, count = Sampler.draw_batch, []

    def counting(self, *given):
        if len(count) == after:
            raise KeyboardInterrupt
        count.append(1)
        return draw_batch(self, *given)

    monkeypatch.setattr(Sampler, "draw_batch", counting)
    with pytest.raises(KeyboardInterrupt):
        sample(*arguments, **request_key)
    monkeypatch.setattr(Sampler, "draw_batch", draw_batch)


def drawn_by(monkeypatch):
    draw_batch, seen = Sampler.draw_batch, []

    def listening(self, variables, seeds, labels, *more):
        seen.append(np.asarray(seeds).tolist())
        return draw_batch(self, variables, seeds, labels, *more)

    monkeypatch.setattr(Sampler, "draw_batch", listening)
    return seen


def test_a_run_that_was_moved_goes_on(mine, tmp_path, monkeypatch):
    """The directory, its parts in it, has another name; files have another date."""
    reference = arrays_of(sample(mine, seeds=range(8), output=tmp_path / "whole.npz"))[0]
    interrupted(monkeypatch, 2, mine, seeds=range(8), overrides={"batch_per_device": 1})
    shutil.copytree(mine, tmp_path / "moved")
    seen = drawn_by(monkeypatch)
    path = sample(tmp_path / "moved", seeds=range(8), overrides={"batch_per_device": 1})
    assert seen == [[4, 5], [6, 7]]
    # Rounding of another batch.
    np.testing.assert_allclose(
        arrays_of(path)[0], reference, rtol=0, atol=1e-5 * np.abs(reference).max()
    )


def test_another_batch_size_goes_on(mine, tmp_path, monkeypatch):
    """Another machine with more devices, say: what is there stays, the rest is drawn in larger
    batches."""
    reference = arrays_of(sample(mine, seeds=range(9), output=tmp_path / "whole.npz"))[0]
    interrupted(monkeypatch, 2, mine, seeds=range(9), overrides={"batch_per_device": 1})
    seen = drawn_by(monkeypatch)
    path = sample(mine, seeds=range(9), overrides={"batch_per_device": 2})
    assert seen == [[4, 5, 6, 7], [8]]
    np.testing.assert_allclose(
        arrays_of(path)[0], reference, rtol=0, atol=1e-5 * np.abs(reference).max()
    )


def test_training_that_went_on_is_said_and_an_older_checkpoint_can_be_named(mine, monkeypatch):
    interrupted(monkeypatch, 1, mine, seeds=range(8), overrides={"batch_per_device": 1})
    train(small_latent_config(training__total_steps=8), workdir=mine)
    with pytest.raises(
        UserError,
        match=r"another network \(workdir .*checkpoint 6, now .*checkpoint 8\): repeat that "
        r"request \(--checkpoint 6\)",
    ):
        sample(mine, seeds=range(8), overrides={"batch_per_device": 1})
    seen = drawn_by(monkeypatch)
    sample(
        Run(mine, checkpoint=6),
        seeds=range(8),
        overrides={"batch_per_device": 1},
        output=mine / "latents_8x8x8x4.npz",
    )
    assert seen == [[2, 3], [4, 5], [6, 7]]
    with pytest.raises(UserError, match=r"there is no checkpoint 5 in .*: use 4, 6, 8"):
        sample(Run(mine, checkpoint=5), seeds=[0])


def test_settings_of_training_do_not_matter_to_a_request(mine):
    """Intervals, kernels and places change no sample, and so no request."""
    path = sample(mine, seeds=range(2))
    config = json.loads((mine / "config.json").read_text())
    config["training"] |= {"log_steps": 77, "total_steps": 1000}
    config["model"] |= {"remat": "full", "scan_unroll": 2}
    (mine / "config.json").write_text(json.dumps(config))
    before = os.stat(path).st_mtime_ns
    assert sample(mine, seeds=range(2)) == path and os.stat(path).st_mtime_ns == before


def test_settings_that_came_later_are_left_out_where_they_change_nothing(mine):
    """Samples of an earlier version, whose records lack them, stay the same request."""

    def settings(**given):
        options = SamplingOptions(overrides={"sampler": "general", **given})
        return SampleRequest.make(Run(mine), seeds=[0], options=options).settings()

    assert "sampling.sampler.correct_last" not in settings()
    assert settings()["sampling.sampler.alpha"] == 1.0
    changed = settings(**{"sampler.correct_last": True, "sampler.alpha": 0.5})
    assert changed["sampling.sampler.correct_last"] is True


def test_weights_are_known_by_what_they_hold(tmp_path):
    """A file that was copied or touched is the same; one with another number in it is not."""
    model = LatentDiffiT(input_size=8, hidden_size=16, depth=1, num_heads=2, num_classes=10)
    config = small_latent_config().to_dict()
    variables = models.init_variables(model, jax.random.key(0))
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        official.save(tmp_path / name / "w.safetensors", model, variables)
    path = sample(
        Weights(tmp_path / "one" / "w.safetensors", config),
        seeds=range(2),
        output=tmp_path / "s.npz",
    )
    before = os.stat(path).st_mtime_ns
    sample(Weights(tmp_path / "two" / "w.safetensors", config), seeds=range(2), output=path)
    assert os.stat(path).st_mtime_ns == before
    variables["params"]["final"]["bias"] = variables["params"]["final"]["bias"] + 1e-3
    official.save(tmp_path / "two" / "w.safetensors", model, variables)
    with pytest.raises(
        UserError,
        match=r"another network \(weights .*one/w.safetensors, now weights .*two/w.safetensors\)",
    ):
        sample(Weights(tmp_path / "two" / "w.safetensors", config), seeds=range(2), output=path)


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", "half"], ids=["empty", "header", "half"])
def test_a_damaged_part_is_drawn_anew(mine, monkeypatch, caplog, content):
    reference = arrays_of(
        sample(mine, seeds=range(6), overrides={"batch_per_device": 1}, output=mine / "whole.npz")
    )[0]
    interrupted(monkeypatch, 2, mine, seeds=range(6), overrides={"batch_per_device": 1})
    part = mine / "latents_6x8x8x4.npz.parts" / "00000002-00000004.npy"
    part.write_bytes(part.read_bytes()[:-100] if content == "half" else content)
    seen = drawn_by(monkeypatch)
    path = sample(mine, seeds=range(6), overrides={"batch_per_device": 1})
    assert seen == [[2, 3], [4, 5]] and "00000002-00000004.npy is damaged" in caplog.text
    np.testing.assert_array_equal(arrays_of(path)[0], reference)


def test_killed_while_the_files_are_put_together(mine, monkeypatch):
    """After the npz and before its record, then before the image: the same request makes them
    whole."""
    for name in ("write_bytes", "remove_parts"):
        owner = sample_files.files if name == "write_bytes" else sample_files.SampleFiles
        original = getattr(owner, name)

        def dying(first, *rest, original=original, name=name):
            if name == "remove_parts" or str(first).endswith("4x8x8x4.json"):
                raise KeyboardInterrupt
            return original(first, *rest)

        monkeypatch.setattr(owner, name, dying)
        with pytest.raises(KeyboardInterrupt):
            sample(mine, seeds=range(4))
        monkeypatch.setattr(owner, name, original)
    path = sample(mine, seeds=range(4))
    assert path.with_suffix(".png").exists() and record_of(path)["not_finite"] == {
        "count": 0,
        "seeds": [],
    }
    assert not (mine / "latents_4x8x8x4.npz.parts").exists()


def test_missing_rows_are_drawn_in_batches_of_neighbours():
    assert [batch.tolist() for batch in segments(np.array([0, 1, 2, 5, 6, 9]), 2)] == [
        [0, 1],
        [2],
        [5, 6],
        [9],
    ]
    assert list(segments(np.array([], int), 4)) == [] or all(
        len(batch) == 0 for batch in segments(np.array([], int), 4)
    )


# --- What is not finite


def poisoned(tmp_path, value=np.nan):
    model = LatentDiffiT(input_size=8, hidden_size=16, depth=2, num_heads=2, num_classes=10)
    variables = models.init_variables(model, jax.random.key(0))
    kernel = variables["params"]["blocks"]["mlp_in"]["kernel"]
    variables["params"]["blocks"]["mlp_in"]["kernel"] = kernel.at[1, 0, 0].set(value)
    official.save(tmp_path / "w.safetensors", model, variables)
    return tmp_path / "w.safetensors"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, value):
    from diffit_jax.sampling import convert

    path, config = poisoned(tmp_path, value), small_latent_config().to_dict()
    message = (
        r"w\.safetensors are not finite: .* in blocks\.1\.mlp\.fc1\.weight; use other "
        r"weights, or say --allow_nonfinite"
    )
    with pytest.raises(UserError, match=message):
        sample(Weights(path, config), seeds=range(2))
    with pytest.raises(UserError, match=message):
        convert.weights_to_workdir(path, workdir=tmp_path / "run", config=config)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["w.safetensors"]


def test_samples_that_are_not_finite_are_counted_and_named(tmp_path, caplog):
    """In the log, in the record, and by an error at the end; the files are written all the same,
    and the same request says it again."""
    path, config = poisoned(tmp_path), small_latent_config().to_dict()
    for _ in range(2):
        with pytest.raises(
            UserError,
            match=r"s\.npz is written, but some of its samples are not finite \(4, of seeds 3-6\)",
        ):
            sample(
                Weights(path, config, allow_nonfinite=True),
                seeds=range(3, 7),
                output=tmp_path / "s.npz",
            )
    assert (
        np.isnan(arrays_of(tmp_path / "s.npz")[0]).any()
        and "samples of seeds 3-6 are not finite" in caplog.text
    )
    assert record_of(tmp_path / "s.npz")["not_finite"] == {"count": 4, "seeds": [3, 4, 5, 6]}


def test_one_bad_sample_of_images_is_found(run, tmp_path, monkeypatch):
    """As uint8 it would be black: it is looked at before. And it is not forgotten if the request is
    interrupted after it."""
    draw_batch = Sampler.draw_batch

    def spoiling(self, variables, seeds, labels, *more):
        drawn = draw_batch(self, variables, seeds, labels, *more).copy()
        drawn[np.asarray(seeds) == 1, 0, 0, 0] = np.inf
        return drawn

    monkeypatch.setattr(Sampler, "draw_batch", spoiling)
    request_key = dict(seeds=range(6), overrides={"batch_per_device": 1}, output=tmp_path / "s.npz")
    interrupted(monkeypatch, 1, run[0], **request_key)
    with pytest.raises(UserError, match=r"not finite \(1, of seeds 1\)"):
        sample(run[0], **request_key)
    assert arrays_of(tmp_path / "s.npz")[0].shape == (6, 8, 8, 1)


def test_a_run_whose_averages_are_not_finite(tmp_path, monkeypatch):
    """It is refused, with the tensor's name, unless it is asked for."""
    from diffit_jax.run import state as train_state
    from diffit_jax.training import train as train_verb

    config = small_config(training__total_steps=4, training__grid_steps=4)
    # A checkpoint of a version that did not look.
    monkeypatch.setattr(train_state, "all_finite", lambda _: True)

    def poison(state):
        leaves, tree = jax.tree.flatten(state.ema)
        leaves[0] = leaves[0].at[(0,) * leaves[0].ndim].set(np.nan)
        return state.replace(ema=tree.unflatten(leaves))

    save = train_verb.save_state
    monkeypatch.setattr(
        train_verb,
        "save_state",
        lambda checkpoints, state, size: save(checkpoints, poison(state), size),
    )
    train(config, workdir=tmp_path)
    monkeypatch.undo()
    assert checkpoints_of(tmp_path) == [2, 4]
    with pytest.raises(
        UserError,
        match=r"not finite \(params/.*: sample an older one by --checkpoint, or say "
        r"--allow_nonfinite",
    ):
        sample(tmp_path, seeds=[0])
    with pytest.raises(UserError, match=r"is written, but some of its samples are not finite"):
        sample(Run(tmp_path, allow_nonfinite=True), seeds=[0])
