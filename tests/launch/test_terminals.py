"""Commands in any terminal, and what they refuse to replace."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.commands import assert_one_line_error, launch
from support.golden import WEIGHTS
from support.processes import ROOT, environment

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
    return f"{sys.executable} {ROOT}/launch/score.py --samples s.npz --overwrite"


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
            ["--workdir", "hf://owner/run"],
            "--workdir hf://owner/run is on the Hugging Face hub, which is only read from",
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
        (["--workdir", "None"], "--workdir is None, which is not a path"),
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
from diffit_jax.errors import UserError
from diffit_jax.runtime import config_files
from diffit_jax.sampling import request
config_files.__file__ = "/site-packages/diffit_jax/runtime/config_files.py"
print(request.config_for_weights(None, sys.argv[1])["model"]["depth"])
sys.argv[0] = "/elsewhere/launch/sample.py"
try:
    request.config_for_weights(None, sys.argv[1])
except UserError as error:
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
