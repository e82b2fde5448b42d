"""The verb `benchmark`: times updates of a config, of many settings, or beside PyTorch."""

import contextlib
import functools
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from diffit_jax import models, platforms
from diffit_jax.errors import UserError
from diffit_jax.experiment import config as experiment
from diffit_jax.models.diffit.blocks import REMAT_POLICIES
from diffit_jax.run.objective import flops_per_image
from diffit_jax.run.state import create_state, open_training_data, setup_experiment
from diffit_jax.runtime import backend, console, distributed, parallel
from diffit_jax.runtime.backend import peak_flops
from diffit_jax.runtime.console import Progress
from diffit_jax.runtime.run_in_subprocess import run_in_subprocess
from diffit_jax.training.loop import batches_on
from diffit_jax.training.step import batch_shapes, compile_train_step


@backend.reproducible_numerics()
@backend.explain_oom(backend.TRAINING_OOM_HINT)
def measure(
    config: ConfigDict, *, steps: int, devices: Sequence[jax.Device] | None = None
) -> dict[str, Any]:
    """Compile the training step of a config and time updates on its own data, loader included.

    Args:
      config: as for training; nothing is written.
      steps: updates to time, after three that are not.
      devices: to use; None: all of all processes, which take part together.

    Returns:
      `device`, `devices`, `jax`: what ran; `compile_s`: seconds to trace and compile the step;
      `step_ms_median`, `step_ms_min`: milliseconds from one update to the next; `steps_per_s`,
      `images_per_s`: from the median; `data_wait_share`: fraction of the time spent waiting for a
      batch; `mfu`: fraction of the devices' bfloat16 peak, where it is known; `matmul_precision`:
      of float32 products; `attention`: how it is computed; `peak_memory_gb`: of the process on a
      CPU, else of this process's first device.
    """
    setup = setup_experiment(config, devices)
    experiment, mesh, size = setup.experiment, setup.mesh, setup.experiment.training.batch_size
    source = distributed.primary_first(lambda: open_training_data(experiment))
    distributed.check_agreement(
        {"config": config.to_json, "code version": distributed.code_version}
    )
    parallel.verify_batch_sharding(mesh, size)
    waits: list[float] = []
    waiting = functools.partial(_timed, waits)
    stream = batches_on(mesh, source, size, experiment.seed, waiting=waiting)
    frozen = setup.objective.load(experiment, mesh)
    state, batch = create_state(experiment, mesh, setup.objective), next(stream)
    train_step, collected, compile_s = compile_train_step(setup, state, batch)

    # The first three updates warm up caches and the loader.
    times: list[float] = []
    shown = distributed.is_primary()
    with Progress("benchmark", steps + 3, shown=shown) as progress, distributed.lost_processes():
        for _ in range(steps + 3):
            with _timed(times):
                state, collected = train_step(state, collected, batch, frozen)
                batch = next(stream)
                jax.block_until_ready(state)
            progress.advance()
    # The median: single updates are disturbed by other programs.
    median = statistics.median(times[3:])
    device = parallel.local_device(mesh)
    peak, flops = peak_flops(device), flops_per_image(experiment) * size / median / mesh.size
    return {
        "device": device.device_kind,
        "devices": mesh.size,
        "jax": jax.__version__,
        "compile_s": compile_s,
        "step_ms_median": median * 1e3,
        "step_ms_min": min(times[3:]) * 1e3,
        "steps_per_s": 1 / median,
        "images_per_s": size / median,
        "data_wait_share": sum(waits[4:]) / sum(times[3:]),
        **({"mfu": flops / peak} if peak else {}),
        "matmul_precision": backend.matmul_precision(),
        "attention": models.describe_attention(experiment.model, device.platform),
        "peak_memory_gb": _peak_memory(device) / 1e9,
    }


@contextlib.contextmanager
def _timed(seconds: list[float]) -> Iterator[None]:
    """Append the duration of the block."""
    started = time.perf_counter()
    yield
    seconds.append(time.perf_counter() - started)


def _peak_memory(device: jax.Device) -> int:
    """Return the bytes of the device where it counts them, else this process's resident size."""
    counted = device.memory_stats() or {}
    if "peak_bytes_in_use" in counted:
        return counted["peak_bytes_in_use"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux kilobytes


@backend.reproducible_numerics()
@backend.explain_oom(backend.TRAINING_OOM_HINT)
def beside_torch(
    config: ConfigDict, *, steps: int, python: str, devices: Sequence[jax.Device] | None = None
) -> dict[str, Any]:
    """Time updates and evaluations of a latent network, and of the same one in PyTorch, in turns.

    Both get random latents that lie on the device; the other waits meanwhile.

    Args:
      config: as for training, of a latent network; nothing is written.
      steps: rounds to time, after three that are not.
      python: an interpreter that can import PyTorch.
      devices: to use; None: all.

    Returns:
      `device`, `jax`, `torch`: what ran; `compile_s`; for `train` and `forward` the median
      milliseconds of both and `…_ratio`: PyTorch's over ours, over 1 where ours is faster.

    Raises:
      UserError: PyTorch, or the network's file, is not there.
    """
    setup = setup_experiment(config, devices)
    experiment, mesh, model = setup.experiment, setup.mesh, setup.experiment.model
    size = experiment.training.batch_size
    sizes = {name: getattr(model, name, None) for name in _TORCH_SIZES}
    if None in sizes.values():
        raise UserError("--beside_torch compares latent networks (latent_diffit): name such a one")
    sizes |= {"batch_size": size, "dtype": jnp.dtype(model.dtype).name}
    other = _Torch(python, sizes)

    draw = np.random.default_rng(0)
    arrays = {
        name: draw.normal(size=leaf.shape).astype(leaf.dtype)
        for name, leaf in batch_shapes(experiment, mesh).items()
    }
    arrays["label"] = np.arange(size, dtype=np.int32) % max(model.num_classes, 1)
    batch = parallel.put_batch(mesh, arrays, size)
    frozen = setup.objective.load(experiment, mesh)
    state = create_state(experiment, mesh, setup.objective)
    train_step, collected, compile_s = compile_train_step(setup, state, batch)
    x = jax.device_put(
        draw.normal(size=(size, *model.sample_shape)).astype(np.float32),
        parallel.batch_sharding(mesh),
    )
    with parallel.placement(mesh):
        forward = jax.jit(
            lambda variables, x, label: models.as_network(model, variables)(
                x, jnp.linspace(0, 999, size), {"label": label}
            )
        )
        variables = {"params": state.params, "constants": state.constants}
        forward = forward.lower(variables, x, batch["label"]).compile()

    rounds: dict[str, list[tuple[float, float]]] = {"train": [], "forward": []}
    with Progress("benchmark", steps + 3) as progress, other:
        for _ in range(steps + 3):
            for verb, both in rounds.items():
                taken: list[float] = []
                with _timed(taken):
                    if verb == "train":
                        state, collected = train_step(state, collected, batch, frozen)
                        jax.block_until_ready(state)
                    else:
                        variables = {"params": state.params, "constants": state.constants}
                        jax.block_until_ready(forward(variables, x, batch["label"]))
                both.append((taken[0], other.seconds(verb)))
            progress.advance()
    found: dict[str, Any] = {
        "device": parallel.local_device(mesh).device_kind,
        "jax": jax.__version__,
        "torch": other.version,
        "attention": models.describe_attention(model, parallel.local_device(mesh).platform),
        "compile_s": compile_s,
    }
    for verb, both in rounds.items():
        ours, theirs = (statistics.median(column[3:]) for column in zip(*both, strict=True))
        found |= {
            f"{verb}_ms": ours * 1e3,
            f"{verb}_torch_ms": theirs * 1e3,
            f"{verb}_ratio": theirs / ours,
        }
    return found


_TORCH_SIZES = (
    "hidden_size",
    "depth",
    "num_heads",
    "patch_size",
    "input_size",
    "input_channels",
    "mlp_ratio",
    "num_classes",
    "learn_sigma",
)


class _Torch:
    """The network in PyTorch, in a process of its own that does what it is told, and waits."""

    def __init__(self, python: str, sizes: Mapping[str, Any]):
        script = Path(__file__).parents[2] / "tests" / "support" / "torch_network.py"
        if not script.is_file():
            raise UserError(
                "--beside_torch needs tests/support/torch_network.py: run it from a checkout of "
                "the project"
            )
        command = [python, str(script), json.dumps(sizes)]
        # A file, not a pipe: that would be full one day, and the process wait for a reader.
        self._folder = tempfile.TemporaryDirectory(prefix="diffit_jax_torch_")
        self._errors = Path(self._folder.name) / "errors"
        try:
            with self._errors.open("w") as errors:
                self._process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
                )
        except OSError as error:
            raise UserError(
                f"--beside_torch={python} cannot be started ({error.strerror}): name a Python that "
                "has PyTorch"
            ) from error
        self.version = self._answer()

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self._end()
        self._folder.cleanup()

    def _end(self) -> None:
        self._process.kill()
        self._process.wait()

    def seconds(self, verb: str) -> float:
        """Do it once and return how long it took there."""
        assert self._process.stdin
        self._process.stdin.write(f"{verb}\n")
        self._process.stdin.flush()
        return float(self._answer())

    def _answer(self) -> str:
        assert self._process.stdout
        line = self._process.stdout.readline().strip()
        if not line:
            self._end()
            lines = self._errors.read_text().strip().splitlines() or ["it ended"]
            raise UserError(
                f"the network in PyTorch ended ({lines[-1][:200]}): name by --beside_torch a "
                "Python that has PyTorch, and a batch that fits"
            )
        return line


# What `--sweep` varies; batch is of all devices.
KNOWN = {
    "batch": console.SweepKey(int, "it must be a whole number", bare=True),
    "remat": console.SweepKey(str, bare=True),
    "attention": console.SweepKey(str, bare=True),
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
    """Time updates for all combinations of settings.

    Each is measured in a process of its own, with all of the memory, and one that is too large ends
    itself only. This process leaves the devices alone.

    Args:
      config: as for training; nothing is written.
      steps: updates to time, of each.
      sweep: values by names in `KNOWN`; none stand for the usual ones. `batch`: images per update,
        over all devices; half the config's, its own, twice it. `remat`: names in `REMAT_POLICIES`;
        all. `attention`: names in `backends.BACKENDS`; those of this platform, see `platforms`.
      fewer_devices: as many devices as the batch divides over, rather than an error.
      show: called with each line of the table when it is known, and at the end with the best.

    Returns:
      The settings of each combination, with the figures of `measure` or an `error`.

    Raises:
      UserError: an impossible value, or none of them can be measured.
    """
    own = config.training.batch_size
    usual: dict[str, Callable[[], Sequence[Any]]] = {
        "batch": lambda: (max(own // 2, 1), own, own * 2),
        "remat": lambda: tuple(REMAT_POLICIES),
        "attention": lambda: platforms.of(run_in_subprocess(_platform)).attentions,
    }
    dimensions = {name: values or usual[name]() for name, values in sweep.items()}
    trials = console.combinations(dimensions)
    configs = [_varied(config, trial) for trial in trials]
    for changed in configs:
        experiment.build(changed)

    show(" ".join(f"{name:>9}" for name in dimensions) + f" {_UNITS}")
    found = []
    for trial, changed in zip(trials, configs, strict=True):
        try:
            figures = run_in_subprocess(_measure, changed.to_dict(), steps, fewer_devices)
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
    """Call `measure` for a network whose attention is computed as its config says."""
    given = ConfigDict(config)
    built, wanted = experiment.build(given), config["model"].get("attention", "auto")
    platform = _platform()
    if wanted not in ("auto", built.model.attention_backend(platform)[0]):
        words = models.describe_attention(built.model, platform)
        raise UserError(f"not served here: {words}")
    devices = None
    if fewer_devices:
        devices = parallel.fitting_devices(
            built.training.batch_size, built.mesh, built.training.accumulation
        )
    return measure(given, steps=steps, devices=devices)
