"""Every command line that a page shows is run as it stands there, or says here why not."""

import json
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from support import warm
from support.configs import small_config, small_latent_config
from support.fid import NARROW, inception_tensors, save_pth, save_tiny_vae
from support.images import cifar10_archive, others_latents
from support.processes import environment, write_config

from diffit_jax import models
from diffit_jax.interop import dinov2 as interop
from diffit_jax.interop import official
from diffit_jax.models.diffit.latent import LatentDiffiT

ROOT = Path(__file__).parents[2]
PAGES = (
    "README.md",
    "launch/README.md",
    "launch/ANSWERS.md",
    "configs/README.md",
    "configs/DATA.md",
    "configs/EVALUATION.md",
    "configs/ABLATIONS.md",
    "configs/RECIPES.md",
    "configs/REPRODUCE.md",
    "launch/PERFORMANCE.md",
)
STARTS = ("bash ", "diffit ", "for ", "pip ")

# By what a line begins with; the longest that fits counts. "run": in a folder with stand-ins
# (`scratch`). "dry": with --dry_run. "parsed": its flags only, since what it asks for is not small.
# Anything else: why it is not run.
LISTS = {
    "bash launch/quickstart.sh digits_latent": "the same script as for digits, whose steps a test "
    "of its own runs",
    "bash launch/quickstart.sh chain": "tests/launch/test_notebooks.py runs its steps, in short",
    "bash launch/quickstart.sh": "a test of its own runs its steps on small networks",
    "bash tests/run.sh": "it is what runs this",
    "bash launch/setup_env.sh": "installs, as tests/run.sh has done",
    "pip install": "installs",
    "diffit train --config digits": "run",
    "diffit train --config digits --help": "run",
    "diffit train --workdir DIR": "a pattern: the directory of any run",
    "diffit train --workdir": "run",
    "diffit train --config configs/imagenet256_repa.py": "needs ImageNet's latents and DINOv2; "
    "tests/run/test_representation.py trains such a network",
    "diffit encode --source ILSVRC2012_img_train.tar --crop adm --size 256 --vae "
    "hf://stabilityai/sd-vae-ft-ema --name imagenet256_latents_images": "parsed",
    "diffit train --workdir runs/map256": "needs ImageNet's latents; test_map_runs.py "
    "trains such a map",
    "diffit VERB": "a pattern of all verbs, tested in test_commands.py",
    "diffit configs": "run",
    "diffit info": "run",
    "diffit info PATH": "a pattern: any path",
    # tests/sampling/test_pipeline.py decodes a file.
    "diffit decode": "parsed",
    "diffit train --config own_images": "run",
    # tests/evaluation/test_in_training.py has smaller ones.
    "diffit train --config digits --workdir runs/watched": "parsed",
    # tests/studies/pixel_recipe.py trains it, in small.
    "diffit train --config configs/cifar10.py": "parsed",
    "diffit prepare": "run",
    "diffit encode": "run",
    # tests/training/test_train_autoencoder.py trains one.
    "diffit train_autoencoder": "parsed",
    "diffit train --config … ": "a pattern, with an ellipsis for the config",
    "diffit train --profile_steps": "a flag that the text names",
    "diffit sample --ema_length": "a flag that the text names",
    "diffit sample --workdir": "run",
    "diffit sample --weights hf://": "parsed",  # of 250 steps
    "diffit sample --weights hf://nvidia/DiffiT/diffit_256.safetensors "
    "--vae hf://stabilityai/sd-vae-ft-ema --seeds": "run",
    "diffit convert": "run",
    "diffit score": "run",
    "diffit score --samples S.npz": "a pattern: any file and data set",
    "diffit evaluate": "run",
    "diffit sweep": "parsed",
    "diffit make_reference": "run",
    # Of all digits; tests/launch/test_notebooks.py makes one of some.
    "diffit make_reference --dataset digits": "parsed",
    "diffit make_reference --dataset cifar10": "parsed",
    # It draws 50,000; tests/evaluation/test_evaluate.py draws six.
    "diffit evaluate --weights": "parsed",
    "diffit evaluate --workdir": "parsed",
    "diffit self_test": "parsed",
    "diffit benchmark --config digits": "run",
    "diffit benchmark": "parsed",
    # tests/preflight/test_preflight.py runs it, for small networks.
    "diffit preflight": "parsed",
    "diffit analyse": "run",
    # tests/training/test_ablate.py trains a row of a small one.
    "diffit ablate": "parsed",
    # tests/training/test_check.py trains a small network beside a curve.
    "diffit check": "parsed",
    "bash launch/local.sh": "dry",
    "bash launch/tpu_pod.sh create\\|": "a pattern of all actions",
    "bash launch/tpu_pod.sh": "dry",
    "bash launch/gke.sh": "dry",
    "bash launch/slurm.sh": "dry",
}


def lines_of(page):
    """The commands of a page: whole lines of shell blocks, and code within the text that begins
    like one; continued lines joined."""
    text = (ROOT / page).read_text()
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    found = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    found += re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    cleaned = (
        re.sub(r"\s+", " ", line.split("  #")[0].split(" # ")[0]).strip().removeprefix(".venv/bin/")
        for line in found
    )
    cleaned = (re.sub(r"^(?:python )?launch/(\w+)\.py", r"diffit \1", line) for line in cleaned)
    shown = r"^diffit \w+ .*--|^diffit (info|configs)\b|\.sh|^pip install|^for"
    return [line for line in cleaned if line.startswith(STARTS) and re.search(shown, line)]


def variants(line):
    """A line with its [optional parts] left out, and with them put in where they are whole."""
    line = line.replace("\\|", "|")
    with_them = re.sub(r"\[(--[^\]…]*?)\]", r"\1", line)
    return list(
        dict.fromkeys(
            re.sub(r"\s+", " ", re.sub(r"\[[^\]]*\]", "", each)).strip()
            for each in (line, with_them)
        )
    )


def listed(line):
    return max((start for start in LISTS if line.startswith(start)), key=len, default=None)


SHOWN = list(dict.fromkeys((page, line) for page in PAGES for line in lines_of(page)))


@pytest.mark.parametrize(
    ("page", "line"), SHOWN, ids=[f"{page}: {line[:70]}" for page, line in SHOWN]
)
def test_every_line_is_in_a_list(page, line):
    assert listed(line), f"{page} shows {line!r}: say in LISTS how it is tested"


def test_every_list_is_of_a_line():
    used = {listed(line) for _, line in SHOWN}
    assert not LISTS.keys() - used, "these are shown nowhere any more"


# configs/own_images.py, but two updates of narrow networks.
OWN = """
import runpy
def get_config(argument):
    argument = argument.replace("XL/2", "S/2")
    config = runpy.run_path("{root}/configs/own_images.py")["get_config"](argument)
    with config.unlocked():
        if config.model.name == "image_diffit":
            config.model.update(channels=(8,), num_blocks=(1,), head_width=8, time_width=16)
        else:
            config.model.update(hidden_size=16, depth=1, num_heads=2)
        config.training.update(batch_size=8, total_steps=2, grid_images=1)
        config.sampling.sampler.num_steps = 2
    return config
"""


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    """A folder like the project's, with small networks under the names of the pages."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "launch").symlink_to(ROOT / "launch")
    (folder / ".venv").symlink_to(ROOT / ".venv")
    (folder / "configs").mkdir()
    for path in (ROOT / "configs").glob("*.py"):
        (folder / "configs" / path.name).symlink_to(path)
    (folder / "configs" / "digits.py").unlink()
    (folder / "configs" / "own_images.py").unlink()
    (folder / "configs" / "own_images.py").write_text(OWN.format(root=ROOT))
    digits = small_config(
        data={"name": "digits"}, training__total_steps=4, training__checkpoint_steps=2
    )
    write_config(folder / "configs" / "digits.py", digits)
    model = LatentDiffiT(input_size=8, hidden_size=16, depth=2, num_heads=2)
    official.save(
        folder / "diffit_256.safetensors", model, models.init_variables(model, jax.random.key(0))
    )
    save_tiny_vae(folder / "sd-vae-ft-ema")
    others_latents(folder / "edm2.zip", (5.81, 3.25, 0.12, -2.15))
    cifar10_archive(folder / "cifar-10-python.tar.gz", 2)
    save_pth(folder / "pt_inception-2015-12-05-6726825d.pth", inception_tensors(NARROW))
    tensors = interop.released_tensors(*interop.load(interop.DIGITS))
    for name in ("dinov2_vitl14_pretrain.pth", "dinov2_vitb14_pretrain.pth"):
        save_pth(folder / name, tensors)
    of_features = {"mu": np.zeros(64), "sigma": np.eye(64)}
    edm2 = {"num_images": 1_281_167, "fd_dinov2": of_features}
    (folder / "img512.pkl").write_bytes(pickle.dumps(edm2, protocol=4))
    images = np.random.default_rng(0).integers(0, 256, (20, 64, 64, 3)).astype(np.uint8)
    np.savez(folder / "samples_50000x256x256x3.npz", arr_0=images[:8])
    for name in ("red flowers", "temple"):
        (folder / "pictures" / name).mkdir(parents=True)
        for number in range(24):
            picture = np.random.default_rng([number, len(name)]).integers(0, 256, (20, 24, 3))
            path = folder / "pictures" / name / f"{number}.png"
            Image.fromarray(picture.astype(np.uint8)).save(path)
    (folder / "images").mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / "images" / f"{number}.png")
    return folder


def with_python(bin):
    """A folder in which `python` is the suite's, and `diffit` runs on it."""
    if not bin.exists():
        bin.mkdir(parents=True)
        (bin / "python").symlink_to(warm.python())
        (bin / "diffit").write_text(
            f'#!/bin/sh\nverb="$1"\nshift\nexec python {ROOT}/launch/"$verb".py "$@"\n'
        )
        (bin / "diffit").chmod(0o755)
    return bin


# What stands in for files that are fetched, images of 256 pixels, and a training that takes hours.
STAND_INS = {
    "hf://stabilityai/sd-vae-ft-ema": "sd-vae-ft-ema",
    "hf://nvidia/DiffiT/": "",
    "--size 256": "--size 16",
    "--crop adm --size 16": "--crop center --size 16",
    "total_steps=20000": "total_steps=2",
    "~/tensorflow_datasets/": "data/",
}


def stood_in(text):
    for name, other in STAND_INS.items():
        text = text.replace(name, other)
    return text


# Lines hold on any number: DIFFIT_JAX_PAGES_DEVICES=8 bash tests/run.sh tests/launch/test_pages.py
DEVICES = int(os.environ.get("DIFFIT_JAX_PAGES_DEVICES", "1"))


def run(line, folder, devices=DEVICES, timeout=300):
    """A line in a shell, with the environment's Python under its usual name."""
    line = stood_in(line)
    bin = with_python(folder / "bin")
    path = f"{bin}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = environment(devices, PATH=path, TFDS_DATA_DIR=str(folder / "data"))
    return subprocess.run(
        ["bash", "-c", line], cwd=folder, env=env, capture_output=True, text=True, timeout=timeout
    )


def of_kind(kind):
    return [
        (page, each)
        for page, line in SHOWN
        for each in variants(line)
        if LISTS.get(listed(line)) == kind
    ]


@pytest.mark.parametrize(("page", "line"), of_kind("dry"), ids=str)
def test_dry_runs(page, line, scratch):
    """What stands behind an ellipsis is a run's; a variable of the page keeps its value."""
    arguments = " --name n --zone z" if "$pod" in line or "tpu_pod" in line else ""
    line = (
        line.replace("$pod", "")
        .replace("--name N --zone Z", "")
        .replace("…", "--config configs/digits.py --workdir runs/digits")
    )
    action, dashes, rest = line.partition(" -- ")
    result = run(f"{action}{arguments} --dry_run{dashes}{rest}", scratch)
    assert result.returncode == 0, result.stderr


# Imports once what takes long, and parses each command line in a child of its own.
PARSE = """
import json, os, runpy, sys, traceback
import jax
from diffit_jax import cli
from diffit_jax.experiment import config as experiment
cli.require_run = cli._check_paths = lambda *_: None
cli.run = lambda main, cluster=None, takes=None, check=None: print(cli._parse(sys.argv, check))
answers = []
for arguments in json.loads(sys.argv[1]):
    reader, writer = os.pipe()
    if not os.fork():
        os.dup2(writer, 1), os.dup2(writer, 2)
        sys.argv = arguments
        try:
            runpy.run_path(arguments[0], run_name="__main__")
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(0)
    os.close(writer)
    with open(reader) as file:
        answers.append(file.read())
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def parsed(scratch):
    """{line: what its command makes of it}."""
    lines = list(dict.fromkeys(line for _, line in of_kind("parsed")))
    arguments = []
    for line in lines:
        verb, *rest = shlex.split(stood_in(line))[1:]
        arguments.append([f"launch/{verb}.py", *rest])
    command = [sys.executable, "-W", "ignore", "-c", PARSE, json.dumps(arguments)]
    result = subprocess.run(
        command, cwd=scratch, env=environment(), capture_output=True, text=True, timeout=200
    )
    assert result.returncode == 0, result.stderr
    answers = json.loads(result.stdout.splitlines()[-1])
    return dict(zip(lines, zip(arguments, answers, strict=True), strict=True))


@pytest.mark.parametrize(("page", "line"), of_kind("parsed"), ids=str)
def test_flags_of_large_commands(page, line, parsed):
    """The script knows its flags, their values and the keys of the config."""
    arguments, said = parsed[line]
    assert said.strip() == str(arguments[:1]), said[-2000:]


def test_lines_that_are_run(scratch):
    """In the order of the pages, with relative paths, each as it stands and with its optional
    parts."""
    lines = list(dict.fromkeys(line for _, line in of_kind("run")))
    order = (
        "diffit prepare",
        "diffit encode",
        "diffit train --config",
        "diffit sample --workdir",
        "diffit sample --weights",
        "diffit convert --weights",
        "diffit train --workdir",
        "diffit convert",
        "diffit sample --workdir runs/map256",  # made by the one before
        "diffit score",
        "diffit analyse",
        "diffit make_reference",
        "diffit evaluate",
        "diffit benchmark",
        "diffit info",
        "diffit configs",
    )
    lines.sort(key=lambda line: order.index(max(filter(line.startswith, order), key=len)))
    # The reference of another one's name is made first.
    lines.sort(key=lambda line: "VIRTUAL" in line)
    taken = set()
    for line in lines:
        if "VIRTUAL" in line:
            shutil.copy(scratch / "reference.npz", scratch / "VIRTUAL_imagenet256_labeled.npz")
        target = re.search(r"--to_workdir (\S+)", line)
        if target and target[1] in taken:
            shutil.rmtree(scratch / target[1])
        result = run(line, scratch)
        assert result.returncode == 0, (line, result.stderr[-2000:])
        if target:
            taken.add(target[1])


PYTHON = [
    (page, "\n\n".join(blocks))
    for page in PAGES
    if (blocks := re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL))
]


@pytest.mark.parametrize(("page", "code"), PYTHON, ids=[page for page, _ in PYTHON])
def test_blocks_of_python(page, code, scratch):
    """One page after the other, its blocks in one process, in the folder of the lines above."""
    assert (scratch / "runs" / "digits" / "config.json").exists()  # as the page has it before
    (scratch / "blocks.py").write_text(stood_in(code))
    result = run("python blocks.py", scratch)
    assert result.returncode == 0, result.stderr[-2000:]


def test_quickstart_on_three_devices(tmp_path):
    """The script as it is, on small networks: trains on the largest number that divides the batch,
    says so, samples and scores."""
    (tmp_path / "configs").mkdir()
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    (tmp_path / "launch" / "setup_env.sh").write_text("exit 0\n")
    with_python(tmp_path / ".venv" / "bin")
    config = small_latent_config(
        training__total_steps=4, sampling__sampler__num_steps=2, sampling__batch_per_device=100
    )
    config.data.update(name="digits", autoencoder="")
    config.model.input_channels = 1
    config.training.grid_images = 10
    write_config(tmp_path / "configs" / "digits.py", config)
    result = run("bash launch/quickstart.sh", tmp_path, devices=3)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "using 2 of 3 devices, which training.batch_size 8 divides over" in result.stderr
    assert (tmp_path / "runs" / "digits" / "samples_1000x8x8x1.metrics.json").exists()
    command = "diffit train --config configs/digits.py --workdir runs/other"
    refused = run(command, tmp_path, devices=3)
    assert refused.returncode == 1
    assert "training.batch_size 8 does not divide over 3 devices" in refused.stderr
