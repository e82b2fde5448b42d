"""The loop that trains networks and autoencoders, and its measurements.

Speed, utilisation, memory, waiting, compilations.
"""

import collections
import contextlib
import functools
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from diffit_jax.data.sources import ClassSampling, Source, batches
from diffit_jax.errors import one_line
from diffit_jax.experiment.config import Experiment
from diffit_jax.run.objective import flops_per_image
from diffit_jax.runtime import distributed, interruption, parallel
from diffit_jax.runtime.backend import peak_flops
from diffit_jax.runtime.checkpoint import Checkpoints
from diffit_jax.runtime.console import Progress

log = logging.getLogger(__name__)


class Hooks:
    """What is trained, and what happens around its updates; `run_loop` calls these by turns.

    Attributes:
      checkpoints: of what is trained.
    """

    checkpoints: Checkpoints

    def before(self, step: int) -> None:
        """Prepare an update; do nothing by default."""

    def update(self, batch: Any) -> None:
        """Begin the update by a batch; the devices may still compute when this returns."""
        raise NotImplementedError

    def evaluate(self, step: int, progress: Progress) -> bool:
        """Report by `progress` after an update; return whether a checkpoint is due."""
        raise NotImplementedError

    def save(self, step: int) -> None:
        """Begin to write a checkpoint."""
        raise NotImplementedError

    def after(self, step: int) -> None:
        """Finish an update when all that is due after it is done; do nothing by default."""

    def wait(self) -> None:
        """Wait until nothing is being written any more."""
        self.checkpoints.wait()


def run_loop(name: str, hooks: Hooks, stream: Iterator[Any], first: int, total: int) -> None:
    """Make the updates from number `first` + 1 to `total`, each by the next batch of `stream`.

    Raises:
      interruption.Preempted, interruption.Interrupted: the machine is about to be taken away, or
        after Ctrl-C; a checkpoint is saved.
    """
    notices = distributed.PreemptionNotice(ctrl_c=True)
    progress = Progress(name, total, done=first, shown=distributed.is_primary())
    with progress, notices as notice, distributed.lost_processes():
        batch = next(stream)
        for step in range(first + 1, total + 1):
            hooks.before(step)
            # The devices begin with this update, and meanwhile the next batch is read. Until the
            # first one is compiled nothing is lost if the process ends.
            first_one = step == first + 1
            with interruption.expendable() if first_one else contextlib.nullcontext():
                hooks.update(batch)
            if step < total:
                batch = next(stream)
            progress.advance()
            due = hooks.evaluate(step, progress)
            # A checkpoint, on time or because the machine is about to go.
            preempted = notice.reached() and step < total
            if due or preempted:
                hooks.save(step)
            if preempted:
                hooks.wait()
                place = hooks.checkpoints.directory
                raise notice.ending(f"checkpoint {step} of {total} steps is saved in {place}")
            with progress.beside():
                hooks.after(step)
        hooks.wait()


def batches_on(
    mesh: Mesh,
    source: Source,
    size: int,
    seed: int,
    *,
    first: int = 0,
    waiting: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    labels: ClassSampling | None = None,
) -> Iterator[dict[str, jax.Array]]:
    """Yield global batches, (B, …) arrays by name, on the devices, from number `first` on.

    `waiting` is entered around every wait for the data; `labels`: as of `batches`.
    """
    rows = parallel.local_batch_indices(mesh, size)
    stream = batches(source, size, seed, first, rows, labels=labels)
    while True:
        with waiting():
            batch = next(stream)
        yield parallel.put_batch(mesh, batch, size)


class Watch:
    """Measures intervals of a run.

    `data_wait` goes around every wait for a batch; `report` ends one interval and begins the next.
    """

    def __init__(self, experiment: Experiment, mesh: Mesh):
        self._device, self._devices = parallel.local_device(mesh), mesh.size
        self._batch_size = experiment.training.batch_size
        # By whether targets of a loss on tokens are computed: to count takes a second.
        self._needs_targets = experiment.representation.needs_targets
        self._flops_of = functools.cache(lambda _: flops_per_image(experiment, self._step))
        self._peak = peak_flops(self._device)
        self._compilations = Compilations()
        self._overhead_s, self._began = 0.0, time.monotonic()
        self.begin_interval(0)

    def start(self, step: int) -> None:
        """Begin the first interval after batch `step`; earlier compilations are start-up."""
        self.begin_interval(step)
        self._began = self._start
        self._compilations.reset()

    def begin_interval(self, step: int) -> None:
        """Begin an interval after batch number `step`."""
        self._start, self._step, self._waited = time.monotonic(), step, 0.0

    @contextlib.contextmanager
    def data_wait(self) -> Iterator[None]:
        """Count the time spent in this block as waiting for data."""
        started = time.monotonic()
        yield
        self._waited += time.monotonic() - started

    @contextlib.contextmanager
    def paused(self, state: Any) -> Iterator[None]:
        """Exclude this block from training's intervals: grids, evaluations.

        It counts in `beside_share` instead; the updates that lead to `state` come before it.
        """
        jax.block_until_ready(state)
        started = time.monotonic()
        yield
        seconds = time.monotonic() - started
        self._start += seconds
        self._overhead_s += seconds

    def report(self, step: int) -> dict[str, float]:
        """Return figures of the interval up to batch number `step`; begin the next.

        Returns:
          `steps_per_s`, `images_per_s`, `images_per_s_per_chip`, `tflops_per_s_per_chip` (of matrix
          products, as of the interval's first batch), `data_wait_share`, `compilations` since the
          run began its loop, `beside_share` (of the time since then what was no training, but grids
          and evaluations), and where they are known `mfu` (of the device's dense bfloat16 peak) and
          `device_memory_gb`, the largest so far.
        """
        seconds = time.monotonic() - self._start
        rate = (step - self._step) / seconds
        per_chip = rate * self._batch_size / self._devices
        flops = self._flops_of(self._needs_targets(self._step))
        values = {
            "steps_per_s": rate,
            "images_per_s": rate * self._batch_size,
            "images_per_s_per_chip": per_chip,
            "tflops_per_s_per_chip": per_chip * flops / 1e12,
            "data_wait_share": self._waited / seconds,
            "compilations": float(self._compilations.count),
            "beside_share": self._overhead_s / max(time.monotonic() - self._began, 1e-9),
        }
        if self._peak:
            values["mfu"] = per_chip * flops / self._peak
        memory = (self._device.memory_stats() or {}).get("peak_bytes_in_use")
        if memory:
            values["device_memory_gb"] = memory / 1e9
        self.begin_interval(step)
        return values


_CACHE_EVENTS = {
    "/jax/compilation_cache/cache_hits": "hits",
    "/jax/compilation_cache/cache_misses": "misses",
}


class Compilations:
    """Counts programs compiled since it was reset, and how many the persistent cache had."""

    def __init__(self):
        _listen()
        self.reset()

    def reset(self) -> None:
        """Start counting anew."""
        self._before = _seen.copy()

    @property
    def count(self) -> int:
        """Number of programs compiled."""
        return self._since("compiled")

    @property
    def hits(self) -> int:
        """Number of them that the cache had."""
        return self._since("hits")

    @property
    def misses(self) -> int:
        """Number of them that it did not have."""
        return self._since("misses")

    def _since(self, kind: str) -> int:
        return _seen[kind] - self._before[kind]


_seen: collections.Counter[str] = collections.Counter()  # of the whole process


@functools.cache
def _listen() -> None:
    """Begin to count, once for the process: jax keeps a listener for good."""

    def on_event(event: str, **_: str | int) -> None:
        if event in _CACHE_EVENTS:
            _seen[_CACHE_EVENTS[event]] += 1

    def on_duration(event: str, duration_secs: float, **_: str | int) -> None:
        _seen["compiled"] += event == "/jax/core/compile/backend_compile_duration"

    jax.monitoring.register_event_listener(on_event)
    jax.monitoring.register_event_duration_secs_listener(on_duration)


@contextlib.contextmanager
def cache_report(what: str) -> Iterator[None]:
    """Log whether a compilation in this block came from the persistent cache, if there is one."""
    compilations = Compilations()
    yield
    directory = jax.config.jax_compilation_cache_dir
    if not directory:
        log.info("%s: no compilation cache (set JAX_COMPILATION_CACHE_DIR)", what)
    else:
        log.info(
            "%s: compilation cache %s in %s",
            what,
            "hit" if compilations.hits and not compilations.misses else "miss",
            directory,
        )


class Tracer:
    """Writes a profiler trace of some steps, on every process.

    Use it as a context manager, so that an unfinished trace is written too.
    """

    def __init__(self, directory: epath.Path, steps: tuple[int, int] | None):
        """Trace the steps from first to last of `steps` into a directory; None: never."""
        self._directory, self._steps, self._first, self._last = directory, steps, None, 0

    def __enter__(self) -> "Tracer":
        return self

    def __exit__(self, *_) -> None:
        self._stop()

    def before(self, step: int) -> None:
        """Start the trace before its first step. Call before each step."""
        if self._steps and self._first is None and self._steps[0] <= step <= self._steps[1]:
            try:
                jax.profiler.start_trace(str(self._directory))
                self._first = step
            except (RuntimeError, OSError) as error:  # a notebook's own trace is under way, say
                log.warning("no trace is written (%s)", one_line(error, 160))
                self._steps = None
        self._last = step

    def after(self, step: int) -> None:
        """Call after each step."""
        if self._steps and step >= self._steps[1]:
            self._stop()

    def _stop(self) -> None:
        if self._steps and self._first is None:
            log.warning(
                "no trace was written: steps %d-%d were not among those of this run", *self._steps
            )
        elif self._steps:
            try:
                jax.profiler.stop_trace()
                log.info(
                    "wrote a trace of steps %d-%d to %s", self._first, self._last, self._directory
                )
            except (RuntimeError, OSError) as error:
                log.warning("the trace could not be written (%s)", one_line(error, 160))
        self._steps = None
