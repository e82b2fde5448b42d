"""The commands as a user types them: what they write, and one line of error for what cannot be."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.commands import assert_one_line_error, launch
from support.configs import small_config
from support.golden import WEIGHTS

from diffit_jax.errors import UserError
from diffit_jax.runtime import files

ROOT = Path(__file__).parents[2]


def test_train_then_sample(tmp_path):
    workdir = tmp_path / "run"
    result = launch(
        "train",
        "--workdir",
        workdir,
        "--config.training.total_steps=2",
        config=small_config(),
        tmp_path=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    assert (
        "starting at step 0 of 2" in result.stderr
        and "train 2/2 steps | loss" in result.stderr
        and "images/s" in result.stderr
    )
    result = launch(
        "sample",
        "--workdir",
        workdir,
        "--seeds",
        "0-2,7",
        "--labels",
        "3,5",
        "--guidance.scale",
        "2",
        tmp_path=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    name = "samples_4x8x8x1-seeds=0-2_7,labels=3_5,guidance.scale=2.0"
    with np.load(workdir / f"{name}.npz") as arrays:
        assert arrays["arr_0"].shape == (4, 8, 8, 1) and arrays["arr_1"].tolist() == [3, 5, 3, 5]
    with Image.open(workdir / f"{name}.png") as image:
        assert image.size == (2 * 33 - 1, 16 + 2 * 33 - 1)  # a column for each, and its name


def test_benchmark(tmp_path):
    result = launch(
        "benchmark",
        "--steps",
        3,
        "--json",
        tmp_path / "b.json",
        config=small_config(),
        tmp_path=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    figures = json.loads((tmp_path / "b.json").read_text())
    assert (
        figures["images_per_s"] == pytest.approx(8 * figures["steps_per_s"])
        and figures["compile_s"] > 0
    )
    assert (
        0 < figures["step_ms_min"] <= figures["step_ms_median"]
        and 0 <= figures["data_wait_share"] < 1
    )
    assert 0.05 < figures["peak_memory_gb"] < 24


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--config.model.widow=3",),
            "config key model.widow is unknown: did you mean model.window?",
        ),
        (
            ("--config.model.window=three",),
            "config key model.window is 'three': it must be a whole number",
        ),
        (("--colour=red",), "--colour is no flag of this command"),
        (("stray",), "argument 'stray' is not a flag"),
        (("--config.model.image_size=9",), "image_size 9 is not divisible by 2"),
        (("--config.model.num_classes=7",), "data set digits has 10 classes, the model 7"),
    ],
)
def test_bad_flags_and_configs(arguments, message, tmp_path):
    workdir = tmp_path / "run"
    config = ROOT / "configs" / "digits.py"
    result = launch(
        "train", "--config", config, "--workdir", workdir, *arguments, tmp_path=tmp_path
    )
    assert_one_line_error(result, message)
    assert not workdir.exists()


def test_missing_and_broken_config_files(tmp_path):
    assert_one_line_error(
        launch("train", "--workdir", tmp_path / "run", tmp_path=tmp_path), "--config"
    )
    missing = launch(
        "train", "--config", tmp_path / "none.py", "--workdir", tmp_path / "run", tmp_path=tmp_path
    )
    assert_one_line_error(missing, "--config cannot be loaded")
    without = launch("sample", "--workdir", "run", "--config.seed=3", tmp_path=tmp_path)
    assert_one_line_error(without, "--config.seed=3 needs a config")


def test_unknown_size_in_the_argument_of_a_config(tmp_path):
    config = f"{ROOT / 'configs' / 'imagenet256_latent.py'}:Q/2"
    result = launch("train", "--config", config, "--workdir", tmp_path / "run", tmp_path=tmp_path)
    assert_one_line_error(
        result, "--config cannot be loaded (model size 'Q/2' is unknown: use S/2, B/2, L/2, XL/2)"
    )


def test_weights_to_samples_and_workdirs(tmp_path):
    """Released weights with the config of their size, by hand of the two commands that take
    them."""
    overrides = (
        "--config",
        ROOT / "configs" / "imagenet256_latent.py",
        "--config.model.dtype=float32",
        "--config.training.grid_images=2",
    )
    request = (
        "--labels",
        "3,7",
        "--seeds",
        "0-2",
        "--sampler",
        "ddim",
        "--sampler.num_steps",
        "2",
        "--batch_per_device",
        "1",
    )
    result = launch(
        "sample",
        "--weights",
        WEIGHTS["a"],
        *overrides,
        *request,
        "--output",
        tmp_path / "w.npz",
        tmp_path=tmp_path,
    )
    assert result.returncode == 0 and "writing latents of sd-vae-ft-ema" in result.stderr, (
        result.stderr
    )
    result = launch(
        "convert",
        "--weights",
        WEIGHTS["a"],
        "--to_workdir",
        tmp_path / "run",
        *overrides,
        tmp_path=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    result = launch(
        "sample",
        "--workdir",
        tmp_path / "run",
        *request,
        "--output",
        tmp_path / "r.npz",
        tmp_path=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    with np.load(tmp_path / "w.npz") as of_weights, np.load(tmp_path / "r.npz") as of_run:
        np.testing.assert_array_equal(of_weights["arr_0"], of_run["arr_0"])
        assert of_weights["arr_1"].tolist() == [3, 7, 3]
    result = launch(
        "convert",
        "--workdir",
        tmp_path / "run",
        "--to_weights",
        tmp_path / "back.safetensors",
        tmp_path=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    assert_one_line_error(
        launch("sample", "--workdir", "a", "--weights", "b", tmp_path=tmp_path),
        "exactly one of --workdir, --weights",
    )
    assert_one_line_error(
        launch("convert", "--weights", "a", "--to_weights", "b", tmp_path=tmp_path),
        "would copy a file",
    )
    assert_one_line_error(
        launch("sample", "--weights", __file__, tmp_path=tmp_path),
        "truncated or no safetensors file",
    )
    assert_one_line_error(
        launch("sample", "--workdir", tmp_path / "run", "--labels", "12", tmp_path=tmp_path),
        "label 12 is outside the classes",
    )


def test_unwritable_workdir(tmp_path):
    """Under a regular file nothing can be created, not even by root."""
    (tmp_path / "file").write_text("")
    result = launch(
        "train", "--workdir", tmp_path / "file" / "run", config=small_config(), tmp_path=tmp_path
    )
    assert_one_line_error(result, "workdir")
    assert "cannot be written" in result.stderr


def test_google_storage_says_what_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(
        UserError, match=r"workdir gs://bucket/run cannot be used .*: pip install gcsfs"
    ):
        files.make_directory("gs://bucket/run", "workdir")


def test_workdir_of_another_config(run, tmp_path):
    workdir, _ = run
    before = (workdir / "config.json").read_text()
    result = launch(
        "train", "--workdir", workdir, config=small_config(model__window=2), tmp_path=tmp_path
    )
    assert_one_line_error(result, "holds a run with model.window = 4, this config has 2")
    assert (workdir / "config.json").read_text() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--labels", "12"), "label 12 is outside the classes 0-9"),
        (("--seeds", "5-x"), "--seeds '5-x' is not a list of whole numbers"),
        (("--workdir", "none"), "/none holds no run"),
    ],
)
def test_bad_requests_for_samples(run, arguments, message, tmp_path):
    workdir, _ = run
    assert_one_line_error(
        launch("sample", "--workdir", workdir, *arguments, tmp_path=tmp_path), message
    )
    assert not list(workdir.glob("*.npz")) and not (tmp_path / "none").exists()


# --- The entry point


def diffit(*arguments):
    command = [sys.executable, "-m", "diffit_jax", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)


def test_the_entry_point_lists_every_verb_and_launchers_call_it():
    listed = diffit()
    assert listed.returncode == 0 and not listed.stderr
    verbs = dict(re.findall(r"(?m)^  (\w+) +(\S.*)$", listed.stdout))
    scripts = {path.stem: path.read_text() for path in (ROOT / "launch").glob("*.py")}
    assert verbs.keys() == scripts.keys() and len(verbs) == 19
    lines = {re.sub(rf"\b{verb}\b", "VERB", text) for verb, text in scripts.items()}
    assert len(lines) == 1  # the same three
    assert listed.stdout == diffit("--help").stdout


def test_an_unknown_verb_names_the_nearest():
    for asked, near in (("tain", "train"), ("make-refrence", "make_reference")):
        result = diffit(asked)
        assert result.returncode == 1 and len(result.stderr.splitlines()) == 1
        assert result.stderr.startswith(f"error: verb {asked} is unknown: did you mean {near}?")
    assert "known are ablate, analyse, benchmark" in diffit("xyz").stderr


def test_a_flag_that_became_a_verb_is_named(tmp_path):
    for flag in ("sweep", "make_reference", "self_test"):
        result = launch("evaluate", "--samples", "s.npz", f"--{flag}", "x", tmp_path=tmp_path)
        assert_one_line_error(result, f"it is a verb, diffit {flag} --help")


def test_the_list_of_verbs_may_be_cut_short(tmp_path):
    command = f"{sys.executable} -m diffit_jax | head -n 1"
    result = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.startswith("usage: diffit VERB") and not result.stderr


@pytest.mark.parametrize("verb", sorted(path.stem for path in (ROOT / "launch").glob("*.py")))
def test_help_shows_every_flag_of_a_verb_and_none_of_libraries(verb):
    """Those that the verb's files define, by their source: no flag is in another list."""
    shown = diffit(verb, "--help")
    names = set(re.findall(r"(?m)^  --([\w.]+)", shown.stdout))
    assert shown.returncode == 0 and not shown.stderr and f"diffit {verb}" in shown.stdout
    text = (ROOT / "diffit_jax" / "cli" / "commands" / f"{verb}.py").read_text()
    defined = set(re.findall(r"(?:DEFINE_\w+|define_\w+)\(\s*\"(\w+)\"", text))
    assert defined - {"vae_at_once"} <= names
    if "SamplingFlags" in text:
        assert {"sampler", "sampler.num_steps", "guidance.scale", "batch_per_device"} <= names
    assert ("config" in names) == ("NetworkFlags" in text or "define_config" in text)
    assert not {"verbosity", "logtostderr", "xml_output_file", "vae_at_once"} & names
    assert max(map(len, shown.stdout.splitlines())) <= 112


def test_a_verb_runs_by_either_name(tmp_path):
    for verb in ("train_autoencoder", "train-autoencoder"):
        result = diffit(verb, "--dataset", "digits")
        assert result.returncode == 1 and "--workdir" in result.stderr, result.stderr
