"""Named data sets as random-access sources: `len(source)` examples, any of which `source.read`
returns."""

import dataclasses
import logging
import math
import os
from typing import Any, Protocol

import numpy as np
from absl import logging as absl_logging
from etils import epath

from diffit_jax.errors import UserError
from diffit_jax.runtime import files, lock

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
        """(n,) ints in [0, len) → a batch: `label` (n,) int32 in [0, num_classes), and one of two.

        `image`: (n, H, W, C) uint8 in [0, 255]; `latent`: (n, H, W, C) float32, scaled as the model
          takes it.
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
    """Which data are to be opened, and what the model expects of them.

    Attributes:
      split: "train" or "test".
      data_dir: where prepared data sets live, "" for the default.
      shape: (H, W, C) of an example; None: any.
      num_classes: number of labels, 0 if the model uses none; None: any.
      example: what examples are, "image" or "latent".
    """

    split: str
    data_dir: str = ""
    shape: tuple[int, int, int] | None = None
    num_classes: int | None = None
    example: str = "image"


def open_dataset(
    name: str,
    split: str,
    data_dir: str = "",
    image_shape: tuple[int, int, int] | None = None,
    num_classes: int | None = None,
    example: str = "image",
) -> Source:
    """Opens a data set by name, preparing it on first use.

    Args:
      name: of the data set, in `DATASETS`.
      split: `train` or `test`.
      data_dir: where prepared data sets live, local or `gs://`; "" is tensorflow-datasets' default,
        `~/tensorflow_datasets`.
      image_shape: (H, W, C) that the model expects; None: any. `synthetic` has what is asked for.
      num_classes: number of labels that the model expects; 0 if it uses none; None: any.
      example: what the model expects, "image" or "latent"; `synthetic` then makes such.

    Raises:
      UserError: unknown name or split, images or labels that the model does not expect, a data_dir
        that cannot be written.
    """
    if data_dir:
        data_dir = str(files.resolve(data_dir, "data.data_dir"))
    if split not in ("train", "test"):
        raise UserError(f"data split {split!r} is unknown: use train or test")
    if name not in DATASETS:
        *others, last = DATASETS
        raise UserError(f"data set {name!r} is unknown: use {', '.join(others)} or {last}")
    source = DATASETS[name](Wanted(split, data_dir, image_shape, num_classes, example))
    if image_shape not in (None, source.image_shape):
        raise UserError(
            f"data set {name} has images of {source.image_shape}, the model expects {image_shape}: "
            "change the model's image_size and image_channels (latent_diffit: input_size and "
            "input_channels), or data.name"
        )
    if num_classes not in (None, 0, source.num_classes):
        raise UserError(
            f"data set {name} has {source.num_classes} classes, the model {num_classes}: change "
            "model.num_classes"
        )
    return source


def _shape_and_classes(name: str, wanted: Wanted) -> tuple[tuple[int, int, int], int]:
    if wanted.shape is None or wanted.num_classes is None:
        raise UserError(f"data set {name} has no images of its own: use digits")
    return wanted.shape, wanted.num_classes


def _open_synthetic(wanted: Wanted) -> Source:
    shape, num_classes = _shape_and_classes("synthetic", wanted)
    return SyntheticSource(shape, num_classes, latents=wanted.example == "latent")


def _open_imagenet_latents(wanted: Wanted) -> Source:
    shape, _ = _shape_and_classes("imagenet_latents", wanted)
    place = epath.Path(wanted.data_dir or "~/tensorflow_datasets").expanduser()
    folder = place / f"imagenet_latents_{'x'.join(map(str, shape))}"
    raise UserError(
        f"data set imagenet_latents misses {folder}/manifest.json and "
        f"{folder}/{wanted.split}-*.array_record, which cannot be encoded yet: "
        "use --config.data.name=synthetic meanwhile"
    )


def _open_digits(wanted: Wanted) -> Source:
    """The digits, prepared by tensorflow-datasets on first use; where that does not import, made in
    memory in the same order."""
    split, data_dir = wanted.split, wanted.data_dir
    if not data_dir and not os.environ.get("TFDS_DATA_DIR") and not files.home():
        raise UserError(
            "there is no home directory to keep prepared data sets in: set data.data_dir, or the "
            "variable HOME"
        )
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
        reason = " ".join(str(error).split())[:120]
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


def _damaged(place: epath.PathLike, error: Exception) -> UserError:
    reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:160]
    return UserError(
        f"data set digits in {place} is damaged ({reason}): delete it to have it prepared anew"
    )


DATASETS = {
    "digits": _open_digits,
    "synthetic": _open_synthetic,
    "imagenet_latents": _open_imagenet_latents,
}
