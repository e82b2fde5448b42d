"""Evaluations of a run while it trains: the verb's figures, and nothing lost."""

import json
import shutil
import signal
import subprocess
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image
from support import warm
from support.configs import small_config, small_latent_config
from support.fid import save_tiny_vae
from support.processes import ROOT, at_question, environment, write_config
from support.trees import assert_equal_trees

from diffit_jax import models
from diffit_jax.data.sources import SyntheticSource
from diffit_jax.errors import UserError
from diffit_jax.evaluation.evaluate import evaluate
from diffit_jax.evaluation.evaluator import Comparison
from diffit_jax.evaluation.features import Extractor, Networks
from diffit_jax.evaluation.images import open_samples
from diffit_jax.evaluation.make_reference import make_reference
from diffit_jax.experiment.config import build
from diffit_jax.run.state import create_state, setup_experiment
from diffit_jax.runtime import distributed, interruption, parallel
from diffit_jax.sampling.decoder import Decoding
from diffit_jax.sampling.request import Run, SampleRequest, SamplingOptions
from diffit_jax.sampling.sampler import Sampler
from diffit_jax.training.held_out import SEED, HeldOutLoss, open_held_out
from diffit_jax.training.step import example_keys
from diffit_jax.training.train import train

METRICS = ("fid", "precision")
BATCH = 4


pytestmark = pytest.mark.usefixtures("one_extractor_each")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with an autoencoder and references of 16 and of 20 pixels."""
    folder = tmp_path_factory.mktemp("in_training")
    save_tiny_vae(folder / "vae")
    rng = np.random.default_rng(0)
    for side in (16, 20):
        images = rng.integers(0, 256, (12, side, side, 3)).astype(np.uint8)
        np.savez(folder / f"{side}.npz", arr_0=images)
        source = open_samples(folder / f"{side}.npz")
        where = folder / f"reference_{side}.npz"
        make_reference(
            source, output=where, networks=Networks("random"), kept=6, batch_per_device=BATCH
        )
    return folder


def watched(place, **settings):
    """A small latent run with an average of another length, evaluated at steps 4 and 6."""
    config = small_latent_config(training__grid_steps=6)
    config.ema.power_lengths, config.ema.snapshot_steps = (0.1,), 2
    of = dict(
        steps=4,
        reference=str(place / "reference_16.npz"),
        inception="random",
        vae=str(place / "vae"),
        count=12,
        metrics=METRICS,
        batch_per_device=BATCH,
    )
    config.evaluation = ConfigDict(of | settings)
    return config


@pytest.fixture(scope="module")
def whole(place, tmp_path_factory):
    """(workdir, state) of a run that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("watched")
    return workdir, train(watched(place), workdir=workdir)


def found(workdir, step):
    return json.loads((workdir / "evaluations" / f"{step:08d}.json").read_text())


@pytest.mark.parametrize(
    ("kind", "asked"), [("ema", {}), ("raw", {"raw": True}), ("ema_0.1", {"ema_length": 0.1})]
)
def test_the_figures_are_those_of_the_verb(place, whole, tmp_path, kind, asked):
    """Bit for bit, with all that they depend on: samples, network, reference. An average of a
    length that the run keeps is one of its snapshots."""
    scores = evaluate(
        Run(whole[0], **asked),
        comparison=Comparison(
            place / "reference_16.npz", "random", METRICS, batch_per_device=BATCH
        ),
        options=SamplingOptions(decoding=Decoding(place / "vae")),
        count=12,
        output=tmp_path / "m.json",
    )
    assert found(whole[0], 6)["weights"][kind] == scores
    assert len({each["metrics"]["fid"] for each in found(whole[0], 6)["weights"].values()}) == 3


def test_what_a_run_leaves(whole):
    """Two evaluations, none half done; decoded images in the grid; figures and images for
    TensorBoard."""
    names = sorted(path.name for path in (whole[0] / "evaluations").iterdir())
    assert names == ["00000004.json", "00000006.json"]
    assert found(whole[0], 4)["weights"]["ema"]["count"] == 12
    with Image.open(whole[0] / "grids" / "00000006.png") as grid:
        # Four images of 16 pixels, enlarged, a column for each class and its number above.
        assert grid.size == (4 * 33 - 1, 16 + 32)
        assert grid.mode == "RGB"
    (events,) = (whole[0] / "events").iterdir()
    content = events.read_bytes()
    for tag in (b"fid/ema", b"fid/raw", b"precision/ema_0.1", b"samples/ema", b"beside_share"):
        assert tag in content, tag


def test_a_run_preempted_in_an_evaluation_goes_on_there(place, whole, tmp_path, monkeypatch):
    """Once at the step before it, once behind its first batch."""
    calls, call = [], Extractor.__call__

    def counted(self, images):
        calls.append(len(images))
        return call(self, images)

    monkeypatch.setattr(Extractor, "__call__", counted)
    with monkeypatch.context() as interrupted:
        interrupted.setattr(distributed.PreemptionNotice, "reached", at_question(4))
        with pytest.raises(interruption.Preempted, match="checkpoint 4 of 6 steps is saved"):
            train(watched(place), workdir=tmp_path / "run")
    assert not calls  # it is done when the run goes on
    with monkeypatch.context() as interrupted:
        interrupted.setattr(distributed.PreemptionNotice, "reached", at_question(1))
        message = "checkpoint 4 is saved in .*, and 8 of 12 images are measured and kept"
        with pytest.raises(interruption.Preempted, match=message):
            train(watched(place), workdir=tmp_path / "run")
    state = train(watched(place), workdir=tmp_path / "run")
    assert sum(calls) == 2 * 3 * 12 + 6  # of two evaluations, none twice; and the reference
    assert_equal_trees(state, whole[1])
    for step in (4, 6):
        assert found(tmp_path / "run", step)["weights"] == comparable(whole[0], step, tmp_path)


def comparable(workdir, step, elsewhere):
    """The figures of a run as another one of another folder has them."""
    text = json.dumps(found(workdir, step)["weights"])
    return json.loads(text.replace(str(workdir), str(elsewhere / "run")))


def test_a_run_killed_in_an_evaluation_ends_as_if_it_had_not_been(place, whole, tmp_path):
    """SIGKILL when the first of the kinds of weights is measured at the last step."""
    config = write_config(tmp_path / "config.py", watched(place))
    command = [warm.python(), str(ROOT / "launch/train.py"), "--config", str(config)]
    command += ["--workdir", str(tmp_path / "run")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, env=environment(), cwd=tmp_path)
    deadline = time.monotonic() + 120
    last = tmp_path / "run" / "evaluations"
    while not list(last.glob("00000006.*.begun.npz")) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (last / "00000006.json").exists()
    done = (last / "00000004.json").stat().st_mtime_ns
    state = train(watched(place), workdir=tmp_path / "run")
    assert_equal_trees(state, whole[1])
    assert found(tmp_path / "run", 6)["weights"] == comparable(whole[0], 6, tmp_path)
    assert (last / "00000004.json").stat().st_mtime_ns == done
    train(watched(place), workdir=tmp_path / "run")  # finished: left alone
    assert len(list(last.iterdir())) == 2


def test_minutes_bound_an_evaluation(place, whole, tmp_path, caplog):
    """It says how many samples it made, scores these, and training goes on."""
    shutil.copytree(whole[0], tmp_path / "run")
    config = watched(place, max_minutes=1e-5, count=40, raw=False)
    config.training.total_steps = 8
    train(config, workdir=tmp_path / "run")
    weights = found(tmp_path / "run", 8)["weights"]
    assert {name: each["count"] for name, each in weights.items()} == {"ema": 8, "ema_0.1": 8}
    assert "evaluate ema: 8 of 40 images were measured in the " in caplog.text


def test_weights_that_cannot_be_evaluated_do_not_end_a_run(place, tmp_path, monkeypatch, caplog):
    """Samples of the raw weights are not finite, and then there is no memory for any."""
    draw = SampleRequest.draw

    def poisoned(self, networks, batch):
        samples, finite = draw(self, networks, batch)
        return samples, finite & ("raw" not in networks.origin)

    monkeypatch.setattr(SampleRequest, "draw", poisoned)
    config = watched(place, steps=6)
    state = train(config, workdir=tmp_path / "run")
    assert list(found(tmp_path / "run", 6)["weights"]) == ["ema", "ema_0.1"]
    assert "step 6: raw weights are not evaluated: 4 of the first 4 samples are not" in caplog.text

    def full(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to")

    monkeypatch.setattr(SampleRequest, "draw", full)
    config.training.total_steps = 7
    assert int(state.step) == 6 and int(train(config, workdir=tmp_path / "run").step) == 7
    assert found(tmp_path / "run", 7)["weights"] == {}
    assert "ema weights are not evaluated: memory ran out" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inception": ""}, "config key evaluation.inception is missing: name the FID"),
        ({"vae": ""}, "config key evaluation.vae is missing: samples are latents of sd-vae-ft-ema"),
        ({"reference": "nowhere.npz"}, "config section evaluation: .*nowhere.npz cannot be read"),
        ({"reference": "20"}, "is of 20 × 20 pixels, the samples have 16 × 16: name a reference"),
        ({"metrics": ("fud",)}, "config section evaluation: --metrics has 'fud': use fid"),
        ({"vae": "nowhere"}, "config section evaluation: autoencoder .*nowhere"),
        ({"count": 1}, "config key evaluation.count is 1: it must be at least 2"),
    ],
)
def test_what_cannot_be_writes_nothing(place, tmp_path, change, message):
    if change.get("reference") == "20":
        change = {"reference": str(place / "reference_20.npz")}
    with pytest.raises(UserError, match=message):
        train(watched(place, **change), workdir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_images_need_no_autoencoder(place, tmp_path):
    config = small_config()
    config.evaluation = ConfigDict(dict(vae=str(place / "vae")))
    with pytest.raises(UserError, match=r"evaluation\.vae is given, but samples are images"):
        train(config, workdir=tmp_path / "run")


def held_out(config, source, devices=None):
    setup = setup_experiment(config, devices)
    state = create_state(setup.experiment, setup.mesh)
    networks = {"raw": {"params": state.params, "constants": state.constants}}
    return setup.experiment, networks["raw"], HeldOutLoss(setup, source)(networks)["raw"]


@pytest.mark.parametrize("devices", [1, 2])
def test_the_held_out_loss_is_that_of_each_example_alone(devices):
    """19 examples in batches of eight, augmentation and dropout configured: each one's loss by
    itself with its own key, undisturbed, for any number of devices."""
    config = small_config(model__augment_labels=9, model__dropout=0.3)
    config.augmentation = ConfigDict(dict(probability=0.5))
    config.evaluation = ConfigDict(dict(loss_steps=1, loss_examples=19))
    source = SyntheticSource((8, 8, 1), 10)
    experiment, variables, loss = held_out(config, source, jax.devices()[:devices])
    network = models.as_network(experiment.model, variables)

    @jax.jit
    def alone(image, label, place):
        key = jax.random.split(example_keys(SEED, place, 1)[0])[1]
        x = image[None].astype(jnp.float32) / 127.5 - 1
        return experiment.process.loss(network, x, {"label": label[None]}, key[None])[0][0]

    examples = source.read(np.arange(19))
    losses = [
        alone(image, label, place)
        for place, (image, label) in enumerate(
            zip(examples["image"], examples["label"], strict=True)
        )
    ]
    assert loss == pytest.approx(np.mean(losses), rel=2e-6)  # float32 sums in another order


def test_the_held_out_loss_is_the_same_whatever_the_seed_of_the_run():
    """Of the same parameters: levels and noise are those of the examples' places."""
    first, second = (small_config(seed=seed) for seed in (0, 1))
    for config in (first, second):
        config.evaluation = ConfigDict(dict(loss_steps=1, loss_examples=8))
    source = SyntheticSource((8, 8, 1), 10)
    _, variables, loss = held_out(first, source)
    setup = setup_experiment(second)
    variables = jax.device_put(variables, parallel.replicated(setup.mesh))
    assert HeldOutLoss(setup, source)({"raw": variables})["raw"] == pytest.approx(loss, rel=1e-6)


def test_a_data_set_without_a_test_split_has_no_held_out_loss():
    config = small_config(data__name="nowhere")
    config.evaluation = ConfigDict(dict(loss_steps=2))
    with pytest.raises(UserError, match=r"evaluation\.loss_steps needs a test split: data set"):
        open_held_out(build(config))


def test_a_signal_in_a_grid_leaves_the_grid_out(tmp_path, monkeypatch):
    """It is heard after the first of two batches; the loop saves one step later, and ends."""
    config = small_config()
    config.training.update(grid_images=9, grid_steps=2, checkpoint_steps=100, total_steps=6)
    batches, draw = [], Sampler.draw_batch

    def signalled(self, *arguments):
        batches.append(self.batch_size)
        interruption._noticed.set()
        return draw(self, *arguments)

    monkeypatch.setattr(Sampler, "draw_batch", signalled)
    with pytest.raises(interruption.Preempted, match="checkpoint 3 of 6 steps is saved"):
        train(config, workdir=tmp_path / "run")
    assert len(batches) == 1 and batches[0] < 9 and not list((tmp_path / "run/grids").glob("*.png"))
