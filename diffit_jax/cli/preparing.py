"""Flags of the commands that make data sets: what of, and of which size."""

from typing import TYPE_CHECKING, Any

from absl import flags

from diffit_jax import cli

if TYPE_CHECKING:
    from diffit_jax.data.decoding import Framing


class SourceFlags:
    """The flags that name a source and the data set that it becomes."""

    def __init__(self):
        self._source = cli.define_path(
            "source",
            "Folder, zip, tar, Parquet file or CIFAR-10 archive of pictures, a pattern with *, a "
            "folder of tensorflow-datasets, or hf://datasets/owner/name/path.",
            to_read=True,
        )
        self._name = flags.DEFINE_string(
            "name", None, "Of the data set: what config.data.name says."
        )
        self._data_dir = cli.define_path(
            "data_dir", "Where data sets live; default: ~/tensorflow_datasets."
        )
        self._split = flags.DEFINE_enum(
            "split", "train", ["train", "test"], "Which of the data set's splits it becomes."
        )
        self._crop = flags.DEFINE_enum(
            "crop",
            "none",
            ["none", "center", "adm", "resize"],
            "How pictures come to one size: none (they have it), center (the central square, "
            "Lanczos), adm (ADM's centre crop, for ImageNet), resize (Lanczos, not cropped).",
        )
        self._size = flags.DEFINE_integer("size", 0, "Side in pixels, with --crop.", lower_bound=0)
        self._channels = flags.DEFINE_enum("channels", "3", ["1", "3"], "3: colours; 1: grey.")
        self._upright = flags.DEFINE_bool(
            "upright",
            True,
            "Turn pictures as EXIF says; --noupright leaves them as stored, as ADM and DiT do.",
        )
        self._unlabelled = flags.DEFINE_bool("unlabelled", False, "Leave labels out.")
        self._workers = flags.DEFINE_integer(
            "workers",
            None,
            "Processes that decode pictures; default: one for each core; 0: the command's own.",
            lower_bound=0,
        )
        flags.mark_flag_as_required("source")
        flags.mark_flag_as_required("name")

    @property
    def value(self) -> dict[str, Any]:
        """As arguments of the verbs."""
        return {
            "source": self._source.value,
            "name": self._name.value,
            "data_dir": self._data_dir.value or "",
            "split": self._split.value,
            "framing": self._framing(),
            "unlabelled": self._unlabelled.value,
            "workers": self._workers.value,
        }

    def _framing(self) -> "Framing":
        from diffit_jax.data.decoding import Framing

        channels = int(self._channels.value)
        return Framing(self._crop.value, self._size.value, channels, self._upright.value)
