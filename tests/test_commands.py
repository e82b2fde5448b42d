"""The commands as a user types them: what they write, and one line of error for what cannot be."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import small_config
from golden_data import WEIGHTS
from PIL import Image
from processes import environment, write_config

from diffit_jax.errors import UserError
from diffit_jax.runtime import files

ROOT = Path(__file__).parents[1]


def launch(name, *arguments, config=None, tmp_path=None):
    if config is not None:
        path = write_config(tmp_path / "config.py", config)
        arguments = ("--config", str(path), *arguments)
    command = [sys.executable, str(ROOT / "launch" / f"{name}.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)


def assert_one_line_error(result, message):
    lines = result.stderr.strip().splitlines()
    assert result.returncode == 1 and len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ") and message in lines[0], lines[0]


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
    with Image.open(workdir / f"{name}.png") as picture:
        assert picture.size == (10 * 33 - 1, 32)


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
        (("--config.model.window=three",), "config.model.window=three"),
        (("--colour=red",), "Unknown command line flag 'colour'"),
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


# --- Terminals


def shell(line, tmp_path, **more):
    env = environment(**more)
    return subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, timeout=120, cwd=tmp_path, env=env
    )


@pytest.fixture
def digits_npz(tmp_path):
    rng = np.random.default_rng(0)
    np.savez(
        tmp_path / "s.npz",
        arr_0=rng.integers(0, 256, (360, 8, 8, 1), np.uint8),
        arr_1=rng.integers(0, 10, 360),
    )
    return f"{sys.executable} {ROOT}/launch/evaluate.py --samples s.npz --overwrite"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_any_terminal_can_be_written_to(digits_npz, tmp_path, encoding):
    result = subprocess.run(
        digits_npz.split(),
        capture_output=True,
        timeout=120,
        cwd=tmp_path,
        env=environment(PYTHONIOENCODING=encoding),
    )
    assert result.returncode == 0, result.stderr
    assert (
        b"chet distance to held-out images" in result.stdout and b"Traceback" not in result.stderr
    )


def test_closed_and_full_streams(digits_npz, tmp_path):
    """What is computed is written, whoever listens."""
    for redirection in (">&-", "2>&-", ">&- 2>&-"):
        result = shell(f"{digits_npz} {redirection}", tmp_path)
        assert result.returncode == 0 and "Traceback" not in result.stderr, (
            redirection,
            result.stderr,
        )
        (tmp_path / "s.metrics.json").unlink()
    if Path("/dev/full").exists():
        result = shell(f"{digits_npz} >/dev/full", tmp_path)
        assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
        assert result.stderr.splitlines()[-1].startswith(
            "error: the output could not be printed (No space left on device)"
        )
        assert (tmp_path / "s.metrics.json").exists()


def test_help_is_no_failure_and_may_be_cut_short(tmp_path):
    command = f"{sys.executable} {ROOT}/launch/sample.py"
    for flag in ("--help", "-h", "--helpfull"):
        result = shell(f"{command} {flag}", tmp_path)
        assert result.returncode == 0 and "--seeds" in result.stdout, result.stderr
    result = shell(f"{command} --helpfull | head -n 1", tmp_path)
    assert (
        result.returncode == 0 and "error" not in result.stderr and "Traceback" not in result.stderr
    ), result.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--workdir", "https://example.org/run"],
            "--workdir https://example.org/run is an address in the web: download it first",
        ),
        (
            ["--weights", "hf://nvidia/diffit/w.safetensors"],
            "--weights hf://nvidia/diffit/w.safetensors is an address in the web",
        ),
        (
            ["--workdir", "s3://bucket/run"],
            "--workdir s3://bucket/run cannot be used without the library s3fs: pip install s3fs",
        ),
        (
            ["--workdir", "gs://bucket/run"],
            "--workdir gs://bucket/run cannot be used without the library gcsfs: pip install gcsfs",
        ),
        (["--workdir", "ssh://host/run"], "has the scheme ssh://, which is not known"),
        (["--workdir", "None"], "--workdir is None, which is no path"),
        (["--flagfile=nothing.txt", "--workdir", "x"], "nothing.txt"),
        (["--workdir", "nothing", "--checkpoint", "-1"], "checkpoint"),
        (["--weights", "w.safetensors", "--checkpoint", "3"], "--checkpoint goes with --workdir"),
    ],
)
def test_what_cannot_be_named(flags, message, tmp_path):
    result = launch("sample", *flags, tmp_path=tmp_path)
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    assert message in result.stderr.strip().splitlines()[-1], result.stderr


def test_weights_of_the_released_code_are_not_replaced(run, latent_run, tmp_path):
    target = tmp_path / "diffit.safetensors"
    target.write_bytes(b"precious")
    result = launch(
        "convert", "--workdir", latent_run[0], "--to_weights", target, tmp_path=tmp_path
    )
    assert_one_line_error(
        result, f"--to_weights {target} is there already: name another file, or say --overwrite"
    )
    assert target.read_bytes() == b"precious"
    result = launch(
        "convert",
        "--workdir",
        latent_run[0],
        "--to_weights",
        target,
        "--overwrite",
        tmp_path=tmp_path,
    )
    assert result.returncode == 0 and target.stat().st_size > 1000, result.stderr


def test_configs_are_found_beside_the_script(tmp_path):
    """The package may be installed elsewhere, and the scripts run from a clone."""
    code = """
import sys
from diffit_jax import cli# listens to signals from here on: in a process of its own
cli.__file__ = "/site-packages/diffit_jax/cli.py"
print(cli.config_for_weights(None, sys.argv[1])["model"]["depth"])
sys.argv[0] = "/elsewhere/launch/sample.py"
try:
    cli.config_for_weights(None, sys.argv[1])
except cli.UserError as error:
    print(error)
"""
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "try.py").write_text(code)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    command = [sys.executable, str(tmp_path / "launch" / "try.py"), str(WEIGHTS["a"])]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=environment(PYTHONPATH=str(ROOT))
    )
    found, missed = result.stdout.splitlines()
    assert found == "28" and missed.startswith(
        "there is no configs/imagenet256_latent.py in this installation"
    ), result.stderr
    assert missed.endswith("name a config by --config")
