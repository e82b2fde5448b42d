"""Checkpoints that are damaged, foreign or not there."""

import json
import os
import re
import shutil
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from support.configs import small_config, small_latent_config
from support.damage import data_files, truncate

from diffit_jax.errors import UserError
from diffit_jax.experiment.config import build
from diffit_jax.run.state import abstract_state, items_of, restore_state
from diffit_jax.runtime import checkpoint, parallel
from diffit_jax.runtime.checkpoint import Checkpoints
from diffit_jax.sampling.sample import sample
from diffit_jax.training.train import train

TREE = {"a": np.arange(5000, dtype=np.float32), "b": {"c": np.ones((3, 4), np.float32)}}


def abstract(tree=TREE):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
    )


@pytest.fixture
def saved(tmp_path):
    """Three checkpoints of which each step's array is different."""
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=3)
    for step in (1, 2, 3, 4):
        checkpoints.save(
            step,
            {"tree": jax.tree.map(lambda leaf, step=step: jnp.asarray(leaf) + step, TREE)},
            {"step": step},
        )
    checkpoints.wait()
    return tmp_path / "checkpoints"


def test_newest_is_restored_and_old_ones_are_deleted(saved):
    checkpoints = Checkpoints(saved, keep=3)
    assert checkpoints.steps() == [2, 3, 4]
    step, items = checkpoints.restore({"tree": abstract()})
    assert step == 4
    np.testing.assert_array_equal(items["tree"]["a"], TREE["a"] + 4)


@pytest.mark.parametrize(
    "damage",
    [
        lambda directory: truncate(*data_files(directory)),
        lambda directory: [path.unlink() for path in data_files(directory)],
        lambda directory: truncate(directory / "tree" / "manifest.ocdbt"),
        lambda directory: (directory / "tree" / "_METADATA").write_text("{"),
        lambda directory: shutil.rmtree(directory / "tree"),
        lambda directory: shutil.rmtree(directory / "facts"),
        lambda directory: [path.unlink() for path in directory.rglob("*") if path.is_file()],
    ],
    ids=[
        "data truncated",
        "data removed",
        "manifest truncated",
        "metadata broken",
        "item removed",
        "facts removed",
        "all removed",
    ],
)
def test_last_good_one_is_used_instead_of_a_damaged_one(saved, damage, caplog):
    damage(saved / "4")
    checkpoints = Checkpoints(saved, keep=3)
    with caplog.at_level("WARNING", logger="diffit_jax"):
        step, items = checkpoints.restore({"tree": abstract()})
    assert step == 3
    np.testing.assert_array_equal(items["tree"]["a"], TREE["a"] + 3)
    assert (
        "checkpoint 4" in caplog.text
        and "cannot be used" in caplog.text
        and "checkpoint 3 is used instead" in caplog.text
    )
    # The damaged one makes room, and is kept.
    checkpoints.set_aside_after(3)
    assert checkpoints.steps() == [2, 3] and (saved.parent / "checkpoints_damaged" / "4").exists()
    checkpoints.save(4, {"tree": jax.tree.map(jnp.asarray, TREE)}, {"step": 4})
    checkpoints.wait()
    np.testing.assert_array_equal(
        checkpoints.restore({"tree": abstract()})[1]["tree"]["a"], TREE["a"]
    )


@pytest.mark.parametrize(
    ("foreign", "difference"),
    [
        (
            TREE | {"a": np.zeros(4000, np.float32)},
            r"tree/a is float32\[5000\] there, float32\[4000\] here",
        ),
        (TREE | {"z": np.zeros(3, np.float32)}, r"tree/z is missing there, float32\[3\] here"),
        ({"a": TREE["a"]}, r"tree/b/c is float32\[3, 4\] there, missing here"),
        (
            {"d": [np.zeros(1)] * 3},
            r"tree/a .*; tree/b/c .*; tree/d/0 is missing there, float64\[1\] here, and 2 more",
        ),
    ],
    ids=["another shape", "a missing array", "an unknown array", "nothing in common"],
)
def test_foreign_checkpoints_are_refused(saved, foreign, difference):
    """The first tensors that differ are named."""
    with pytest.raises(
        UserError,
        match=rf"no checkpoint in .* can be used .checkpoint 4: it is of another model: "
        rf"{difference}",
    ) as error:
        Checkpoints(saved, keep=3).restore({"tree": abstract(foreign)})
    assert "\n" not in str(error.value)


def test_a_checkpoint_of_a_deeper_model_is_named(latent_run, tmp_path):
    """Through a real state: attributes, tuples and named tuples of the optimizer have the same
    names on both sides."""
    workdir, _ = latent_run
    mesh = parallel.make_mesh()
    checkpoints = Checkpoints(workdir / "checkpoints")
    assert (
        checkpoints._differences(6, items_of(abstract_state(build(small_latent_config()), mesh)))
        == ""
    )
    with pytest.raises(
        UserError,
        match=r"state/opt_state/0/mu/blocks/attention/.* is float32\[2, .* there, float32\[3, .* "
        r"here",
    ):
        restore_state(checkpoints, abstract_state(build(small_latent_config(model__depth=3)), mesh))


def test_renamed_checkpoint_is_refused(saved):
    (saved / "4").rename(saved / "9")
    assert Checkpoints(saved, keep=3).restore({"tree": abstract()})[0] == 3


def test_no_checkpoint(tmp_path):
    assert Checkpoints(tmp_path / "nothing").restore({"tree": abstract()}) is None
    assert not (tmp_path / "nothing").exists()


def test_training_and_sampling_go_on_from_the_last_good_checkpoint(run, tmp_path, caplog):
    source, state = run
    workdir = tmp_path / "run"
    shutil.copytree(source, workdir)
    truncate(*data_files(workdir / "checkpoints" / "6" / "ema"))
    with caplog.at_level("WARNING", logger="diffit_jax"):
        sample(workdir, seeds=[0])
    assert "checkpoint 4 is used instead" in caplog.text
    assert (workdir / "checkpoints" / "6").exists()  # sampling touches nothing
    again = train(small_config(), workdir=workdir)
    for ours, theirs in zip(jax.tree.leaves(again), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert (workdir / "checkpoints_damaged" / "6").exists() and (
        workdir / "checkpoints" / "6"
    ).exists()


# --- Good ones and bad ones


def save_all(folder, keep, metadata):
    """Checkpoints 1, 2, 3 … with such facts, one after the other."""
    checkpoints = Checkpoints(folder, keep=keep)
    for step, (updates, consecutive_skipped, finite) in enumerate(metadata, 1):
        told = {
            "step": step,
            "updates": updates,
            "skipped_in_row": consecutive_skipped,
            "finite": finite,
        }
        checkpoints.save(step, {"tree": {"a": jnp.full(3, step)}}, told)
    checkpoints.wait()
    return checkpoints


GOOD, SKIPPED = (
    [(1, 0, True), (2, 0, True), (3, 0, True)],
    [(3, 1, True), (3, 2, True), (3, 3, True), (3, 4, True)],
)


@pytest.mark.parametrize(
    ("keep", "stay"),
    [(3, [2, 3, 7]), (2, [2, 3, 7]), (1, [2, 3, 7]), (10, [1, 2, 3, 4, 5, 6, 7])],
    ids=lambda value: str(value),
)
def test_bad_checkpoints_do_not_push_out_good_ones(tmp_path, keep, stay):
    """Four in a stretch of skipped batches after three good ones: the last that was followed by a
    finite loss stays too."""
    checkpoints = save_all(tmp_path / "c", keep, GOOD + SKIPPED)
    assert checkpoints.steps() == stay
    assert checkpoints.good_steps()[-1] == 3 and checkpoints.good_steps(updates=3)[-1] == 2
    again = Checkpoints(tmp_path / "c", keep=keep)  # facts come from the files now
    assert again.steps() == stay and again.good_steps(updates=3)[-1] == 2


@pytest.mark.parametrize(
    ("keep", "stay"), [(3, [3, 4, 5]), (2, [4, 5]), (1, [4, 5])], ids=lambda value: str(value)
)
def test_among_good_checkpoints_the_newest_stay(tmp_path, keep, stay):
    assert save_all(tmp_path / "c", keep, [(step, 0, True) for step in range(1, 6)]).steps() == stay


def test_a_checkpoint_that_is_not_finite_is_not_used(tmp_path, caplog):
    checkpoints = save_all(tmp_path / "c", 3, [(1, 0, True), (2, 0, False)])
    wanted = {
        "tree": {
            "a": jax.ShapeDtypeStruct((3,), jnp.full(3, 1).dtype, sharding=abstract()["a"].sharding)
        }
    }
    with caplog.at_level("WARNING", logger="diffit_jax"):
        assert checkpoints.restore(wanted)[0] == 1
    assert "parameters or averages that are not finite: the run had diverged" in caplog.text


def test_a_run_that_blows_up_names_a_checkpoint_that_is_sound(tmp_path, monkeypatch):
    """One update makes the parameters huge, still finite, and checkpoints go on being written."""
    at_45 = lambda _, update: jnp.where(update == 45, 1e30, 1e-3)
    monkeypatch.setattr("diffit_jax.run.optimizer.learning_rate", at_45)
    monkeypatch.setattr("diffit_jax.training.step.learning_rate", at_45)
    config = small_config(training__keep_checkpoints=5)
    config.training.update(total_steps=100, log_steps=10, checkpoint_steps=20)
    pattern = r"had no finite gradient; the parameters have blown up.*go on from checkpoint (\d+)"
    with pytest.raises(UserError, match=pattern) as raised:
        train(config, workdir=tmp_path / "run")
    text = str(raised.value)
    named = int(re.search(pattern, text)[1])
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
    assert (
        named in checkpoints.steps()
        and checkpoints.metadata(named)["finite"]
        and not checkpoints.metadata(named)["skipped_in_row"]
    )
    newer = [step for step in checkpoints.steps() if step > named]
    assert newer and f"first move {', '.join(map(str, newer))} away" in text
    for step in newer:
        shutil.rmtree(tmp_path / "run" / "checkpoints" / str(step))
    samples = np.load(sample(tmp_path / "run", seeds=range(4), output=tmp_path / "s.npz"))["arr_0"]
    assert samples.dtype == np.uint8


def test_checkpoints_on_another_disk_can_be_set_aside(saved, tmp_path):
    """`checkpoints` is a link; renaming across file systems is not possible, moving is."""
    other = (
        tempfile.mkdtemp(dir="/dev/shm") if os.path.isdir("/dev/shm") else str(tmp_path / "other")
    )
    shutil.copytree(saved, other, dirs_exist_ok=True)
    shutil.rmtree(saved)
    saved.symlink_to(other)
    Checkpoints(saved, keep=3).set_aside_after(3)
    assert sorted(path.name for path in saved.iterdir()) == ["2", "3"]
    assert (saved.parent / "checkpoints_damaged" / "4" / "tree").exists()
    shutil.rmtree(other, ignore_errors=True)


def test_one_flipped_bit_in_the_data_is_noticed(saved, caplog):
    """Wherever it is: the checkpoint's own data come back, or those of the one before."""
    rng = np.random.default_rng(0)
    files = [path for path in data_files(saved / "4") if path.stat().st_size]
    assert files
    older = 0
    for _ in range(12):
        path = files[rng.integers(len(files))]
        content = path.read_bytes()
        place = int(rng.integers(len(content)))
        damaged = bytearray(content)
        damaged[place] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        step, items = Checkpoints(saved, keep=3).restore({"tree": abstract()})
        np.testing.assert_array_equal(items["tree"]["a"], TREE["a"] + step)
        np.testing.assert_array_equal(items["tree"]["b"]["c"], TREE["b"]["c"] + step)
        older += step == 3
        path.write_bytes(content)
    assert older > 2  # some bits belong to nothing that is read


def test_a_flipped_bit_that_the_library_does_not_see_is_named(saved, monkeypatch, caplog):
    """By the array's name, with the last good checkpoint in its place."""
    restore = ocp.CheckpointManager.restore

    def flipped(self, step, **more):
        found = restore(self, step, **more)
        if step == 4 and "tree" in found:
            array = np.array(found["tree"]["a"])
            array.view(np.uint32)[1234] ^= 1 << 22
            tree = found["tree"] | {"a": jnp.asarray(array)}
            return {"tree": tree, "facts": found["facts"]}
        return found

    monkeypatch.setattr(ocp.CheckpointManager, "restore", flipped)
    step, _ = Checkpoints(saved, keep=3).restore({"tree": abstract()})
    assert step == 3 and "tree/a came back with other bits than were saved" in caplog.text


def test_a_checkpoint_without_sums_is_read_with_a_line(saved, caplog):
    """Of an earlier version."""
    caplog.set_level("INFO", logger="diffit_jax")
    facts = next(path for path in (saved / "4" / "facts").rglob("*") if path.name == "metadata")
    held = json.loads(facts.read_text())
    assert held.pop("sums")["tree/b/c"][0] == "float32"
    facts.write_text(json.dumps(held))
    assert Checkpoints(saved, keep=3).restore({"tree": abstract()})[0] == 4
    assert "checkpoint 4 is of an earlier version, without sums" in caplog.text


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32", "int8", "bool"])
def test_sums_of_bits_are_what_numpy_says(dtype):
    """On one device and on two; of arrays of no axes and of several."""
    rng = np.random.default_rng(0)
    for shape in ((), (7,), (3, 8, 4), (6, 50, 1024), (2**20 + 1,)):
        array = (rng.normal(size=shape) * 50).astype(jnp.dtype(dtype))
        unsigned = {1: np.uint8, 2: np.uint16, 4: np.uint32}[array.dtype.itemsize]
        bits = np.ravel(array).view(unsigned).astype(object)
        weights = 2 * np.arange(bits.size, dtype=object) + 1
        expected = [dtype, int(bits.sum()) % 2**32, int((bits * weights).sum()) % 2**32]
        assert checkpoint.sums_of({"x": jnp.asarray(array)}) == {"x": expected}
        axis = next((n for n, size in enumerate(shape) if size % 2 == 0), None)
        if axis is not None:
            spec = jax.sharding.PartitionSpec(*[None] * axis, "data")
            mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",))
            there = jax.device_put(array, jax.sharding.NamedSharding(mesh, spec))
            assert checkpoint.sums_of({"x": there}) == {"x": expected}
