"""The notebooks run from top to bottom, and say in one line what stops them."""

import importlib.util
import json
import re
import shutil
from collections import namedtuple
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from PIL import Image
from support import warm
from support.processes import ROOT

NAMES = ("attention_over_time", "quickstart", "released_weights", "train_on_tpu")


def read(name):
    return nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)


def is_parameters(cell):
    return "parameters" in cell.metadata.get("tags", [])


def executed(name, **parameters):
    """(its images, all that it printed) of a notebook with other parameters."""
    notebook = read(name)
    (place,) = [index for index, cell in enumerate(notebook.cells) if is_parameters(cell)]
    lines = "\n".join(f"{key} = {value!r}" for key, value in parameters.items())
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(lines))
    resources = {"metadata": {"path": str(ROOT / "notebooks")}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    images = [output for output in outputs if "image/png" in output.get("data", {})]
    return images, "".join(output.get("text", "") for output in outputs)


def cut_off(folder, patch):
    """No data, no network, and commands that start at once."""
    patch.setenv("TFDS_DATA_DIR", str(folder / "tfds"))
    patch.setenv("HF_HUB_OFFLINE", "1")
    patch.setenv("HF_HUB_CACHE", str(folder / "hub"))
    patch.setenv("PYTHON", warm.python())
    return folder


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """A folder to write to, cut off."""
    return cut_off(tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """(its images, its run), which the next notebook takes up, as it does by default."""
    with pytest.MonkeyPatch.context() as patch:
        run = cut_off(tmp_path_factory.mktemp("quickstart"), patch) / "run"
        return executed("quickstart", total_steps=3, workdir=str(run))[0], run


def test_quickstart(quickstart):
    images, run = quickstart
    assert len(images) == 2
    assert (run / "checkpoints" / "3").exists()


def test_attention_over_time_of_digits_and_of_random_weights(quickstart, alone):
    places = dict(workdir=str(quickstart[1]), output=str(alone / "out"))
    images, said = executed("attention_over_time", total_steps=3, images=2, steps=4, **places)
    assert len(images) == 8 and "Random weights are used instead" in said
    for folder in (alone / "out", alone / "out" / "released"):
        assert "changes no weight by more than" in (folder / "report.md").read_text()
        for name in ("maps", "heads", "time", "variance", "spectra"):
            with Image.open(folder / f"{name}.png") as picture:
                assert min(picture.size) > 200


def test_released_weights_without_a_network(alone):
    """Random weights take the released ones' place, and all images are drawn."""
    few = dict(per_class=2, classes="tiger,volcano", scales=(1.0, 4.4), steps=8, fast_steps=3)
    images, said = executed("released_weights", output=str(alone), **few)
    assert len(images) == 5
    assert "the hub cannot be reached from here" in said and "the images are noise" in said
    with np.load(alone / "classes.npz") as arrays:
        assert arrays["arr_0"].shape == (4, 64, 64, 3) and len(set(arrays["arr_1"].tolist())) == 2
    with np.load(alone / "class.npz") as one, np.load(alone / "scale-4.4.npz") as other:
        np.testing.assert_array_equal(one["arr_0"], other["arr_0"])  # the release's scale


def test_train_on_tpu_from_images_to_a_number(alone):
    """The chain in its short form, then a narrow network on somebody's own images."""
    rng = np.random.default_rng(0)
    for number in range(24):
        path = alone / "images" / ("cats", "dogs")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 48, 3), np.uint8)).save(path)
    small = {"model.hidden_size": 16, "model.depth": 1, "model.num_heads": 2}
    small |= {"training.batch_size": 8, "training.log_steps": 2, "training.grid_images": 9}
    small |= {"sampling.sampler.num_steps": 2}
    images, said = executed(
        "train_on_tpu",
        accelerator="cpu",
        place=str(alone),
        images=str(alone / "images"),
        short=True,
        size=32,
        total_steps=4,
        overrides=[f"--config.{key}={value}" for key, value in small.items()],
    )
    assert len(images) == 5
    assert "The autoencoder of the first part is used instead" in said
    assert "FITS" in said and "train 4/4 steps | loss" in said
    metrics = json.loads((alone / "samples.metrics.json").read_text())
    assert metrics["count"] == 36 and metrics["metrics"]["fid"] >= 0
    chain = alone / "chain"
    assert "its figures have no meaning" in said
    with np.load(chain / "samples_200x32x32x3.npz") as samples:
        assert samples["arr_0"].shape == (200, 32, 32, 3) and samples["arr_0"].dtype == np.uint8
    for image in ("samples_200x32x32x3.png", "latents/grids/00000008.png"):
        with Image.open(chain / image) as grid:
            assert grid.size[0] == 10 * 33 - 1 and grid.mode == "RGB"
    scores = json.loads((chain / "samples_200x32x32x3.metrics.json").read_text())
    assert scores["count"] == 200 and scores["classifier_accuracy_real"] > 0.9
    adm = json.loads((chain / "adm.metrics.json").read_text())
    assert list(adm["metrics"]) == ["fid", "sfid", "inception_score"] and adm["count"] == 40
    watched = json.loads((chain / "latents/evaluations/00000008.json").read_text())
    assert watched["weights"]["ema"]["count"] == 20
    assert "held-out loss ema" in said
    assert str(chain / "autoencoder" / "reconstructions.png") in said
    assert not list(Path(alone).glob("**/*.partial"))


@pytest.mark.parametrize("name", NAMES)
def test_it_is_committed_without_outputs_and_set_up_like_the_others(name):
    cells = read(name).cells
    assert all(not cell.get("outputs") for cell in cells), "commit the notebook without outputs"
    first, *_ = [cell.source for cell in cells if "find_spec" in cell.source]
    usual = [cell.source for cell in read("quickstart").cells if "find_spec" in cell.source]
    shared = usual[0].partition("root = clone")[0]
    assert len(shared) > 500 and first.startswith(shared)


def test_without_the_project_a_line_says_what_to_type(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name in NAMES:
        with pytest.raises(
            SystemExit, match="Run in a new cell above:  !git clone ADDRESS"
        ) as raised:
            run_cells(name, "find_spec")
        assert "\n" not in str(raised.value)


def test_readme_links_each_and_has_its_owner_in_one_place():
    text = (ROOT / "README.md").read_text()
    assert sorted(re.findall(r"\(notebooks/(\w+)\.ipynb\)", text)) == sorted(NAMES)
    pages = [*ROOT.glob("*.md"), *ROOT.glob("*/*.md"), *ROOT.glob("notebooks/*.ipynb")]
    assert sum(path.read_text().count("OWNER") for path in pages) == 1
    assert sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb")) == sorted(NAMES)


def run_cells(name, until, **parameters):
    """Runs the code of a notebook in this process, as far as the cell with that text."""
    space = {}
    for cell in read(name).cells:
        if cell.cell_type == "code":
            exec(cell.source, space)
            if is_parameters(cell):
                space.update(parameters)
            if until in cell.source:
                return


def test_no_accelerator_where_one_was_asked_for(alone, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    with pytest.raises(SystemExit) as raised:
        run_cells("train_on_tpu", "backend.devices", place=str(alone))
    line = str(raised.value)
    assert "\n" not in line and line.startswith("JAX_PLATFORMS is tpu, which cannot be used here")


def test_a_drive_that_is_full(alone, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9))
    with pytest.raises(SystemExit, match=r"has 1\.0 GB left, a run with its checkpoints needs"):
        run_cells("train_on_tpu", "disk_usage", place=str(alone))
