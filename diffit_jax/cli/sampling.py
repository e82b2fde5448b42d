"""Flags of the commands that draw samples: which network, how, and what decodes its latents."""

import dataclasses
from typing import TYPE_CHECKING, Any

from absl import flags

from diffit_jax import cli

if TYPE_CHECKING:
    from diffit_jax.sampling.decoder import Decoding
    from diffit_jax.sampling.request import Run, Weights


class NetworkFlags:
    """The flags that name a network: a run's, at one of its checkpoints or averages, or released
    weights with a config."""

    def __init__(self):
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

    def source(
        self, ema_length: float | None = None, checkpoint: int | None = None
    ) -> "Run | Weights":
        """The network; the command ends if the flags do not fit together. `ema_length` and
        `checkpoint` are in place of the flags'."""
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
        if workdir and self._config.value:
            cli.fail("--config goes with --weights: a work directory has a config of its own")
        if ema_length is not None and not workdir:
            cli.fail("--ema_length goes with --workdir: a file of weights holds one average")
        if checkpoint is not None and not workdir:
            cli.fail("--checkpoint goes with --workdir: a file of weights holds one state")
        if self._raw.value and not workdir:
            cli.fail("--raw goes with --workdir: a file of weights holds one average")
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
        self._vae = cli.define_path(
            "vae",
            "Folder of the autoencoder (diffusers' AutoencoderKL) that decodes latents to images, "
            "or hf://owner/name; without it, latents are written.",
            to_read=True,
        )
        self._dtype = flags.DEFINE_enum(
            "vae_dtype", None, ["float32", "bfloat16"], "Of the autoencoder's convolutions."
        )
        self._at_once = flags.DEFINE_integer(
            "vae_at_once",
            None,
            "Latents that an accelerator decodes at once, 8 if not said; a CPU decodes one.",
            lower_bound=1,
        )

    def decoding(self) -> "Decoding | None":
        """How to decode, if it is asked for."""
        from diffit_jax.sampling.decoder import Decoding

        if self._vae.value:
            return Decoding(self._vae.value, self._dtype.value or "float32", self._at_once.value)
        if self._dtype.value or self._at_once.value:
            cli.fail("--vae_dtype and --vae_at_once go with --vae")
        return None


class SamplingFlags:
    """Flags that override the config's section `sampling`: one for each key of its classes."""

    def __init__(self):
        self._holders: dict[str, flags.FlagHolder] = {}
        cli.when_parsed.append(self._define)

    def _define(self) -> None:
        from diffit_jax import limits, sections

        def define(name: str, declared: Any, help_text: str) -> None:
            kind = limits.type_of(declared)
            if limits.is_path(declared):
                self._holders[name] = cli.define_path(name, help_text)
            else:
                make = {int: flags.DEFINE_integer, float: flags.DEFINE_float}.get(kind)
                make = flags.DEFINE_bool if kind is bool else make or flags.DEFINE_string
                self._holders[name] = make(name, None, help_text)

        for field in dataclasses.fields(sections.Sampling):
            explained = limits.explained(sections.Sampling)
            if field.name not in sections.CHOICES:
                define(field.name, field.type, explained[field.name])
                continue
            choices = sections.CHOICES[field.name]
            define(field.name, str, f"{', '.join(choices)}.")
            keys: dict[str, tuple[list[str], Any, str]] = {}
            for kind, cls in choices.items():
                for key in dataclasses.fields(cls):
                    text = limits.explained(cls).get(key.name, "")
                    of, _, _ = keys.setdefault(key.name, ([], key.type, text))
                    of.append(kind)
            for key, (of, declared, text) in keys.items():
                define(f"{field.name}.{key}", declared, f"Of {', '.join(of)}: {text}")

    @property
    def value(self) -> dict[str, Any]:
        """The values that are given, as `Sampling.overridden` takes them."""
        return {
            name: holder.value for name, holder in self._holders.items() if holder.value is not None
        }
