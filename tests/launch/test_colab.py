"""What Colab's users do, with the versions that are there: nothing that is installed is moved, and
the quickstart and preflight run."""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

import pytest
from support.configs import small_latent_config
from support.processes import ROOT, environment, write_config

CONSTRAINTS = ROOT / "constraints-colab.txt"
# What its published lists name, and must not be moved.
PREINSTALLED = (
    "jax",
    "jaxlib",
    "flax",
    "numpy",
    "optax",
    "orbax-checkpoint",
    "grain",
    "protobuf",
    "libtpu",
    "tensorflow-datasets",
)
PINS = dict(line.split("==") for line in CONSTRAINTS.read_text().splitlines() if "==" in line)


def here(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return None


in_colab = pytest.mark.skipif(
    here("jax") != PINS["jax"], reason="bash tests/run.sh --colab runs it, with Colab's versions"
)


def test_ranges_take_colabs_versions():
    """Every requirement of setup.py that Colab has too."""
    from packaging.requirements import Requirement

    text = (ROOT / "setup.py").read_text()
    required = [
        Requirement(each) for each in re.findall(r'^        "([a-zA-Z][^"]+)",', text, re.MULTILINE)
    ]
    checked = [each for each in required if each.name in PINS]
    assert {
        "jax",
        "flax",
        "numpy",
        "optax",
        "orbax-checkpoint",
        "grain",
        "tensorflow-datasets",
    } <= {each.name for each in checked}
    for requirement in checked:
        assert requirement.specifier.contains(PINS[requirement.name]), requirement


@in_colab
def test_installing_moves_nothing_that_is_there():
    """pip's own plan."""
    assert {name: here(name) for name in PREINSTALLED} == {
        name: PINS[name] for name in PREINSTALLED
    }
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--dry-run",
        "--quiet",
        "--disable-pip-version-check",
        "--report",
        "-",
        str(ROOT),
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    planned = {
        entry["metadata"]["name"].lower().replace("_", "-")
        for entry in json.loads(result.stdout)["install"]
    }
    assert planned == {"diffit-jax"}


@in_colab
def test_the_quickstart_in_short(tmp_path):
    """The script as it is, on a network that trains in seconds: trained, sampled and scored."""
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    (tmp_path / "launch" / "setup_env.sh").write_text("exit 0\n")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").symlink_to(sys.executable)
    (tmp_path / ".venv" / "pyvenv.cfg").write_text(
        f"home = {os.path.dirname(os.path.realpath(sys.executable))}\n"
    )
    (tmp_path / "configs").mkdir()
    config = small_latent_config(
        training__total_steps=4, sampling__sampler__num_steps=2, sampling__batch_per_device=100
    )
    config.data.update(name="digits", autoencoder="")
    config.model.input_channels = 1
    config.training.grid_images = 10
    write_config(tmp_path / "configs" / "digits.py", config)
    more = {
        "PYTHONPATH": os.pathsep.join(
            [str(ROOT), *(path for path in sys.path if path.endswith("site-packages"))]
        )
    }
    result = subprocess.run(
        ["bash", "launch/quickstart.sh"],
        cwd=tmp_path,
        env=environment(1, **more),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert (tmp_path / "runs" / "digits" / "samples_1000x8x8x1.metrics.json").exists()


@in_colab
def test_preflight_of_imagenet_with_colabs_compiler(tmp_path):
    """The step of XL/2 on four chips of a v5e; where the attention kernel does not compile, it says
    so and XLA's is taken."""
    flags = [
        "--config",
        ROOT / "configs" / "imagenet256_latent.py",
        "--topology",
        "v5e:2x2",
        "--batch_per_chip",
        "8",
        "--programs",
        "train",
    ]
    command = [
        sys.executable,
        str(ROOT / "launch" / "preflight.py"),
        *map(str, flags),
        "--json",
        str(tmp_path / "r.json"),
    ]
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {
        "HOME": str(tmp_path)
    }
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=600, env=env, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr[-3000:]
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["fits"] and report["train"]["step_s"] > 0
    attention = report["setting"]["attention"]
    assert attention.startswith(("pallas (", "xla (the kernel does not")), attention
