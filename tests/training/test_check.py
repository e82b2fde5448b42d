"""A run beside a reference curve: a sound installation is inside its band, another one is not."""

import dataclasses
import json
import time

import numpy as np
import pytest
from ml_collections import ConfigDict
from support.commands import assert_one_line_error, launch
from support.configs import small_latent_config
from support.processes import ROOT

from diffit_jax.errors import UserError
from diffit_jax.experiment.config import build
from diffit_jax.training.check import check, table
from diffit_jax.training.loggers import Curve, read_figures
from diffit_jax.training.train import train

CURVES = sorted((ROOT / "configs" / "curves").glob("*.json"))


@pytest.fixture(scope="module")
def curve(tmp_path_factory):
    """Of a small run, of three seeds."""
    config = small_latent_config(training__log_steps=2)
    losses = {}
    for seed in (0, 1, 2):
        workdir = tmp_path_factory.mktemp("run")
        given = ConfigDict(config.to_dict() | {"seed": seed})
        train(given, workdir=workdir)
        losses[str(seed)] = list(read_figures(workdir)["loss"].values())
    return Curve(config.to_dict(), "here", [2, 4, 6], losses)


def test_the_same_seed_here_is_on_its_curve(curve):
    checked = check(curve, steps=5)
    assert checked.updates == [2, 4] and not checked.outside
    assert checked.from_same_seed == 0  # the same machine, devices and programs
    assert "outside" not in table(checked)


def test_the_first_updates_of_digits_are_those_of_the_file():
    """What a user's `diffit check` compares with is of this code: rounding apart (a curve of other
    initial parameters was 2e-4 off after 20 updates, and 4e-3 after 40)."""
    curve = Curve.read(ROOT / "configs" / "curves" / "digits.json")
    checked = check(curve, steps=20)
    assert checked.updates == [20] and checked.from_same_seed < 5e-5


def test_another_seed_is_inside_and_another_rate_is_not(curve):
    other = ConfigDict(dict(curve.config) | {"seed": 7})
    checked = check(curve, config=other, steps=6)
    assert not checked.outside and checked.from_same_seed is None
    wrong = ConfigDict(curve.config)
    wrong.optimizer.learning_rate = 0.3
    checked = check(curve, config=wrong, steps=6)
    assert 2 in checked.outside and "outside" in table(checked)


def test_the_band_is_what_its_formula_says():
    """By loops, in float64."""
    losses = {"0": [1.0, 2.0, 9.0], "1": [1.2, 2.1, 9.0], "2": [0.9, 2.4, 9.0]}
    low, high = Curve({}, "", [10, 20, 30], losses).band(20)
    shares, means = [], []
    for column in ((1.0, 1.2, 0.9), (2.0, 2.1, 2.4)):
        mean = sum(column) / 3
        means.append(mean)
        shares.append(sum((loss - mean) ** 2 for loss in column) / 2 / mean**2)
    deviation = (sum(shares) / 2) ** 0.5
    np.testing.assert_allclose(low, [mean * (1 - 4 * deviation) for mean in means], rtol=1e-12)
    np.testing.assert_allclose(high, [mean * (1 + 4 * deviation) for mean in means], rtol=1e-12)


@pytest.mark.parametrize("path", CURVES, ids=lambda path: path.stem)
def test_committed_curves(path):
    """Of configs that can be built, of three seeds, each inside the band of all; scores as well."""
    curve = Curve.read(path)
    build(ConfigDict(curve.config))
    assert list(curve.loss) == ["0", "1", "2"] and curve.updates == sorted(curve.updates)
    low, high = curve.band(300)
    for losses in curve.loss.values():
        assert len(losses) == len(curve.updates)
        assert np.all((low <= losses[:15]) & (losses[:15] <= high))
    for by_seed in curve.scores.values():
        assert all(len(values) == len(curve.score_updates) for values in by_seed.values())


def test_the_command(curve, tmp_path):
    """It ends well, or in one line that names the first report outside."""
    (tmp_path / "c.json").write_text(json.dumps(dataclasses.asdict(curve)))
    result = launch("check", "--curve", "c.json", "--steps", 2, tmp_path=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "inside the band at all 1 reports" in result.stdout
    low = {seed: [loss / 2 for loss in losses] for seed, losses in curve.loss.items()}
    (tmp_path / "c.json").write_text(json.dumps(dataclasses.asdict(curve) | {"loss": low}))
    result = launch("check", "--curve", "c.json", "--steps", 2, tmp_path=tmp_path)
    assert result.returncode == 1
    assert "error: after 2 updates the loss is" in result.stderr.strip().splitlines()[-1]
    assert list(tmp_path.iterdir()) == [tmp_path / "c.json"]


def test_the_curve_that_comes_with_it_is_found(tmp_path):
    result = launch("check", "--steps", 1, tmp_path=tmp_path)
    assert_one_line_error(result, "--steps is 1: the curve begins at update 20")


def test_what_is_no_curve(curve, tmp_path):
    (tmp_path / "c.json").write_text('{"loss": []}')
    result = launch("check", "--curve", "c.json", tmp_path=tmp_path)
    assert_one_line_error(result, "c.json is no reference curve")
    with pytest.raises(UserError, match="--steps is 1: the curve begins at update 2"):
        check(curve, steps=1)


def test_a_run_that_is_there_goes_on(curve, tmp_path):
    check(curve, steps=2, workdir=tmp_path / "run")
    time.sleep(1.1)  # files of events are named by the second
    checked = check(curve, steps=6, workdir=tmp_path / "run")
    assert checked.from_same_seed == 0
