"""Flags of several commands: networks, sampling, scores, sources of images."""

from typing import TYPE_CHECKING, Any

from absl import flags

from diffit_jax import cli

if TYPE_CHECKING:
    from diffit_jax.ingest.decoding import Preprocessing
    from diffit_jax.sampling.decoder import Decoding
    from diffit_jax.sampling.request import Run, Weights


class NetworkFlags:
    """The flags that name a network: of a run, or released weights with a config.

    A run's at one of its checkpoints or averages.
    """

    def __init__(self):
        with cli.group("the network"):
            self._define()

    def _define(self) -> None:
        self.workdir = cli.define_path("workdir", "Directory of the run, local or gs://.")
        self.weights = cli.define_path(
            "weights",
            "Released weights (safetensors: a file or hf://owner/name/path) instead of a run.",
            to_read=True,
        )
        self._config = cli.define_config(
            "Config whose process and sampling the weights are used with; default: "
            "configs/imagenet{256,512}_latent.py."
        )
        self._checkpoint = flags.DEFINE_integer(
            "checkpoint",
            None,
            "With --workdir: step of an older checkpoint; default: the newest.",
            lower_bound=0,
        )
        self._allow_nonfinite = flags.DEFINE_bool(
            "allow_nonfinite", False, "Use weights that have NaNs or infinities."
        )
        self._ema_length = flags.DEFINE_float(
            "ema_length",
            None,
            "With --workdir: average the parameters over this share of training, from the run's "
            "snapshots (ema.power_lengths).",
        )

        self._raw = flags.DEFINE_bool(
            "raw", False, "With --workdir: the parameters themselves, not their average."
        )

    def check(self, required: bool = True) -> None:
        """End the command if the flags do not fit together.

        `required`: whether one network has to be named.
        """
        workdir, weights = self.workdir.value, self.weights.value
        if required or workdir or weights:
            cli.require_one(workdir=workdir, weights=weights)
        only = {
            "--ema_length": (self._ema_length.value, "a file of weights holds one average"),
            "--checkpoint": (self._checkpoint.value, "a file of weights holds one state"),
            "--raw": (self._raw.value or None, "a file of weights holds one average"),
        }
        for name, (value, reason) in only.items():
            if value is not None and weights:
                cli.fail(f"{name} goes with --workdir: {reason}")
        if workdir and self._config.named:
            cli.fail("--config goes with --weights: a work directory has a config of its own")
        if workdir:
            cli.require_run(workdir)

    def source(
        self, ema_length: float | None = None, checkpoint: int | None = None
    ) -> "Run | Weights":
        """Return the network; end the command if the flags do not fit together.

        `ema_length` and `checkpoint` replace the flags'.
        """
        from diffit_jax.runtime import hub
        from diffit_jax.sampling.request import Run, Weights, config_for_weights

        workdir, weights = self.workdir.value, self.weights.value
        for name, flag, value in (
            ("ema_length", self._ema_length, ema_length),
            ("checkpoint", self._checkpoint, checkpoint),
        ):
            if value is not None and flag.value is not None:
                cli.fail(f"--{name} and --sweep {name} both say which: leave out either")
        ema_length = self._ema_length.value if ema_length is None else ema_length
        checkpoint = self._checkpoint.value if checkpoint is None else checkpoint
        if workdir:
            return Run(
                workdir,
                ema_length=ema_length,
                checkpoint=checkpoint,
                allow_nonfinite=self._allow_nonfinite.value,
                raw=self._raw.value,
            )
        config = config_for_weights(self._config.value, str(hub.local(weights, "--weights")))
        return Weights(weights, config, self._allow_nonfinite.value)


class DecodingFlags:
    """The flags of the autoencoder that makes images of latents."""

    def __init__(self):
        with cli.group("the autoencoder"):
            self._vae = cli.define_path(
                "vae",
                "Folder of the autoencoder (diffusers' AutoencoderKL) that decodes latents to "
                "images, or hf://owner/name; without it, latents are written.",
                to_read=True,
            )
            self._dtype = flags.DEFINE_enum(
                "vae_dtype",
                None,
                ["float32", "bfloat16"],
                "dtype of the autoencoder's convolutions.",
            )
            self._chunk_size = flags.DEFINE_integer(
                "vae_batch_size",
                None,
                "Latents that an accelerator decodes at once, default 8; a CPU decodes one.",
                lower_bound=1,
            )
            flags.DEFINE_alias("vae_at_once", "vae_batch_size")  # its name before

    @property
    def given(self) -> bool:
        """Whether an autoencoder is named."""
        return self._vae.value is not None

    def check(self) -> None:
        """End the command if the flags do not go together."""
        if not self.given and (self._dtype.value or self._chunk_size.value):
            cli.fail("--vae_dtype and --vae_batch_size go with --vae")

    def decoding(self) -> "Decoding | None":
        """Return how to decode, if it is asked for."""
        from diffit_jax.sampling.decoder import Decoding

        if not self.given:
            return None
        return Decoding(self._vae.value, self._dtype.value or "float32", self._chunk_size.value)


class SamplingFlags:
    """Flags that override the config's section `sampling`: one for each key of its classes."""

    def __init__(self):
        self._holders: dict[str, flags.FlagHolder] = {}
        cli.when_parsed.append(self._define)

    def _define(self) -> None:
        from diffit_jax.experiment import catalogue

        def define(name: str, kind: str, help_text: str) -> None:
            if kind == "path":
                self._holders[name] = cli.define_path(name, help_text)
                return
            make = {"int": flags.DEFINE_integer, "float": flags.DEFINE_float}
            make |= {"bool": flags.DEFINE_bool}
            self._holders[name] = make.get(kind, flags.DEFINE_string)(name, None, help_text)

        sections = catalogue.sections()
        for key in sections["sampling"].fields().values():
            chosen = sections.get(f"sampling.{key.name}")
            with cli.group(
                f"how samples are drawn: {key.name}" if chosen else "how samples are drawn"
            ):
                if chosen is None:
                    define(key.name, key.kind, key.text)
                    continue
                flags_text = f"{', '.join(chosen.classes)}; default: the config's."
                self._holders[key.name] = flags.DEFINE_enum(
                    key.name, None, [*chosen.classes], flags_text
                )
                for name, one in chosen.fields().items():
                    of = [kind for kind, keys in chosen.classes.items() if name in keys]
                    define(f"{key.name}.{name}", one.kind, f"({', '.join(of)}) {one.text}")

    @property
    def value(self) -> dict[str, Any]:
        """The values that are given, as `Sampling.overridden` takes them."""
        return {
            name: holder.value for name, holder in self._holders.items() if holder.value is not None
        }


def define_samples(help_text: str) -> flags.FlagHolder:
    """Define the flag that names images."""
    return cli.define_path("samples", help_text, to_read=True)


def define_images() -> flags.FlagHolder:
    """Define the flag that asks for a file of each sample."""
    return flags.DEFINE_enum(
        "images",
        None,
        ["png", "jpeg", "webp"],
        "Write each sample as a file too, NAME/CLASS/SEED.png, in a folder for each class.",
    )


def define_data_dir() -> flags.FlagHolder:
    """Define the flag of the directory of data sets."""
    help_text = "Where prepared data sets live; default: ~/tensorflow_datasets."
    return cli.define_path("data_dir", help_text, to_read=True, must_exist=False)


class InceptionFlags:
    """The flags of the FID network, and of DINOv2 where it can stand beside it or in its place."""

    def __init__(self, dinov2: bool = True):
        """Define the flags; `dinov2`: whether those of DINOv2 too."""
        self._of_dinov2: dict[str, Any] = {}
        if dinov2:
            self._define_dinov2()
        with cli.group("the network of FID"):
            self._path = cli.define_path(
                "inception",
                "Weights of the FID network: pytorch-fid's or torch-fidelity's .pth, or "
                "safetensors; random: to try a command; its scores have no meaning.",
                to_read=True,
                words=("random",),
            )
            self._resize = flags.DEFINE_enum(
                "resize",
                "tf1",
                ["tf1", "pytorch_fid"],
                "How images come to 299 pixels: as ADM's suite has it.",
            )
            self._batch = flags.DEFINE_integer(
                "inception_batch",
                32,
                "Images in these networks at once, on each device.",
                lower_bound=1,
            )

    def _define_dinov2(self) -> None:
        with cli.group("the network of FD-DINOv2"):
            self._of_dinov2["dinov2"] = cli.define_path(
                "dinov2",
                "Weights of DINOv2, beside the FID network or in its place: "
                "dinov2_vitl14_pretrain.pth, or hf://facebook/dinov2-large; digits: a small "
                "stand-in, to try a command; its scores have no meaning.",
                to_read=True,
                words=("digits",),
            )
            self._of_dinov2["dinov2_resize"] = flags.DEFINE_enum(
                "dinov2_resize",
                "dgm_eval",
                ["dgm_eval", "edm2", "dgm_eval_clean", "torch_fidelity", "fdr6"],
                "How images come to it: as dgm-eval, EDM2 … have it.",
            )

    def check(self) -> None:
        """End the command if no network is named."""
        if not self._path.value and not self._dinov2_values.get("dinov2"):
            cli.fail(
                "--inception is missing: name the weights of the FID network, such as "
                "pytorch-fid's pt_inception-2015-12-05-6726825d.pth"
                + (", or those of DINOv2 by --dinov2" if self._dinov2_values else "")
            )

    @property
    def value(self) -> dict[str, Any]:
        """As arguments of the verbs; the command ends if there is no network."""
        self.check()
        found = {"inception": self._path.value or "", "resize": self._resize.value}
        return found | self._dinov2_values | {"batch_per_device": self._batch.value}

    @property
    def _dinov2_values(self) -> dict[str, Any]:
        """Those of DINOv2; {} if it has no flags."""
        return {name: holder.value or "" for name, holder in self._of_dinov2.items()}


class ScoreFlags:
    """The flags of what samples are compared with, and where the scores go."""

    def __init__(self, output: str, replaced: str):
        """Define the flags; `output`: the default; `replaced`: what may be replaced."""
        with cli.group("figures"):
            self.reference = cli.define_path(
                "reference",
                "npz file of statistics: ADM's, EDM's or our own; or EDM2's .pkl.",
                to_read=True,
            )
            self._metrics = flags.DEFINE_list(
                "metrics",
                None,
                "Of fid, sfid, inception_score, precision, recall and kid; of DINOv2 fd_dinov2, "
                "precision_dinov2, recall_dinov2, density_dinov2, coverage_dinov2, kd_dinov2, "
                "mind_dinov2, mmd_dinov2, f_score_dinov2, realism_dinov2 and fd_infinity_dinov2. "
                "Default: all that the reference serves, but kid and what stands behind "
                "coverage_dinov2.",
            )
            self.labels = flags.DEFINE_string(
                "labels", None, "Of a network's samples, see diffit sample: random is ADM's rule."
            )
            self._output = cli.define_path("output", f"JSON file to write; default: {output}.")
            self.overwrite = flags.DEFINE_bool("overwrite", False, f"Replace {replaced}.")

    def value(self, inception: InceptionFlags) -> dict[str, Any]:
        """Return arguments of the verbs; end the command if there is no network."""
        from diffit_jax.evaluation.evaluator import Comparison

        network = inception.value
        comparison = Comparison(
            reference=self.reference.value, metrics=self._metrics.value, **network
        )
        output, overwrite = self._output.value, self.overwrite.value
        return {"comparison": comparison, "output": output, "overwrite": overwrite}


class SourceFlags:
    """The flags that name a source and the data set that it becomes."""

    def __init__(self):
        self._source = cli.define_path(
            "source",
            "Folder, zip, tar, Parquet file or CIFAR-10 archive of images, a pattern with *, a "
            "folder of tensorflow-datasets, or hf://datasets/owner/name/path.",
            to_read=True,
        )
        self._name = flags.DEFINE_string(
            "name", None, "Name of the data set, for config.data.name."
        )
        self._data_dir = cli.define_path(
            "data_dir", "Where data sets live; default: ~/tensorflow_datasets."
        )
        self._split = flags.DEFINE_enum("split", "train", ["train", "test"], "Split to write.")
        # What is done to each image.
        self._crop = flags.DEFINE_enum(
            "crop",
            "none",
            ["none", "center", "adm", "resize"],
            "How images are brought to one size: none (they have it), center (the central square, "
            "Lanczos), adm (ADM's centre crop, for ImageNet), resize (Lanczos, not cropped).",
        )
        self._size = flags.DEFINE_integer("size", 0, "Side in pixels, with --crop.", lower_bound=0)
        self._channels = flags.DEFINE_enum("channels", "3", ["1", "3"], "3: colours; 1: grey.")
        self._upright = flags.DEFINE_bool(
            "upright",
            True,
            "Turn images as EXIF says; --noupright leaves them as stored, as ADM and DiT do.",
        )
        self._unlabelled = flags.DEFINE_bool("unlabelled", False, "Leave labels out.")
        self._tar_classes = flags.DEFINE_bool(
            "tar_classes",
            False,
            "Take each of several tars for a class, even where they look like parts of one set.",
        )
        self._workers = flags.DEFINE_integer(
            "workers",
            None,
            "Processes that decode images; default: one for each core; 0: no others.",
            lower_bound=0,
        )
        flags.mark_flag_as_required("source")
        flags.mark_flag_as_required("name")

    def check(self) -> None:
        """End the command if the flags do not go together."""
        crop, size = self._crop.value, self._size.value
        if size and crop == "none":
            cli.fail(
                f"--size {size} needs a way to bring images to it: --crop center, adm or resize"
            )
        if crop != "none" and not size:
            cli.fail(f"--crop {crop} needs a side in pixels: --size 64")

    @property
    def value(self) -> dict[str, Any]:
        """As arguments of the verbs."""
        return {
            "source": self._source.value,
            "name": self._name.value,
            "data_dir": self._data_dir.value or "",
            "split": self._split.value,
            "preprocessing": self._preprocessing(),
            "unlabelled": self._unlabelled.value,
            "tar_classes": self._tar_classes.value,
            "workers": self._workers.value,
        }

    def _preprocessing(self) -> "Preprocessing":
        from diffit_jax.ingest.decoding import Preprocessing

        channels = int(self._channels.value)
        return Preprocessing(self._crop.value, self._size.value, channels, self._upright.value)
