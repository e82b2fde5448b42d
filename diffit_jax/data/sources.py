"""Named data sets as random-access sources: `len(source)` examples, any of which `source.read`
returns."""

import dataclasses
import logging
import math
import os
import re
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from absl import logging as absl_logging
from etils import epath

from diffit_jax.data import records
from diffit_jax.errors import UserError, one_line
from diffit_jax.runtime import files, hub, lock

log = logging.getLogger(__name__)


class Source(Protocol):
    """A finite data set.

    Attributes:
      image_shape: (H, W, C) of every image or latent.
      num_classes: number of labels.
    """

    @property
    def image_shape(self) -> tuple[int, int, int]: ...

    @property
    def num_classes(self) -> int: ...

    def __len__(self) -> int: ...

    def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """(n,) ints in [0, len) → a batch: `label` (n,) int32 in [0, num_classes), one of three,
        and whatever else a record has.

        `image`: (n, H, W, C) uint8 in [0, 255]; `latent`: (n, H, W, C) float32, scaled as the model
          takes it; `moments`: (n, orientations, H, W, 2C) float16 or float32, mean and log variance
          of latents, unscaled.
        """
        ...


@dataclasses.dataclass(frozen=True)
class ArraySource:
    """A data set that lies in memory.

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
        return self.images.shape[1:]

    def __len__(self) -> int:
        return len(self.images)

    def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        return {"image": self.images[indices], "label": self.labels[indices]}


@dataclasses.dataclass(frozen=True)
class SyntheticSource:
    """Random examples of any shape, for benchmarks and smoke tests. Example i is a function of i
    alone; nothing is stored.

    Attributes:
      latents: whether examples are normally distributed latents instead of uniform images.
    """

    image_shape: tuple[int, int, int]
    num_classes: int
    latents: bool = False
    num_examples: int = 1 << 20

    def __len__(self) -> int:
        return self.num_examples

    def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        labels = (np.asarray(indices) % max(self.num_classes, 1)).astype(np.int32)
        if self.latents:
            streams = (np.random.Generator(np.random.Philox(key=int(index))) for index in indices)
            return {
                "latent": np.stack(
                    [stream.standard_normal(self.image_shape, np.float32) for stream in streams]
                ),
                "label": labels,
            }
        size = math.prod(self.image_shape)
        noise = [
            np.frombuffer(
                np.random.Philox(key=int(index)).random_raw(-(-size // 8)).tobytes(), np.uint8
            )[:size]
            for index in indices
        ]
        return {"image": np.stack(noise).reshape(-1, *self.image_shape), "label": labels}


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What an experiment expects of its data; None: anything.

    Attributes:
      shape: (H, W, C) of an example.
      num_classes: number of labels, 0 if the model uses none.
      example: what examples are, "image" or "latent"; `synthetic` then makes such.
      latent_mean, latent_scale: of latents, see `sections.Data`.
    """

    shape: tuple[int, int, int] | None = None
    num_classes: int | None = None
    example: str | None = None
    latent_mean: Sequence[float] | None = None
    latent_scale: Sequence[float] | None = None


def data_folder(name: str, data_dir: epath.PathLike = "") -> epath.Path:
    """Where a prepared data set lives.

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
    if hub.is_address(data_dir):  # of all that lies there, what is named
        return hub.local(f"{os.fspath(data_dir).rstrip('/')}/{name}", "data.data_dir")
    return files.resolve(data_dir or default, "data.data_dir") / name


def folder_to_write(name: str, data_dir: epath.PathLike = "") -> epath.Path:
    """`data_folder` of a data set that is to be made: not on the hub."""
    return data_folder(name, files.resolve(data_dir, "data_dir") if data_dir else "")


def open_dataset(
    name: str, split: str, data_dir: epath.PathLike = "", wanted: Wanted = Wanted()
) -> Source:
    """Opens a data set by name.

    Args:
      name: in `DATASETS` (`digits` is prepared on first use), or what `prepare` or `encode` has
        written by this name.
      split: `train` or `test`.
      data_dir: see `data_folder`.
      wanted: what is expected of it.

    Raises:
      UserError: unknown name or split, examples or labels that are not expected, a data_dir that
        cannot be written.
    """
    if split not in ("train", "test"):
        raise UserError(f"data split {split!r} is unknown: use train or test")
    if name in DATASETS:
        place = str(files.resolve(data_dir, "data.data_dir")) if data_dir else ""
        source = DATASETS[name](split, place, wanted)
    else:
        source = _open_prepared(name, split, data_dir, wanted)
    if wanted.shape not in (None, source.image_shape):
        raise UserError(
            f"data set {name} has images of {source.image_shape}, the model expects "
            f"{wanted.shape}: change the model's image_size and image_channels (latent_diffit: "
            "input_size and input_channels), or data.name"
        )
    if wanted.num_classes not in (None, 0, source.num_classes):
        raise UserError(
            f"data set {name} has {source.num_classes} classes, the model {wanted.num_classes}: "
            "change model.num_classes"
        )
    return source


def _open_prepared(
    name: str, split: str, data_dir: epath.PathLike, wanted: Wanted
) -> records.RecordSource:
    """What `prepare` or `encode` wrote; checked against what is expected."""
    folder = data_folder(name, data_dir)
    if not (folder.exists() and any(folder.glob("*.manifest.json"))):
        raise UserError(
            f"data set {name!r} is unknown: prepare or encode it first (launch/prepare.py, "
            f"launch/encode.py), for there is no {folder}/{records.manifest_name(split)}; or use "
            "--config.data.name=synthetic (random data) or digits"
        )
    source = records.open_records(folder, split)
    manifest = source.manifest
    kind = "latent" if records.MOMENTS in manifest.arrays else "image"
    if wanted.example not in (None, kind):
        named = {"image": "pictures: encode them", "latent": "latents: name pictures"}[kind]
        other = {"image": 'data.autoencoder=""', "latent": "data.autoencoder to their name"}[kind]
        raise UserError(f"data set {name} holds {named}, or set {other}")
    for key in ("latent_mean", "latent_scale"):
        theirs, ours = manifest.autoencoder.get(key), getattr(wanted, key)
        if theirs is not None and ours is not None and not _same(theirs, ours):
            raise UserError(
                f"data set {name} was encoded with {key} {_listed(theirs)}, the config has "
                f"{_listed(ours)}: set data.{key} to its manifest's"
            )
    return source


def _same(one: Sequence[float], other: Sequence[float]) -> bool:
    shape = (max(len(one), len(other)),)
    return all(len(each) in (1, *shape) for each in (one, other)) and np.allclose(one, other)


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in dict.fromkeys(values))


def _open_synthetic(split: str, data_dir: str, wanted: Wanted) -> Source:
    if wanted.shape is None or wanted.num_classes is None:
        raise UserError("data set synthetic has no images of its own: use digits")
    return SyntheticSource(wanted.shape, wanted.num_classes, latents=wanted.example == "latent")


def _open_digits(split: str, data_dir: str, wanted: Wanted) -> Source:
    """The digits, prepared by tensorflow-datasets on first use; where that does not import, made in
    memory in the same order."""
    if not data_dir and not os.environ.get("TFDS_DATA_DIR") and not files.home():
        raise _no_home()
    from diffit_jax.data import digits

    loudness = absl_logging.get_verbosity()
    absl_logging.set_verbosity(absl_logging.FATAL)  # it prints a page before it fails
    try:
        import tensorflow_datasets as tfds  # takes a second to import

        from diffit_jax.data.digits_builder import Digits

        tfds.disable_progress_bar()
    except (
        Exception
    ) as error:  # its generated code and the installed protobuf do not fit together, say
        reason = one_line(error, 120)
        log.info(
            "data set digits is made in memory: tensorflow-datasets cannot be imported here (%s)",
            reason,
        )
        return ArraySource(*digits.prepared(split), digits.NUM_CLASSES)
    finally:
        absl_logging.set_verbosity(loudness)

    place = data_dir or "~/tensorflow_datasets"
    try:
        builder = Digits(data_dir=data_dir or None, file_format="array_record")
        if not builder.data_path.exists():
            files.make_directory(builder.data_path.parents[1], "data_dir")
            folder = files.make_directory(builder.data_path.parent, "data_dir")
            with lock.owned(folder, "the preparation of data set digits in", wait=True):
                builder.download_and_prepare()
    except UserError:
        raise
    except OSError as error:
        raise UserError(
            f"data_dir {place} cannot be written ({error}): set data.data_dir"
        ) from error
    except (
        Exception
    ) as error:  # whatever the library says of damaged metadata: JSON, protobuf, a missing field
        raise _damaged(f"{epath.Path(place).expanduser()}/digits", error) from error
    # Small enough to keep in memory; decoding each example anew would take longer than a training
    # step.
    try:
        # A decorator hides its arguments.
        examples = list(builder.as_data_source(split))  # pyright: ignore[reportCallIssue]
        images = np.stack([example["image"] for example in examples])
        labels = np.array([example["label"] for example in examples], np.int32)
        features: Any = builder.info.features
        classes = features["label"].num_classes
    except Exception as error:
        raise _damaged(builder.data_path, error) from error
    if images.shape != (digits.COUNTS[split], *digits.SHAPE) or images.dtype != np.uint8:
        raise _damaged(builder.data_path, ValueError(f"it holds {images.shape} of {images.dtype}"))
    return ArraySource(images, labels, classes)


def _no_home() -> UserError:
    return UserError(
        "there is no home directory to keep prepared data sets in: set data.data_dir, or the "
        "variable HOME"
    )


def _damaged(place: epath.PathLike, error: Exception) -> UserError:
    reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:160]
    return UserError(
        f"data set digits in {place} is damaged ({reason}): delete it to have it prepared anew"
    )


DATASETS = {"digits": _open_digits, "synthetic": _open_synthetic}
