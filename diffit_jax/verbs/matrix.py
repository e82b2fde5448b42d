"""The verb `benchmark --sweep`: the training step for all combinations of a few settings."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from diffit_jax import experiment, models, platforms
from diffit_jax.errors import UserError
from diffit_jax.models.blocks import REMAT_POLICIES
from diffit_jax.runtime import backend, parallel, ranges
from diffit_jax.runtime.apart import apart
from diffit_jax.verbs import benchmark

# What `--sweep` varies; batch is of all devices.
KNOWN = {
    "batch": ranges.Swept(int, "it must be a whole number", bare=True),
    "remat": ranges.Swept(str, bare=True),
    "attention": ranges.Swept(str, bare=True),
}
_KEYS = {"batch": "training.batch_size", "remat": "model.remat", "attention": "model.attention"}
_UNITS = f"{'images/s':>10} {'ms':>9} {'MFU':>7} {'GB':>7}"


def matrix(
    config: ConfigDict,
    *,
    steps: int,
    sweep: Mapping[str, Sequence[Any]],
    fewer_devices: bool = False,
    show: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Times updates for all combinations of settings.

    Each is measured in a process of its own: what one holds the next does not lack, the memory is
    its own, and one that is too large ends itself only. This process leaves the devices alone.

    Args:
      config: as for training; nothing is written.
      steps: updates to time, of each.
      sweep: values by names in `KNOWN`; none stand for the usual ones. `batch`: images per update,
        over all devices; half the config's, its own, twice it. `remat`: names in `REMAT_POLICIES`;
        all. `attention`: names in `attention.BACKENDS`; those of this platform, see `platforms`.
      fewer_devices: as many devices as the batch divides over, rather than an error.
      show: called with each line of the table when it is known, and at the end with the best.

    Returns:
      Of each combination its settings, with the figures of
        `benchmark.measure` or an `error`.

    Raises:
      UserError: a value that cannot be, or none of them can be measured.
    """
    own = config.training.batch_size
    usual: dict[str, Callable[[], Sequence[Any]]] = {
        "batch": lambda: (max(own // 2, 1), own, own * 2),
        "remat": lambda: tuple(REMAT_POLICIES),
        "attention": lambda: platforms.of(apart(_platform)).attentions,
    }
    dimensions = {name: values or usual[name]() for name, values in sweep.items()}
    trials = ranges.combinations(dimensions)
    configs = [_varied(config, trial) for trial in trials]
    for changed in configs:
        experiment.build(changed)

    show(" ".join(f"{name:>9}" for name in dimensions) + f" {_UNITS}")
    found = []
    for trial, changed in zip(trials, configs, strict=True):
        try:
            figures = apart(_measure, changed.to_dict(), steps, fewer_devices)
        except UserError as error:
            figures = {"error": str(error)}
        found.append(figures | trial)
        show(_row(trial, figures))
    measured = [one for one in found if "error" not in one]
    if not measured:
        raise UserError(f"none could be measured; the last: {found[-1]['error']}")
    best = max(measured, key=lambda one: one["images_per_s"])
    keys = " ".join(f"--config.{_KEYS[name]}={best[name]}" for name in dimensions)
    show(f"\nbest: {best['images_per_s']:,.1f} images/s on {best['devices']} x {best['device']}")
    show(f"with {keys}")
    return found


def _varied(config: ConfigDict, trial: Mapping[str, Any]) -> ConfigDict:
    changed = ConfigDict(config.to_dict())
    for name, value in trial.items():
        name, _, key = _KEYS[name].partition(".")
        section: Any = changed[name]
        section[key] = value
    return changed


def _row(trial: Mapping[str, Any], figures: Mapping[str, Any]) -> str:
    settings = " ".join(f"{value!s:>9}" for value in trial.values())
    if "error" in figures:
        return f"{settings}   {figures['error']}"
    used = f"{figures['mfu']:7.1%}" if "mfu" in figures else f"{'-':>7}"
    return (
        f"{settings} {figures['images_per_s']:10,.1f} {figures['step_ms_median']:9,.1f} {used} "
        f"{figures['peak_memory_gb']:7.2f}"
    )


def _platform() -> str:
    return backend.devices()[0].platform


def _measure(config: dict[str, Any], steps: int, fewer_devices: bool) -> dict[str, Any]:
    """`benchmark.measure`, of a network whose attention is computed as its config says."""
    given = ConfigDict(config)
    built, wanted = experiment.build(given), config["model"].get("attention", "auto")
    platform = _platform()
    if wanted not in ("auto", built.model.attention_backend(platform)[0]):
        words = models.attention_in_words(built.model, platform)
        raise UserError(f"not served here: {words}")
    devices = None
    if fewer_devices:
        devices = parallel.fitting_devices(
            built.training.batch_size, built.mesh, built.training.accumulation
        )
    return benchmark.measure(given, steps, devices)
