"""Named data sets as random-access sources, and endless shuffled batches of them."""

import dataclasses
import functools
import logging
import os
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import grain
import numpy as np
from etils import epath

from diffit_jax.data import records
from diffit_jax.data.labels import CLASS_SAMPLING, are_numbers
from diffit_jax.data.records import ArraySpec
from diffit_jax.errors import UserError
from diffit_jax.runtime import files, hub

log = logging.getLogger(__name__)


class Source(Protocol):
    """A finite data set.

    Attributes:
      image_shape: (H, W, C) of every image or latent.
      num_classes: number of labels.
    """

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of an example."""
        ...

    @property
    def num_classes(self) -> int:
        """Number of labels; 0: none."""
        ...

    def __len__(self) -> int: ...

    def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Read examples by number: (n,) ints in [0, len) → arrays by name.

        `label` (n,) int32 in [0, num_classes), at least one of the three below, and whatever else
        a record has.

        `image`: (n, H, W, C) uint8 in [0, 255]; `latent`: (n, H, W, C) float32, scaled for the
          model;
        `moments`: (n, orientations, H, W, 2C) float16 or float32, mean and log variance of latents,
        unscaled.
        """
        ...


@dataclasses.dataclass(frozen=True)
class ArraySource:
    """A data set in memory.

    Attributes:
      images: (n, H, W, C) uint8.
      labels: (n,) int32.
      num_classes: number of labels.
    """

    images: np.ndarray
    labels: np.ndarray
    num_classes: int

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of an example."""
        return self.images.shape[1:]

    def __len__(self) -> int:
        return len(self.images)

    def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Read images (n, H, W, C) and labels (n,) by number."""
        return {"image": self.images[indices], "label": self.labels[indices]}


@dataclasses.dataclass(frozen=True)
class SyntheticSource:
    """Random examples of any shape, for benchmarks and smoke tests.

    Example i is a function of i alone; nothing is stored.

    Attributes:
      latents: whether examples are normally distributed latents instead of uniform images.
      arrays: what else they have.
    """

    image_shape: tuple[int, int, int]
    num_classes: int
    latents: bool = False
    num_examples: int = 1 << 20
    arrays: Mapping[str, ArraySpec] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return self.num_examples

    def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Make images or latents (n, H, W, C) and labels (n,) by number, and further arrays."""
        labels = (np.asarray(indices) % max(self.num_classes, 1)).astype(np.int32)
        own = ArraySpec(self.image_shape, "float32" if self.latents else "uint8")
        name = "latent" if self.latents else records.IMAGE
        further = {each: _random(spec, indices) for each, spec in self.arrays.items()}
        return {**further, name: _random(own, indices), "label": labels}


def _random(spec: ArraySpec, indices: np.ndarray) -> np.ndarray:
    """Return an array of each number: normal, or uniform bytes."""
    if spec.dtype != "uint8":
        streams = (np.random.Generator(np.random.Philox(key=int(index))) for index in indices)
        drawn = [stream.standard_normal(spec.shape, np.float32) for stream in streams]
        return np.stack(drawn).astype(spec.dtype)
    words = -(-spec.size // 8)
    raw = (np.random.Philox(key=int(index)).random_raw(words) for index in indices)
    drawn = [np.frombuffer(each.tobytes(), np.uint8)[: spec.size] for each in raw]
    return np.stack(drawn).reshape(-1, *spec.shape)


@dataclasses.dataclass(frozen=True)
class DataSpec:
    """What an experiment expects of its data; None: anything.

    Attributes:
      shape: (H, W, C) of an example.
      num_classes: number of labels, 0 if the model uses none.
      example: what examples are, "image" or "latent"; `synthetic` then makes such.
      latent_mean, latent_scale: of latents, see `sections.Data`.
      arrays: what else a record needs, by name; of an image the size may differ.
      encoder: of features: `network` and `positions`, see `Manifest.features`.
    """

    shape: tuple[int, int, int] | None = None
    num_classes: int | None = None
    example: str | None = None
    latent_mean: Sequence[float] | None = None
    latent_scale: Sequence[float] | None = None
    arrays: Mapping[str, ArraySpec] = dataclasses.field(default_factory=dict)
    encoder: Mapping[str, str] = dataclasses.field(default_factory=dict)


def data_folder(name: str, data_dir: epath.PathLike = "") -> epath.Path:
    """Return the directory of a prepared data set.

    Args:
      name: of it.
      data_dir: where all do, local or `gs://`; "" is tensorflow-datasets' default, the variable
        TFDS_DATA_DIR or `~/tensorflow_datasets`.

    Raises:
      UserError: an impossible name, or there is no home directory.
    """
    if not re.fullmatch(r"[\w.+-]+", name) or name.startswith(".") or name in DATASETS:
        raise UserError(
            f"data set name {name!r} cannot be: use letters, digits, _, - and ., and not "
            f"{' or '.join(DATASETS)}"
        )
    default = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    if not data_dir and default.startswith("~") and not files.home():
        raise _no_home()
    if hub.is_address(data_dir):  # of the files there, the named ones
        return hub.local(f"{os.fspath(data_dir).rstrip('/')}/{name}", "data.data_dir")
    return files.resolve(data_dir or default, "data.data_dir") / name


def folder_to_write(name: str, data_dir: epath.PathLike = "") -> epath.Path:
    """Return `data_folder` of a data set that is to be made: not on the hub."""
    return data_folder(name, files.resolve(data_dir, "data_dir") if data_dir else "")


def open_dataset(
    name: str, split: str, data_dir: epath.PathLike = "", spec: DataSpec = DataSpec()
) -> Source:
    """Open a data set by name.

    Args:
      name: in `DATASETS` (`digits` is prepared on first use), or a name that `prepare` or `encode`
        has written.
      split: `train` or `test`.
      data_dir: see `data_folder`.
      spec: what is expected of it.

    Raises:
      UserError: unknown name or split, unexpected examples or labels, a data_dir that cannot be
        written.
    """
    if split not in ("train", "test"):
        raise UserError(f"data split {split!r} is unknown: use train or test")
    if name in DATASETS:
        place = str(files.resolve(data_dir, "data.data_dir")) if data_dir else ""
        source = DATASETS[name](split, place, spec)
    else:
        source = _open_prepared(name, split, data_dir, spec)
    _check_arrays(name, source, spec)
    if spec.shape not in (None, source.image_shape):
        raise UserError(
            f"data set {name} has images of {source.image_shape}, the model expects "
            f"{spec.shape}: change the model's image_size and image_channels (latent_diffit: "
            "input_size and input_channels), or data.name"
        )
    if spec.num_classes not in (None, 0, source.num_classes):
        raise UserError(
            f"data set {name} has {source.num_classes} classes, the model {spec.num_classes}: "
            "change model.num_classes"
        )
    return source


def _open_prepared(
    name: str, split: str, data_dir: epath.PathLike, spec: DataSpec
) -> records.RecordSource:
    """Open data that `prepare` or `encode` wrote, and compare it with the expected `spec`."""
    folder = data_folder(name, data_dir)
    if not (folder.exists() and any(folder.glob("*.manifest.json"))):
        raise UserError(
            f"data set {name!r} is unknown: prepare or encode it first (diffit prepare, "
            f"diffit encode), for there is no {folder}/{records.manifest_name(split)}; or use "
            "--config.data.name=synthetic (random data) or digits"
        )
    source = records.open_records(folder, split)
    manifest = source.manifest
    if split != "train" and records.has_split(folder, "train"):
        _check_same_classes(name, split, manifest, records.read_manifest(folder, "train"))
    kind = "latent" if records.MOMENTS in manifest.arrays else "image"
    if kind == "latent" and spec.example == kind:
        # What stands beside latents is large: it is passed over where nobody asks for it.
        beside = {records.IMAGE, *([records.FEATURES] if manifest.features else [])}
        source.passed_over = frozenset(beside - spec.arrays.keys())
    if spec.example not in (None, kind):
        named = {"image": "images: encode them", "latent": "latents: name images"}[kind]
        other = {"image": 'data.autoencoder=""', "latent": "data.autoencoder to their name"}[kind]
        raise UserError(f"data set {name} holds {named}, or set {other}")
    for key in ("latent_mean", "latent_scale"):
        theirs, ours = manifest.autoencoder.get(key), getattr(spec, key)
        if theirs is not None and ours is not None and not _same(theirs, ours):
            raise UserError(
                f"data set {name} was encoded with {key} {_listed(theirs)}, the config has "
                f"{_listed(ours)}: set data.{key} to its manifest's"
            )
    return source


def _check_arrays(name: str, source: Source, spec: DataSpec) -> None:
    """Raise `UserError` if records lack what a loss on representations is computed of."""
    if isinstance(source, SyntheticSource):
        return
    manifest = getattr(source, "manifest", None)
    held = manifest.arrays if manifest else {records.IMAGE: ArraySpec(source.image_shape, "uint8")}
    for wanted, needed in spec.arrays.items():
        if wanted not in held:
            other = "" if wanted == records.IMAGE else ", or representation.source to image"
            raise UserError(
                f"data set {name} has no {wanted} in its records, which representation.kind needs: "
                f"encode it with --keep {wanted}, or set representation.kind to none{other}"
            )
        made = manifest.features if manifest else {}
        for key, asked in spec.encoder.items():
            if made.get(key, asked) != asked:
                what = "encoder" if key == "network" else key
                raise UserError(
                    f"data set {name} has features of {key} {made[key]}, and config key "
                    f"representation.{what} is {asked}: encode it with that, or change the config"
                )
        theirs, ours = held[wanted].shape[1:], needed.shape[1:]
        if wanted == records.FEATURES and theirs != ours:
            raise UserError(
                f"data set {name} has features of 1 + {theirs[0] - 1} tokens of {theirs[1]} "
                f"channels, the network and representation.encoder need 1 + {ours[0] - 1} of "
                f"{ours[1]}: encode it with that encoder, or change the config"
            )


def _check_same_classes(
    name: str, split: str, ours: records.Manifest, train: records.Manifest
) -> None:
    """Raise `UserError` if a split's labels stand for other classes than those trained on."""
    if are_numbers(ours.classes) or are_numbers(train.classes):  # or there are none
        return
    for label, (one, other) in enumerate(zip(ours.classes, train.classes, strict=False)):
        if one != other:
            raise UserError(
                f"data set {name} has class {label} {one!r} in split {split}, and {other!r} in "
                f"split train: delete {split} and prepare it again, so that it is numbered as train"
            )


def _same(one: Sequence[float], other: Sequence[float]) -> bool:
    shape = (max(len(one), len(other)),)
    return all(len(each) in (1, *shape) for each in (one, other)) and np.allclose(one, other)


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in dict.fromkeys(values))


def _open_synthetic(split: str, data_dir: str, spec: DataSpec) -> Source:
    if spec.shape is None or spec.num_classes is None:
        raise UserError("data set synthetic has no images of its own: use digits")
    latents = spec.example == "latent"
    return SyntheticSource(spec.shape, spec.num_classes, latents=latents, arrays=spec.arrays)


def _open_digits(split: str, data_dir: str, spec: DataSpec) -> Source:
    if not data_dir and not os.environ.get("TFDS_DATA_DIR") and not files.home():
        raise _no_home()
    from diffit_jax.data import digits

    return ArraySource(*digits.read(split, data_dir), digits.NUM_CLASSES)


def _no_home() -> UserError:
    return UserError(
        "there is no home directory to keep prepared data sets in: set data.data_dir, or the "
        "variable HOME"
    )


DATASETS = {"digits": _open_digits, "synthetic": _open_synthetic}


class ShuffledBatches:
    """The batches of a run as a random-access sequence for Grain.

    Batch k is a function of (source, batch_size, seed, k) alone. Examples have positions in one
    endless order, epoch after epoch, each shuffled anew; batch k holds the positions from
    k · batch_size on, so a batch may hold the end of one epoch and the start of the next. Grain
    sees one element per batch: its work per element would cost a tenth of a small model's step if
    it saw the examples.
    """

    def __init__(
        self,
        source: Source,
        batch_size: int,
        seed: int,
        rows: np.ndarray | None = None,
        labels: "ClassSampling | None" = None,
    ):
        """Read positions `rows` (n,) of each batch, in this order; None: all of it.

        Other processes read the others. `labels`: if not every example comes once in an epoch.
        """
        self._source, self._batch_size, self._seed = source, batch_size, seed
        count = len(source)
        self._order_of = functools.partial(_order, count) if labels is None else labels.order
        self._rows = np.arange(batch_size) if rows is None else np.asarray(rows, np.int64)
        if self._rows.size and (self._rows.min() < 0 or self._rows.max() >= batch_size):
            raise ValueError(
                f"rows {self._rows.min()} to {self._rows.max()} are not in a batch of {batch_size}"
            )

    def __len__(self) -> int:
        return 1 << 48  # updates; no run ends here

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        epochs, offsets = np.divmod(step * self._batch_size + self._rows, len(self._source))
        indices = np.empty_like(offsets)
        for epoch in np.unique(epochs).tolist():
            with _SHUFFLING:
                order = self._order_of(self._seed, epoch)
            indices[epochs == epoch] = order[offsets[epochs == epoch]]
        return self._source.read(indices)


_SHUFFLING = threading.Lock()  # threads read ahead: one makes the order that all of them need


@functools.lru_cache(maxsize=4)  # at the end of an epoch a stream needs two
def _order(count: int, seed: int, epoch: int) -> np.ndarray:
    """Return the examples' numbers in the order of an epoch, (count,) int."""
    # Ranks of Philox's raw output, which numpy never changes, unlike that of its `permutation`.
    return np.argsort(np.random.Philox(key=[seed, epoch]).random_raw(count), kind="stable")


class ClassSampling:
    """Epochs in which classes come by another rule than as often as they are.

    An epoch has as many examples as the data set. Each class has its share of them, to one, and
    within a class each example comes as often as another, to once. An epoch is a function of
    (labels, seed, epoch) alone.
    """

    def __init__(self, labels: np.ndarray, num_classes: int, power: float):
        """Prepare.

        Args:
          labels: (n,) of all examples.
          num_classes: how many labels there are.
          power: a class comes as often as its number of examples to this power.

        Raises:
          UserError: no labels, or a class without examples.
        """
        if not num_classes or (len(labels) and labels.min() < 0):
            raise UserError(
                "config key data.class_sampling is about classes, and the data have no labels: set "
                "it to natural"
            )
        counts = np.bincount(labels, minlength=num_classes)
        if not counts.all():
            empty = np.flatnonzero(counts == 0)
            raise UserError(
                f"config key data.class_sampling: class {empty[0]} has no examples to draw "
                f"({len(empty)} of {num_classes} classes have none): set it to natural, or give "
                "every class some"
            )
        self._members = np.split(np.argsort(labels, kind="stable"), np.cumsum(counts)[:-1])
        self._ends = np.cumsum(counts**power) * (len(labels) / np.sum(counts**power))
        self._ends[-1] = len(labels)
        self.order = functools.lru_cache(maxsize=4)(self._order)

    def _order(self, seed: int, epoch: int) -> np.ndarray:
        """Return the examples' numbers in the order of an epoch, (n,) int."""
        stream, count = np.random.Philox(key=[seed, epoch]), int(self._ends[-1])
        shift = stream.random_raw() / 2**64  # where shares are rounded up
        ends = np.floor(self._ends + shift).astype(np.int64)
        ends[-1] = count
        chosen = []
        for members, wanted in zip(self._members, np.diff(ends, prepend=0), strict=True):
            whole, rest = divmod(int(wanted), len(members))
            ranks = np.argsort(stream.random_raw(len(members)), kind="stable")
            chosen += [members] * whole + [members[ranks[:rest]]]
        order = np.argsort(stream.random_raw(count), kind="stable")
        return np.concatenate(chosen)[order]


def class_sampling(source: Source, rule: str) -> ClassSampling | None:
    """Return the epochs of a rule in `CLASS_SAMPLING`, for which every label is read.

    Raises:
      UserError: as of `ClassSampling`.
    """
    if rule == "natural":
        return None
    labels = records.read_labels(source) if source.num_classes else np.zeros(0, np.int32)
    return ClassSampling(labels, source.num_classes, CLASS_SAMPLING[rule])


def batches(
    source: Source,
    batch_size: int,
    seed: int,
    first_step: int = 0,
    rows: np.ndarray | None = None,
    *,
    labels: ClassSampling | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Yield the batches of a training run from a given step on, read ahead in threads.

    Resuming needs nothing but the step.

    Args:
      source: the data set.
      batch_size: examples per batch.
      seed: of the shuffle, at least 0.
      first_step: number of the first batch.
      rows: rows of each global batch that this process reads, `parallel.local_batch_indices`;
        None: all of them.
      labels: how often classes come, if not as they are.

    Returns:
      Endless iterator of dicts: `image` (n, H, W, C) uint8, `label` (n,) int32, a row for each of
      `rows`.
    """
    shuffled: Any = ShuffledBatches(source, batch_size, seed, rows, labels)
    dataset = grain.MapDataset.source(shuffled)
    iterator = iter(
        dataset.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4))
    )
    iterator.set_state({"next_index": first_step})
    return iterator
