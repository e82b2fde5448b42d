"""The verb `sample`: from a run or a file of released weights to files of samples."""

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from diffit_jax import checkpoint, distributed, experiment, files, interruption, parallel
from diffit_jax.console import Progress
from diffit_jax.data import pixels
from diffit_jax.data.classes import give_out, parse_labels
from diffit_jax.errors import UserError
from diffit_jax.experiment import CHECKPOINTS, SNAPSHOTS, Experiment, Sampling
from diffit_jax.interop import official
from diffit_jax.sample_files import SampleParts
from diffit_jax.sampling import Sampler, Variables, batch_settings, default_labels
from diffit_jax.training import power_ema
from diffit_jax.training.state import Opened, TrainState, open_experiment

log = logging.getLogger(__name__)


class Run:
    """A network in a work directory: the averaged parameters of its newest usable checkpoint, or an average of another length."""

    def __init__(self, workdir: epath.PathLike, ema_length: float | None = None):
        """Reads the run's config; `ema_length` asks for an average made of its snapshots, see `training.power_ema`."""
        self.directory = files.resolve(workdir, "workdir")
        self.name = f"workdir {self.directory}"
        self.config = experiment.read_config(self.directory)
        self._ema_length = ema_length

    def load(self, opened: Opened) -> tuple[Variables, dict[str, Any]]:
        """(variables, what identifies them). Raises `UserError` if there is no usable checkpoint."""
        if self._ema_length is None:
            step, variables = restore_variables(self.directory, opened.state)
        else:
            lengths = opened.experiment.ema.power_lengths
            step, variables = reconstruct_variables(self.directory, opened.state, lengths, self._ema_length)
        return variables, {"workdir": str(self.directory), "checkpoint": step, "ema_length": self._ema_length}


class Weights:
    """A network in a file of released weights, sampled as a config says whose `model` gives way to the file's sizes."""

    def __init__(self, path: epath.PathLike, config: Mapping[str, Any]):
        self._path = files.resolve(path, "weights")
        self.name = f"weights {self._path}"
        self.directory = self._path.parent
        self.config = official.fit_config(config, self._path)

    def load(self, opened: Opened) -> tuple[Variables, dict[str, Any]]:
        """(variables, what identifies them)."""
        _, variables = official.load(self._path, sharding=jax.tree.map(lambda leaf: leaf.sharding, opened.state.ema_variables))
        stat = os.stat(self._path)  # etils' also asks for the owner's name, who may have none
        return variables, {"weights": str(self._path), "bytes": stat.st_size, "modified": stat.st_mtime}


def sample(
    source: epath.PathLike | Run | Weights,
    seeds: Sequence[int],
    labels: Sequence[int] | str | None = None,
    output: epath.PathLike | None = None,
    **overrides: Any,
) -> epath.Path:
    """Draws samples and writes them as an npz file and a PNG grid. Interrupted, the same call goes on where it was.

    Args:
      source: a work directory, or `Run` or `Weights`.
      seeds: one seed number per sample.
      labels: given out to the samples in turn, or text as in `parse_labels`; None: `default_labels`.
      output: path of the npz; None: `samples_NxHxWxC.npz` in the work directory or beside the weights (`latents_…` for latents). The grid
        of the first 100 has the same name with `.png`.
      **overrides: values that replace those of the config's section `sampling`.

    Returns:
      Path of the npz, laid out as ADM's evaluator reads it: `arr_0` (N, H, W, C) uint8 images (or float32 latents, scaled as the model
      takes them), `arr_1` (N,) int64 labels.

    Raises:
      UserError: no run or checkpoint there, weights that cannot be read, a label or seed out of range, settings that do not fit, an output
        that cannot be written or whose unfinished parts belong to another request.
      interruption.Preempted: the machine is about to be taken away; what is drawn is saved.
    """
    # --- Check everything before the first thing is written.
    source = source if isinstance(source, Run | Weights) else Run(source)
    opened = open_experiment(source.config, to_train=False)
    loaded, mesh = opened.experiment, opened.mesh
    num_classes, is_latent = loaded.model.num_classes, bool(loaded.data.autoencoder)
    if len(seeds) == 0 or min(seeds) < 0 or max(seeds) >= 2**32:
        raise UserError("seeds must be at least one whole number in [0, 2^32): change --seeds")
    if not num_classes and labels is not None:
        raise UserError(f"the model in {source.name} is unconditional: leave out --labels")
    if labels is None:
        labels = default_labels(seeds, num_classes)
    elif isinstance(labels, str):
        labels = parse_labels(labels, seeds, num_classes)
    else:
        labels = give_out(labels, len(seeds), num_classes)
    settings = _override(loaded.sampling, overrides)
    if settings.guide.active and settings.guidance != "autoguidance" and not num_classes:
        raise UserError(f"the model in {source.name} is unconditional: leave out --guidance_scale")
    settings = batch_settings(settings, mesh, len(seeds))
    parallel.prove_rows(mesh, settings.batch_size)
    weaker_run = weaker_opened = None
    if settings.guide.active and settings.guidance == "autoguidance":
        weaker_run, weaker_opened = _open_weaker(loaded, settings.guide_workdir)
    sampler = Sampler(loaded, mesh, settings, weaker_opened and weaker_opened.experiment.model)
    height, width, channels = loaded.model.sample_shape
    kind = "latents" if is_latent else "samples"
    name = f"{kind}_{len(seeds)}x{height}x{width}x{channels}.npz"
    output = source.directory / name if output is None else files.resolve(output, "output")
    if output.suffix != ".npz" or output.is_dir():
        raise UserError(f"--output {output} must be a file that ends in .npz: change it")
    if is_latent:
        log.info("writing latents of %s: decoding them to images needs the autoencoder, which is not there yet", loaded.data.autoencoder)
    distributed.first_then_all(lambda: files.make_directory(output.parent, "output directory"), lambda: None)

    # --- Networks.
    variables, identity = source.load(opened)
    weaker, weaker_identity = weaker_run.load(weaker_opened) if weaker_run else (None, None)

    # --- Draw, part by part.
    request = {
        "network": identity,
        "weaker network": weaker_identity,
        "seeds": _digest(seeds),
        "labels": _digest(labels),
        **{f"sampling.{name}": value for name, value in dataclasses.asdict(settings).items()},
        "config": hashlib.sha256(json.dumps(source.config, sort_keys=True, default=str).encode()).hexdigest(),
    }
    first, parts = distributed.is_first(), SampleParts(output, request)
    with distributed.first_holds(lambda: parts):
        starts = range(0, len(seeds), settings.batch_size)
        there = distributed.from_first([parts.done(index) if first else False for index in range(len(starts))])
        done = sum(min(settings.batch_size, len(seeds) - start) for start, present in zip(starts, there, strict=True) if present)
        progress = Progress("sample", len(seeds), done=done, unit="sample", shown=first)
        kept = f"{done} of {len(seeds)} samples are saved beside {output}"
        try:
            with progress, distributed.PreemptionNotice() as notice, distributed.lost_processes():
                for index, start in enumerate(starts):
                    if there[index]:
                        continue
                    batch = slice(start, start + settings.batch_size)
                    drawn = sampler.draw_batch(variables, seeds[batch], labels[batch], weaker)
                    if first:
                        parts.write(index, drawn if is_latent else np.asarray(pixels.to_pixels(drawn, settings.pixel_rounding)))
                    progress.advance(len(drawn))
                    done += len(drawn)
                    kept = f"{done} of {len(seeds)} samples are saved beside {output}"
                    if notice.reached(index) and index + 1 < len(starts):
                        raise notice.ending(kept)
        except KeyboardInterrupt as error:
            raise interruption.Interrupted(kept) from error

        def finish() -> None:
            beginning = np.concatenate([parts.read(index) for index in range(-(-min(100, len(seeds)) // settings.batch_size))])[:100]
            preview = np.asarray(pixels.latent_preview(beginning)) if is_latent else beginning
            pixels.write_png(output.with_suffix(".png"), pixels.image_grid(preview, columns=10))
            parts.finish(len(starts), labels)

        with interruption.held():  # what is complete need not be begun again
            distributed.first_then_all(finish, lambda: None)
    return output


def restore_variables(workdir: epath.PathLike, state: TrainState) -> tuple[int, Variables]:
    """Step and variables (averaged parameters, constants) of the newest usable checkpoint in a work directory.

    Args:
      workdir: of the run.
      state: shapes and shardings of its state.

    Raises:
      UserError: there is none.
    """
    shapes = state.ema_variables
    step, items = _restore_items(workdir, {"ema": shapes["params"], "constants": shapes["constants"]})
    return step, {"params": items["ema"], "constants": items["constants"]}


def _restore_items(workdir: epath.PathLike, shapes: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """Items of the newest usable checkpoint by name; one without arrays is not in a checkpoint, and comes back as it is."""
    restored = checkpoint.Checkpoints(epath.Path(workdir) / CHECKPOINTS).restore({name: tree for name, tree in shapes.items() if tree})
    if restored is None:
        raise UserError(f"workdir {workdir} holds no checkpoint: train first")
    step, items = restored
    return step, shapes | items


def reconstruct_variables(workdir: epath.PathLike, state: TrainState, lengths: Sequence[float], length: float) -> tuple[int, Variables]:
    """Step of the newest snapshot of a run, and its network's variables with averages of a length of choice.

    Args:
      workdir: of the run.
      state: shapes and shardings of its state.
      lengths: of the averages that it keeps snapshots of (`ema.power_lengths`).
      length: that is wanted.

    Raises:
      UserError: the run keeps no snapshots, one cannot be read, or an impossible length.
    """
    snapshots = checkpoint.Checkpoints(epath.Path(workdir) / SNAPSHOTS)
    steps = snapshots.steps()
    if not steps:
        raise UserError(f"workdir {workdir} has no snapshots of averages: train with ema.power_lengths, or leave out --ema_length")
    for step in steps:
        if "updates" not in snapshots.facts(step):
            raise UserError(f"snapshot {step} in {snapshots.directory} is damaged: move it away, or leave out --ema_length")
    times = [snapshots.facts(step)["updates"] for step in steps for _ in lengths]
    factors = power_ema.reconstruction(times, list(lengths) * len(steps), times[-1], length).reshape(len(steps), len(lengths))
    items = {"power_emas": {str(index): shapes for index, shapes in enumerate(state.power_emas)}}
    params = None
    with Progress("reconstruct", len(steps), unit="snapshot", shown=distributed.is_first()) as progress:
        for step, row in zip(steps, factors, strict=True):
            averages = snapshots.restore_step(step, items)["power_emas"]
            for index, factor in enumerate(row):
                params = power_ema.add_scaled(params, averages[str(index)], factor)
            progress.advance()
    _, items = _restore_items(workdir, {"constants": state.constants})
    return steps[-1], {"params": params, "constants": items["constants"]}


def _override(sampling: Sampling, overrides: Mapping[str, Any]) -> Sampling:
    """The section `sampling` with values from the command line, each of which must have an effect."""
    if "num_steps" in overrides and "respacing" in overrides:
        raise UserError("--num_steps and --respacing both say how many steps there are: leave out either")
    changed = dict(overrides)
    if "num_steps" in overrides or overrides.get("sampler") in ("euler", "heun", "dpm_solver"):
        changed.setdefault("respacing", "")  # the config's would win
    settings = dataclasses.replace(sampling, **changed)
    used = {
        "eta": settings.sampler == "ddim",
        "clip_denoised": settings.discrete,
        "guidance_scale": settings.guidance != "none",
        "guidance_power": settings.guidance == "power_cosine",
        "guidance_sigma_low": settings.guidance == "interval",
        "guidance_sigma_high": settings.guidance == "interval",
        "guide_workdir": settings.guidance == "autoguidance",
    }
    for name in overrides:
        if not used.get(name, True):
            raise UserError(f"--{name} has no effect with sampler {settings.sampler} and guidance {settings.guidance}: leave it out")
    return settings


def _open_weaker(loaded: Experiment, workdir: str) -> tuple[Run, Opened]:
    """The run of the weaker network of autoguidance, which must take and give what the main one does."""
    if not workdir:
        raise UserError("autoguidance needs a second, weaker network: name its run by --guide_workdir, or choose another guidance")
    run = Run(workdir)
    weaker = open_experiment(run.config, to_train=False)
    ours, theirs = ((e.process, e.model.sample_shape, e.model.num_classes) for e in (loaded, weaker.experiment))
    if ours != theirs:
        raise UserError(f"guide_workdir {workdir} differs in process, shape or number of classes: name a run like the main one")
    return run, weaker


def _digest(numbers: Sequence[int]) -> str:
    return f"{len(numbers)} numbers, {hashlib.sha256(np.asarray(numbers, np.int64).tobytes()).hexdigest()[:16]}"
