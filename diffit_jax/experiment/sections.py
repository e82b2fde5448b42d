"""The sections of a config that are plain settings: frozen, typed, and checked when they are made.

Keys that are marked `RESUMABLE` may change when a run is continued.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from diffit_jax import limits
from diffit_jax.data import pixels
from diffit_jax.data.labels import CLASS_SAMPLING
from diffit_jax.diffusion import GUIDANCE, SAMPLERS
from diffit_jax.diffusion.guidance import Guidance, Unguided
from diffit_jax.diffusion.samplers import SamplingMethod
from diffit_jax.errors import UserError
from diffit_jax.limits import (
    LATER,
    RESUMABLE,
    Count,
    CountOrZero,
    above,
    at_least,
    fraction,
    one_of,
)
from diffit_jax.models.pretrained.resizing import DISTANCE_RULES


@dataclasses.dataclass(frozen=True)
class Data(limits.Section, name="data"):
    """Section `data`.

    Attributes:
      name: of the data set: "digits", "synthetic" (random data of any shape), or the name of what
        `diffit prepare` or `diffit encode` has written.
      data_dir: where prepared data sets live, local, `gs://` or `hf://`; "" is
        tensorflow-datasets' default, `~/tensorflow_datasets`.
      autoencoder: "" if the examples are images; otherwise they are this autoencoder's latents, and
        so are samples.
      latent_mean, latent_scale: of latents: the network sees `(z - latent_mean) * latent_scale`;
        one number, or one for each channel. Encoded data say theirs in their manifest.
      class_sampling: how often classes are drawn in training: "natural", as often as they occur;
        "square_root", in proportion to the root of their number of examples; "balanced", all
        equally often. The last two read every label before the first update.
    """

    name: str
    data_dir: Annotated[limits.Path, RESUMABLE] = ""
    autoencoder: str = ""
    latent_mean: Sequence[float] = (0.0,)
    latent_scale: Sequence[Annotated[float, above(0)]] = (0.18215,)  # of Stable Diffusion's
    class_sampling: Annotated[str, one_of(*CLASS_SAMPLING), LATER] = "natural"

    def __post_init__(self):
        super().__post_init__()
        if not self.latent_mean or not self.latent_scale:
            raise UserError("config keys data.latent_mean and data.latent_scale need a number each")


@dataclasses.dataclass(frozen=True)
class Optimizer(limits.Section, name="optimizer"):
    """Section `optimizer`.

    Attributes:
      learning_rate: the peak, which is reached after the warm-up.
      warmup_steps: updates over which the learning rate rises from 0.
      name: "adam" (AdamW if there is weight decay) or "lamb", for very large batches.
      beta1: decay of Adam's first moment, for each update.
      beta2: decay of Adam's second moment.
      epsilon: Adam's, added to the root of the second moment.
      weight_decay: share of a weight taken off per update, times the learning rate. Only matrices
        and convolutions decay: not biases, norms, label tables or position biases.
      max_gradient_norm: longer gradients (over all parameters) are shortened to this; 0: never.
      schedule: "constant" after the warm-up, or "cosine" down to 0.
      decay_steps: for "cosine", the update at which the rate is 0, counted from the first one.
      replace_nonfinite: whether not-a-number in a gradient becomes 0, and infinity ±100,000, as in
        EDM's code, before a batch whose gradient or loss is not finite is skipped.
    """

    learning_rate: Annotated[float, above(0)]
    warmup_steps: CountOrZero
    name: Annotated[str, one_of("adam", "lamb")] = "adam"
    beta1: Annotated[float, fraction(below_one=True)] = 0.9
    beta2: Annotated[float, fraction(below_one=True)] = 0.999
    epsilon: Annotated[float, above(0)] = 1e-8
    weight_decay: Annotated[float, at_least(0)] = 0.0
    max_gradient_norm: Annotated[float, at_least(0)] = 0.0
    schedule: Annotated[str, one_of("constant", "cosine")] = "constant"
    decay_steps: CountOrZero = 0
    replace_nonfinite: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.schedule == "cosine" and self.decay_steps <= self.warmup_steps:
            raise UserError(
                f"config key optimizer.decay_steps is {self.decay_steps}: it must be above "
                f"{self.warmup_steps}, the warmup_steps"
            )


@dataclasses.dataclass(frozen=True)
class EMA(limits.Section, name="ema"):
    """Section `ema`: EDM's moving average of the parameters.

    Stated in images so that the batch size does not change its length.

    Attributes:
      halflife_images: half-life of the average, in images: a parameter's weight in it has halved
        after as many.
      rampup_ratio: the half-life is at most this fraction of the images seen so far, so that the
        average forgets the start of training.
      power_lengths: relative widths (EDM2's sigma_rel) of further averages, from whose snapshots
        an average of any width is made after training (`--ema_length`); EDM2 has (0.05, 0.10).
        Each costs 4 bytes per parameter, and a snapshot as much on disk.
      snapshot_steps: updates between snapshots of these.
    """

    halflife_images: Annotated[float, above(0)]
    rampup_ratio: Annotated[float, above(0)] = 0.05
    power_lengths: Sequence[Annotated[float, above(0, below=12**-0.5)]] = ()
    snapshot_steps: Annotated[Count, RESUMABLE] = 10_000


@dataclasses.dataclass(frozen=True)
class Training(limits.Section, name="training"):
    """Section `training`.

    Attributes:
      batch_size: images per update, over all devices.
      label_dropout: share of the labels replaced by "no label", which classifier-free guidance
        needs. In [0, 1].
      total_steps: updates of the whole run (batches, to be exact: one with a gradient that is not
        finite makes no update).
      accumulation: parts into which a batch is cut to save memory; their gradients are averaged
        into one update.
      max_bad_steps: how many batches in a row may have no finite gradient, before the run ends.
      log_steps: updates between lines of the log.
      checkpoint_steps: updates between checkpoints.
      grid_steps: updates between sample grids; one more after the last update. 0: none.
      checkpoint_minutes: save a checkpoint also if the last one is older than this, which is looked
        at with each line of the log; 0: never.
      keep_checkpoints: how many of the newest checkpoints stay.
      keep_every_steps: checkpoints at multiples of this stay for good; 0: none.
      grid_images: images in a sample grid.
      inner_weight: of the loss of a network's inner head (`model.inner_head`), beside its own.
      wandb: project at Weights & Biases, or entity/project, to which scores and images are logged
        too; empty: none.
    """

    batch_size: Count
    label_dropout: Annotated[float, fraction()]
    total_steps: Annotated[Count, RESUMABLE]
    log_steps: Annotated[Count, RESUMABLE] = 100
    grid_steps: Annotated[CountOrZero, RESUMABLE] = 10_000
    checkpoint_steps: Annotated[Count, RESUMABLE] = 5_000
    keep_checkpoints: Annotated[Count, RESUMABLE] = 3
    grid_images: Annotated[Count, RESUMABLE] = 100
    accumulation: Annotated[Count, RESUMABLE] = 1
    max_bad_steps: Annotated[Count, RESUMABLE] = 20
    checkpoint_minutes: Annotated[float, at_least(0), RESUMABLE] = 0.0
    keep_every_steps: Annotated[CountOrZero, RESUMABLE] = 0
    inner_weight: Annotated[float, at_least(0), LATER] = 0.5
    wandb: Annotated[str, RESUMABLE] = ""


@dataclasses.dataclass(frozen=True)
class Sampling(limits.Section, name="sampling"):
    """Section `sampling`: how samples are drawn unless the command line says otherwise.

    Attributes:
      sampler: section `sampling.sampler`: `name`, and the attributes of that class in
        `diffusion.SAMPLERS`. "ddpm" (ancestral) and "ddim" belong to the process ddpm; "euler",
        "heun" and "dpm_solver" (2M) serve any process.
      guidance: section `sampling.guidance`, which may be left out: `kind`, and the attributes of
        that class in `diffusion.GUIDANCE`.
      batch_per_device: samples that each device draws per call of the sampler.
      pixel_rounding: how [-1, 1] becomes uint8: "edm", 127.5 x + 128, or "adm", 127.5 (x + 1), both
        truncated.
      guide_class_token: of a network with `model.class_token`, whether guidance acts on the class
        token too, or on the latent alone.
    """

    sampler: SamplingMethod
    batch_per_device: Annotated[int, at_least(1, le=1_000_000)]
    guidance: Guidance = dataclasses.field(default_factory=Unguided)
    pixel_rounding: Annotated[str, one_of(*pixels.ROUNDINGS)] = "edm"
    guide_class_token: Annotated[bool, LATER] = True

    def overridden(self, overrides: Mapping[str, Any]) -> "Sampling":
        """Return the section with values from the command line, each of which must have an effect.

        Args:
          overrides: by key within the section: `batch_per_device`, `sampler` (a name),
            `sampler.num_steps`, `guidance` (a kind), `guidance.scale` … A sampler or guidance of
            another kind keeps the settings that the two have in common.

        Raises:
          UserError: a key that has no effect, or an impossible value.
        """
        values = {name: value for name, value in overrides.items() if name in _PLAIN}
        for section, classes in CHOICES.items():
            given = {
                name.removeprefix(f"{section}."): value
                for name, value in overrides.items()
                if name.startswith(f"{section}.")
            }
            values[section] = _chosen(
                section, classes, getattr(self, section), overrides.get(section), given
            )
        for name in overrides:
            if name not in _PLAIN and name.partition(".")[0] not in CHOICES:
                raise UserError(f"--{name} is unknown: see --help")
        return dataclasses.replace(self, **values)


@dataclasses.dataclass(frozen=True)
class Evaluation(limits.Section, name="evaluation"):
    """Section `evaluation`, which may be left out: how a run is evaluated while it trains.

    All averages of the parameters are evaluated, and the parameters themselves with `raw`.

    Attributes:
      steps: updates between evaluations: samples are drawn, decoded and compared with a reference,
        as the verb `evaluate` does it; one more after the last update. 0: only that one. There is
        none without `inception` or `dinov2`.
      reference: npz file of statistics, see `evaluation.reference`; "": the test split of the data
        is measured for one, which is kept as `reference.npz` in the work directory.
      inception: weights of the FID network, see `interop.inception`; "": no FID.
      dinov2: weights of DINOv2 (ViT-L/14 as published), see `interop.dinov2`; "": no FD-DINOv2.
      dinov2_resize: how images come to it: by "dgm_eval", "edm2" …, see `resizing`.
      vae: folder of the autoencoder that decodes latents, see `interop.diffusers`. Sample grids
        show images if it is given, whether or not there are evaluations.
      vae_dtype: of the autoencoder's convolutions.
      count: samples of each set of weights (averaged, raw), always of the seeds 0, 1, 2 …
      final_count: samples of the evaluation after the last update; 0: as many as `count`.
      metrics: some of fid, sfid, inception_score, precision, recall and kid, fd_dinov2 …, see
        `evaluation.reference`; empty: all that the reference allows, but those on demand, as kid.
      raw: whether the raw parameters are evaluated too, or averages only.
      max_minutes: an evaluation stops after so many minutes and scores what it has; 0: never.
      batch_per_device: images of which a device extracts the features at once.
      loss_steps: updates between measurements of the loss on examples of the test split, at noise
        levels and with noise that are always the same; 0: none.
      loss_examples: how many of the test split's first examples.
    """

    steps: CountOrZero = 0
    reference: limits.Path = ""
    inception: limits.Path = ""
    dinov2: limits.Path = ""
    dinov2_resize: Annotated[str, one_of(*DISTANCE_RULES)] = "dgm_eval"
    vae: limits.Path = ""
    vae_dtype: Annotated[str, one_of("float32", "bfloat16")] = "float32"
    count: Annotated[int, at_least(2)] = 10_000
    final_count: Annotated[int, at_least(2, also=(0,))] = 0
    metrics: Sequence[str] = ()
    raw: bool = True
    max_minutes: Annotated[float, at_least(0)] = 0.0
    batch_per_device: Count = 32
    loss_steps: CountOrZero = 0
    loss_examples: Count = 2_048

    def __post_init__(self):
        super().__post_init__()
        if self.steps and not self.measures:
            raise UserError(
                "config key evaluation.inception is missing: name the FID network's file (or "
                "evaluation.dinov2), or set evaluation.steps to 0"
            )

    @property
    def measures(self) -> bool:
        """Whether samples are compared with a reference."""
        return bool(self.inception or self.dinov2)

    def check(self, autoencoder: str) -> None:
        """Raise `UserError` if samples cannot become images, or are images already.

        `autoencoder` is the config's `data.autoencoder`.
        """
        if self.measures and autoencoder and not self.vae:
            raise UserError(
                f"config key evaluation.vae is missing: samples are latents of {autoencoder}; name "
                "that autoencoder's folder, or leave out evaluation.inception and dinov2"
            )
        if self.measures and autoencoder and not self.reference:
            raise UserError(
                "config key evaluation.reference is missing: the test split has latents, not "
                "images; name an npz file of statistics"
            )
        if self.vae and not autoencoder:
            raise UserError(
                "config key evaluation.vae is given, but samples are images: leave it out"
            )


# The parts of the section `sampling` whose class is chosen by name, and the classes.
CHOICES = {"sampler": SAMPLERS, "guidance": GUIDANCE}
_PLAIN = ("batch_per_device", "pixel_rounding", "guide_class_token")


def _chosen(
    section: str, classes: Mapping[str, Any], old: Any, name: str | None, given: Mapping[str, Any]
) -> Any:
    """Return a sampler or guidance: `old` with the values of `given`, or one of another class."""
    if name is not None and name not in classes:
        raise UserError(f"--{section} {name} is unknown: use {', '.join(classes)}")
    chosen: Any = old.__class__ if name is None else classes[name]
    name = next(name for name, cls in classes.items() if cls is chosen)
    fields = {field.name: field for field in dataclasses.fields(chosen)}
    for key in given:
        if key not in fields:
            raise UserError(f"--{section}.{key} has no effect with {section} {name}: leave it out")
    had = {field.name for field in dataclasses.fields(old)}  # attributes may be methods
    kept: dict[str, Any] = {key: getattr(old, key) for key in fields if key in had}
    one, other = getattr(chosen, "alternatives", ("", ""))
    if one in given and other in given:
        raise UserError(
            f"--{section}.{one} and --{section}.{other} both say how many steps there are: leave "
            "out either"
        )
    if one in given:
        kept.pop(other, None)
    for key, field in fields.items():
        needed = field.default is dataclasses.MISSING
        if needed and key not in kept and key not in given:
            raise UserError(f"--{section}.{key} is missing: {section} {name} needs it")
    return chosen(**{**kept, **given})
