import itertools
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from sklearn.datasets import load_digits

from diffit_jax.data import pixels
from diffit_jax.data.sources import (
    ArraySource,
    DataSpec,
    ShuffledBatches,
    SyntheticSource,
    batches,
    class_sampling,
    open_dataset,
)
from diffit_jax.errors import UserError

try:  # beside Colab's protobuf it does not import, and digits are made in memory
    import tensorflow_datasets.core  # noqa: F401

    needs_library = pytest.mark.skipif(False, reason="")
except Exception as error:
    needs_library = pytest.mark.skipif(
        True, reason=f"tensorflow-datasets does not import here: {error}"
    )


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    data_dir = str(tmp_path_factory.mktemp("tfds"))
    return {
        split: open_dataset("digits", split, data_dir, DataSpec((8, 8, 1), 10))
        for split in ("train", "test")
    }


def everything(source):
    return source.read(np.arange(len(source)))


def test_digits_are_scikit_learns(digits):
    """Both splits together are the 1,797 scans, each once, with its label; grey levels 0…16 survive
    the way to uint8."""
    ours = [everything(digits[split]) for split in ("train", "test")]
    assert [len(split["label"]) for split in ours] == [1437, 360]
    images = np.concatenate([split["image"] for split in ours])
    assert images.dtype == np.uint8 and images.shape == (1797, 8, 8, 1)
    labels = np.concatenate([split["label"] for split in ours])
    theirs = load_digits()
    record = lambda image, label: (*np.rint(image).astype(int).ravel(), label)
    mine = sorted(
        record(image * (16 / 255), label) for image, label in zip(images, labels, strict=True)
    )
    assert mine == sorted(
        record(image, label) for image, label in zip(theirs.images, theirs.target, strict=True)
    )


def test_digits_splits_have_all_classes(digits):
    counts = np.bincount(everything(digits["test"])["label"], minlength=10)
    assert counts.min() > 20


def test_no_tensorflow(tmp_path):
    """Nothing that trains, samples or scores imports TensorFlow, not even preparing the digits."""
    code = f"""
import sys
from diffit_jax import cli
from diffit_jax.sampling import sampler
from diffit_jax.evaluation import small
from diffit_jax.training import train
from diffit_jax.data.sources import DataSpec, open_dataset
open_dataset("digits", "train", {str(tmp_path)!r}, DataSpec((8, 8, 1), 10))
assert "tensorflow" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def numbered(count):
    return ArraySource(
        np.zeros((count, 1, 1, 1), np.uint8), np.arange(count, dtype=np.int32), count
    )


def test_every_epoch_is_a_new_permutation_without_gaps():
    stream = itertools.islice(batches(numbered(10), 4, seed=3), 10)
    # 40 examples: four epochs.
    labels = np.concatenate([batch["label"] for batch in stream]).reshape(4, 10)
    assert all(sorted(epoch) == list(range(10)) for epoch in labels)
    assert len({tuple(epoch) for epoch in labels}) == 4


def test_batches_are_a_function_of_seed_and_step():
    source = numbered(1000)
    first = [batch["label"] for batch in itertools.islice(batches(source, 8, seed=0), 20)]
    resumed = [
        batch["label"] for batch in itertools.islice(batches(source, 8, seed=0, first_step=13), 7)
    ]
    np.testing.assert_array_equal(first[13:], resumed)
    assert not np.array_equal(
        first, [batch["label"] for batch in itertools.islice(batches(source, 8, seed=1), 20)]
    )
    assert not np.array_equal(first, np.arange(160).reshape(20, 8))


def test_batch_of_a_later_step_needs_no_earlier_one():
    """A run of 10⁹ updates is resumed as quickly as one of ten; a batch larger than the data set
    spans several epochs."""
    batch = ShuffledBatches(numbered(1000), 8, seed=0)[10**9]
    assert batch["label"].shape == (8,) and batch["image"].shape == (8, 1, 1, 1)
    assert np.bincount(ShuffledBatches(numbered(3), 7, seed=0)[0]["label"]).tolist() in (
        [3, 2, 2],
        [2, 3, 2],
        [2, 2, 3],
    )


def test_threads_that_read_ahead_share_one_shuffle(monkeypatch):
    """Of a million examples it takes 0.1 s, and each thread asks for it at once."""
    shuffles, argsort = [], np.argsort

    def slow(*arguments, **named):
        shuffles.append(1)
        time.sleep(0.1)
        return argsort(*arguments, **named)

    monkeypatch.setattr(np, "argsort", slow)
    stream = ShuffledBatches(numbered(500), 8, seed=12)
    with ThreadPoolExecutor(4) as threads:
        read = list(threads.map(lambda step: stream[step]["label"], range(4)))
    assert len(shuffles) == 1 and len(set(np.concatenate(read).tolist())) == 32


def test_order_is_pinned():
    """The order of a seed's first batch must never change, or runs could not be resumed after an
    update of a library."""
    assert ShuffledBatches(numbered(1000), 5, seed=0)[0]["label"].tolist() == [
        998,
        162,
        670,
        664,
        185,
    ]


def test_synthetic_is_a_function_of_the_index():
    source = SyntheticSource((5, 5, 3), 7)
    one, two = source.read(np.array([3, 10, 3])), source.read(np.array([10]))
    assert (
        one["image"].shape == (3, 5, 5, 3)
        and one["image"].dtype == np.uint8
        and one["label"].tolist() == [3, 3, 3]
    )
    np.testing.assert_array_equal(one["image"][0], one["image"][2])
    np.testing.assert_array_equal(one["image"][1], two["image"][0])
    assert one["image"][0].std() > 50


def test_pixels_round_trip_and_range():
    levels = np.arange(256, dtype=np.uint8)
    x = np.asarray(pixels.to_model(levels))
    assert x[0] == -1 and x[255] == 1
    np.testing.assert_array_equal(pixels.to_pixels(x), levels)
    np.testing.assert_array_equal(
        pixels.to_pixels(np.array([-3.0, 3.0, 0.0], np.float32)), [0, 255, 128]
    )


def test_image_grid_places_images_row_by_row():
    images = np.stack([np.full((2, 2, 1), value, np.uint8) for value in (10, 20, 30)])
    grid = pixels.image_grid(images, columns=2, min_side=4)
    assert grid.shape == (9, 9, 1)
    assert (
        grid[0, 0, 0] == 10
        and grid[0, 8, 0] == 20
        and grid[8, 0, 0] == 30
        and grid[8, 8, 0] == 0
        and grid[4, 0, 0] == 0
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("mnist", "train", "", DataSpec((8, 8, 1), 10)),
            "data set 'mnist' is unknown: prepare or encode it first",
        ),
        (
            ("digits", "validation", "", DataSpec((8, 8, 1), 10)),
            "data split 'validation' is unknown",
        ),
        (
            ("digits", "train", "", DataSpec((16, 16, 1), 10)),
            "images of .8, 8, 1., the model expects .16, 16, 1.",
        ),
        (("digits", "train", "", DataSpec((8, 8, 1), 5)), "has 10 classes, the model 5"),
        pytest.param(
            ("digits", "train", "/dev/null/x", DataSpec((8, 8, 1), 10)),
            "data_dir /dev/null/x cannot be written",
            marks=needs_library,
        ),
    ],
)
def test_bad_data_sets(arguments, message):
    with pytest.raises(UserError, match=message):
        open_dataset(*arguments)


# --- Prepared data that is damaged, and a library that does not import


@needs_library
@pytest.mark.parametrize("name", ["dataset_info.json", "features.json"])
@pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"name": "cats"}', "\x00\x01"])
def test_damaged_metadata_is_one_line(tmp_path, name, content):
    open_dataset("digits", "train", str(tmp_path), DataSpec((8, 8, 1), 10))
    (path,) = tmp_path.rglob(name)
    path.write_text(content)
    try:
        source = open_dataset("digits", "train", str(tmp_path), DataSpec((8, 8, 1), 10))
    except UserError as error:
        assert re.search(
            r"data set digits in .*/digits.* is damaged \(.*\): delete it to have it prepared anew",
            str(error),
        ), error
        assert "\n" not in str(error)
    else:  # what was damaged is not needed: all is there
        assert len(source) == 1437


@needs_library
@pytest.mark.parametrize("split", ["train", "test"])
def test_digits_without_tensorflow_datasets_are_the_same_in_the_same_order(
    digits, split, tmp_path, monkeypatch, caplog
):
    """Where it does not import beside the installed protobuf, as on Colab: a run sees the same
    batches."""
    reference = open_dataset("digits", split, str(tmp_path), DataSpec((8, 8, 1), 10))
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with caplog.at_level("INFO", logger="diffit_jax"):
        source = open_dataset("digits", split, str(tmp_path / "elsewhere"), DataSpec((8, 8, 1), 10))
    assert "tensorflow-datasets cannot be imported here" in caplog.text
    np.testing.assert_array_equal(source.images, reference.images)
    np.testing.assert_array_equal(source.labels, reference.labels)
    assert (
        source.images.dtype == np.uint8
        and source.labels.dtype == np.int32
        and source.num_classes == 10
    )


def long_tail(counts):
    labels = np.repeat(np.arange(len(counts)), counts).astype(np.int32)
    labels = np.random.default_rng(0).permutation(labels)
    return ArraySource(np.arange(len(labels), dtype=np.uint8).reshape(-1, 1, 1, 1), labels, 4)


@pytest.mark.parametrize(("rule", "power"), [("square_root", 0.5), ("balanced", 0.0)])
def test_classes_come_as_often_as_the_rule_says(rule, power):
    """To one in an epoch, an example of a class to once; another epoch is another order."""
    counts = np.array([100, 40, 16, 4])
    source = long_tail(counts)
    sampling = class_sampling(source, rule)
    orders = [sampling.order(3, epoch) for epoch in range(6)]
    share = counts**power / np.sum(counts**power) * len(source)
    for order in orders:
        assert len(order) == len(source)
        found = np.bincount(source.labels[order], minlength=4)
        assert np.abs(found - share).max() < 1 + 1e-9
        times = np.bincount(order, minlength=len(source))
        for label in range(4):
            of_class = times[source.labels == label]
            assert of_class.max() - of_class.min() <= 1
    assert len({order.tobytes() for order in orders}) == 6
    mean = np.mean([np.bincount(source.labels[o], minlength=4) for o in orders], axis=0)
    assert np.abs(mean - share).max() < 0.9  # what is left over moves between epochs
    again = class_sampling(source, rule)
    np.testing.assert_array_equal(again.order(3, 4), orders[4])  # of no epoch before it
    assert not np.array_equal(again.order(4, 4), orders[4])
    assert class_sampling(source, "natural") is None


def test_sampled_classes_are_the_same_on_any_hosts_and_when_resumed():
    source = long_tail([50, 9, 5, 3])
    sampling = class_sampling(source, "balanced")
    whole = ShuffledBatches(source, 10, 7, labels=sampling)
    halves = [
        ShuffledBatches(source, 10, 7, rows, class_sampling(source, "balanced"))
        for rows in (np.array([1, 0, 9, 4]), np.array([2, 3, 5, 6, 7, 8]))
    ]
    stream = batches(source, 10, 7, first_step=5, labels=sampling)
    for step in range(5, 20):  # over the ends of epochs
        batch = whole[step]["image"]
        np.testing.assert_array_equal(next(stream)["image"], batch)
        np.testing.assert_array_equal(halves[0][step]["image"], batch[[1, 0, 9, 4]])
        np.testing.assert_array_equal(halves[1][step]["image"], batch[[2, 3, 5, 6, 7, 8]])


def test_classes_that_cannot_be_sampled():
    with pytest.raises(UserError, match="class 1 has no examples to draw"):
        class_sampling(long_tail([5, 0, 3, 3]), "balanced")
    unlabelled = ArraySource(np.zeros((3, 1, 1, 1), np.uint8), np.zeros(3, np.int32), 0)
    with pytest.raises(UserError, match="the data have no labels"):
        class_sampling(unlabelled, "square_root")


def test_the_order_of_sampled_classes_is_pinned():
    order = class_sampling(long_tail([50, 9, 5, 3]), "balanced").order(0, 0)
    assert order[:6].tolist() == [49, 19, 62, 17, 6, 43]
