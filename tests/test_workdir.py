"""A work directory of a version whose section `sampling` was flat: it is sampled and continued as
that version did."""

import json
import zipfile

import numpy as np
import pytest
from golden_data import GOLDEN
from processes import checkpoints_of

from diffit_jax import workdir
from diffit_jax.experiment import build
from diffit_jax.runtime import backend, parallel
from diffit_jax.sections import lift_old_keys
from diffit_jax.verbs.sample import sample
from diffit_jax.verbs.train import train

FLAT = dict(
    num_steps=5,
    guidance="interval",
    guidance_scale=2.0,
    guidance_sigma_low=0.1,
    guidance_sigma_high=5.0,
    guide_channels=1,
    sampler="heun",
    churn_amount=1.0,
    churn_noise=1.003,
    pixel_rounding="adm",
    batch_size=-4,
)


@pytest.fixture
def flat_run(tmp_path):
    """Three updates of a small network, made and saved by that version."""
    with zipfile.ZipFile(GOLDEN / "flat_run.zip") as archive:
        archive.extractall(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["sampling"] == FLAT
    return tmp_path / "run"


def images_of(path):
    with np.load(path) as arrays:
        return arrays["arr_0"].astype(int)


def test_it_is_sampled_and_continued(flat_run, tmp_path):
    """Samples are those that the version itself drew, at its step and three updates later: equal to
    the rounding to 256 levels, where float32 may fall on the other side."""
    with np.load(GOLDEN / "flat_run_samples.npz") as golden:
        theirs = {step: golden[f"at_step_{step}"].astype(int) for step in (3, 6)}
    ours = images_of(sample(flat_run, seeds=range(4), output=tmp_path / "3.npz"))
    assert np.abs(ours - theirs[3]).max() <= 1 and (ours != theirs[3]).mean() < 0.01
    config = workdir.read_config(flat_run)
    config["training"]["total_steps"] = 6
    from ml_collections import ConfigDict

    train(ConfigDict(config), flat_run)
    assert checkpoints_of(flat_run) == [3, 6]
    ours = images_of(sample(flat_run, seeds=range(4), output=tmp_path / "6.npz"))
    assert np.abs(ours - theirs[6]).max() <= 1 and (ours != theirs[6]).mean() < 0.02
    assert (theirs[3] != theirs[6]).mean() > 0.2  # or nothing would have been shown


def test_old_keys_are_lifted():
    assert lift_old_keys(FLAT) == {
        "sampler": {"name": "heun", "num_steps": 5, "churn_amount": 1.0, "churn_noise": 1.003},
        "guidance": {
            "kind": "interval",
            "scale": 2.0,
            "sigma_low": 0.1,
            "sigma_high": 5.0,
            "channels": 1,
        },
        "pixel_rounding": "adm",
        "batch_per_device": 4,
    }
    # Defaults of that version; what had no effect is left out.
    assert lift_old_keys(dict(num_steps=9, guidance_scale=1.5, guidance_power=4.0, eta=0.5)) == {
        "sampler": {"name": "heun", "num_steps": 9},
        "guidance": {"kind": "constant", "scale": 1.5},
    }
    lifted = lift_old_keys(FLAT)
    assert lift_old_keys(lifted) == lifted


def test_lifted_keys_build(flat_run):
    sampling = build(workdir.read_config(flat_run)).sampling
    assert sampling.sampler.churn_noise == 1.003 and sampling.guidance.sigma_high == 5.0
    assert parallel.make_mesh().size * sampling.batch_per_device == 8
    assert backend.matmul_precision()
