"""The verb `analyse`: attention, heads and spectra along the sampling trajectory."""

import dataclasses
import functools
import logging
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from diffit_jax import models
from diffit_jax.diffusion import samplers
from diffit_jax.diffusion.loop import at_level
from diffit_jax.errors import UserError
from diffit_jax.experiment.config import Experiment
from diffit_jax.models.model import IMAGE
from diffit_jax.run.state import Setup, setup_experiment
from diffit_jax.runtime import backend, distributed, files, parallel
from diffit_jax.sampling.analysis import heads, spectra
from diffit_jax.sampling.request import Run, Weights
from diffit_jax.sampling.sampler import default_labels

log = logging.getLogger(__name__)

STEPS, IMAGES = 18, 8
# Arrays of a layer by image and position; the variance of the last two is split.
FIELDS = ("reach", "entropy", "excess_reach")
# Means over a layer's heads that the report and a picture show.
TIME_SHARES = ("q_from_time", "v_from_time", "logits_time", "change")


@dataclasses.dataclass(frozen=True)
class Analysed:
    """What an analysis has found.

    Attributes:
      sigmas: (T,) noise levels, descending.
      frozen: noise level at which time stands still in comparisons.
      denoised: (T, B, H, W, C) estimates of the clean sample.
      layers: by layer, arrays as of `heads.measure` with T in front, and `map_frozen`.
    """

    sigmas: np.ndarray
    frozen: float
    denoised: np.ndarray
    layers: Mapping[str, Mapping[str, np.ndarray]]

    def variance(self, layer: str, name: str) -> np.ndarray:
        """Split the variance of a field, `heads.split_variance`, (H, 4) in its order."""
        field = np.moveaxis(self.layers[layer][name], 2, 0)
        return np.array([list(heads.split_variance(one).values()) for one in field])


@backend.reproducible_numerics()
@backend.explain_oom("fewer --images take less")
def analyse(
    source: Run | Weights,
    *,
    output: epath.PathLike | None = None,
    images: int = IMAGES,
    steps: int = STEPS,
    query: tuple[float, float] = (0.5, 0.5),
    frozen: float = 0.5,
    overwrite: bool = False,
) -> epath.Path:
    """Follow samples from noise to data, and write what attention does on the way.

    The trajectory is that of the unguided network with the labels 0, 1, 2 …, by Euler's method down
    the process's own noise levels. Nothing but these pictures draws on the maps of one query: all
    else is a mean over heads, images and positions, taken inside the layer.

    Args:
      source: the network.
      output: folder to write; None: `analysis` beside the network.
      images: samples that are followed.
      steps: noise levels T.
      query: (row, column) of the token whose attention is drawn, in shares of the side.
      frozen: where in the T levels time stands still in the comparisons, a share.
      overwrite: whether an analysis that is there may be replaced.

    Returns:
      The folder: `report.md`, `analysis.npz` and, where matplotlib is installed, PNGs.

    Raises:
      UserError: a network without attention, settings that cannot be, a folder that holds an
        analysis.
    """
    _check(images, steps, query, frozen)
    setup = setup_experiment(source.config, to_train=False, config_file=source.config_file)
    default = source.directory / "analysis"
    folder = files.resolve(default if output is None else output, "output")
    if (folder / "report.md").exists() and not overwrite:
        raise UserError(f"{folder} holds an analysis: name another --output, or say --overwrite")
    from diffit_jax.sampling.analysis import report  # which knows this module

    variables, origin = source.load(setup)
    analysed = follow(setup, variables, images=images, steps=steps, query=query, frozen=frozen)

    def write() -> None:
        made = files.make_directory(folder, "output")
        with files.writing(made / "analysis.npz") as file:
            found: dict[str, Any] = dict(arrays(analysed))
            np.savez_compressed(file, **found)
        try:
            for name, picture in report.pictures(analysed, setup.experiment.space).items():
                files.write_bytes(made / f"{name}.png", picture)
        except ImportError:
            log.info("no pictures of the analysis: pip install matplotlib")
        text = report.text(analysed, source.name, origin)
        files.write_bytes(made / "report.md", text.encode())  # last: with it, all is there
        log.info("wrote %s", made)

    distributed.on_primary(write)
    return folder


def _check(images: int, steps: int, query: tuple[float, float], frozen: float) -> None:
    if images < 2:
        raise UserError(f"--images is {images}: it must be at least 2, to tell images apart")
    if steps < 2:
        raise UserError(f"--steps is {steps}: it must be at least 2")
    if not all(0 <= share < 1 for share in query):
        raise UserError(f"--query {query[0]},{query[1]} must be two shares of the side in [0, 1)")
    if not 0 <= frozen <= 1:
        raise UserError(f"--frozen is {frozen}: it must be a share in [0, 1]")


def follow(
    setup: Setup,
    variables: Mapping[str, Any],
    *,
    images: int = IMAGES,
    steps: int = STEPS,
    query: tuple[float, float] = (0.5, 0.5),
    frozen: float = 0.5,
) -> Analysed:
    """Follow samples with a network's variables; arguments as of `analyse`.

    Raises:
      UserError: the network has no attention.
    """
    experiment, mesh = setup.experiment, setup.mesh
    sigmas = experiment.process.sigmas(steps)[:-1]
    level = float(sigmas[min(int(frozen * len(sigmas)), len(sigmas) - 1)])
    count = parallel.next_batch_size(mesh, images)
    way = Way(count, (*sigmas.tolist(), 0.0), query, level)
    seeds = np.arange(count)
    labels = default_labels(seeds, experiment.model.num_classes)
    batch = {"seed": seeds.astype(np.uint32), "label": labels.astype(np.int32)}
    batch = parallel.put_padded(mesh, batch, count)
    with parallel.placement(mesh):
        found = distributed.call_after_barrier(program(setup, way), variables, batch)
    denoised, layers = jax.tree.map(np.asarray, found)
    if not layers:
        raise UserError(
            f"{type(experiment.model).__name__} has no attention: there is nothing to analyse"
        )
    cut = {
        layer: {name: _first(value, name, images) for name, value in of_layer.items()}
        for layer, of_layer in sorted(layers.items(), key=lambda item: _order(item[0]))
    }
    return Analysed(sigmas, level, denoised[:, :images], cut)


def _first(value: np.ndarray, name: str, images: int) -> np.ndarray:
    """Cut off what only fills the batch."""
    return value[:, :images] if name in (*FIELDS, "map", "map_frozen") else value


@dataclasses.dataclass(frozen=True)
class Way:
    """The way from noise to data that samples are followed on.

    Attributes:
      count: samples of the batch.
      sigmas: (T + 1,) noise levels, the last one 0.
      query: as of `analyse`.
      frozen: noise level at which time stands still.
      measured: whether attention is measured; else statistics are empty: to compare costs.
    """

    count: int
    sigmas: tuple[float, ...]
    query: tuple[float, float] = (0.5, 0.5)
    frozen: float = 1.0
    measured: bool = True


def program(setup: Setup, way: Way) -> Any:
    """Return the jitted function (variables, batch of seeds and labels) → (estimates, statistics).

    Estimates are (T, B, H, W, C), statistics arrays with T in front, by layer and name.
    """
    everywhere = jax.sharding.NamedSharding(setup.mesh, jax.sharding.PartitionSpec())
    function = functools.partial(_follow, setup.experiment, way)
    return jax.jit(function, out_shardings=everywhere)


def _follow(
    experiment: Experiment, way: Way, variables: Mapping[str, Any], batch: Mapping[str, jax.Array]
) -> tuple[jax.Array, dict[str, dict[str, jax.Array]]]:
    sigmas, query = np.array(way.sigmas), way.query
    model, process = experiment.model, experiment.process
    noise = samplers.seeded_noise(batch["seed"], model.noise_shapes)(0)
    x_BHWC = jax.tree.map(lambda z: z * sigmas[0], noise)
    conditioning = {"label": batch["label"]} if model.num_classes else {}
    level_B, other_time_BT = _at_level(experiment, variables, x_BHWC, conditioning, way.frozen)

    def of_layer(attended: Any) -> Mapping[str, jax.Array]:
        return heads.measure(attended, other_time_BT, query)

    def map_alone(attended: Any) -> Mapping[str, jax.Array]:
        weights = heads.weights_of(attended.q, attended.k, attended.bias)
        return {"map_frozen": heads.one_query(weights, attended.window, query)}

    def step(x_BHWC: Any, sigma: jax.Array) -> tuple[Any, Any]:
        statistics: dict[str, dict[str, jax.Array]] = {}

        def network(x_BHWC: jax.Array, noise_level_B: jax.Array, conditioning: Any) -> jax.Array:
            if not way.measured:
                return models.as_network(model, variables)(x_BHWC, noise_level_B, conditioning)
            bind = functools.partial(models.measured_network, model, variables)
            y_BHWC, found = bind(of_layer)(x_BHWC, noise_level_B, conditioning)
            _, stood_still = bind(map_alone)(x_BHWC, level_B, conditioning)
            statistics.update({layer: {**found[layer], **stood_still[layer]} for layer in found})
            return y_BHWC

        now, following = sigma
        denoised: Any = process.denoise(network, x_BHWC, jnp.full(way.count, now), conditioning)
        x_BHWC = jax.tree.map(
            lambda clean, x: clean + following / now * (x - clean), denoised, x_BHWC
        )
        return x_BHWC, (denoised[IMAGE] if model.class_token else denoised, statistics)

    pairs = jnp.asarray(np.stack([sigmas[:-1], sigmas[1:]], axis=1), jnp.float32)
    return jax.lax.scan(step, x_BHWC, pairs)[1]


def _at_level(
    experiment: Experiment,
    variables: Mapping[str, Any],
    x_BHWC: Any,
    conditioning: Mapping[str, jax.Array],
    sigma: float,
) -> tuple[jax.Array, jax.Array]:
    """Return the network's noise level at sigma, (B,), and its time token there, (B, T)."""
    seen: dict[str, jax.Array] = {}

    def network(x_BHWC: jax.Array, noise_level_B: jax.Array, conditioning: Any) -> jax.Array:
        network = models.measured_network(
            experiment.model, variables, lambda attended: {"time": attended.time_BT}
        )
        y_BHWC, found = network(x_BHWC, noise_level_B, conditioning)
        seen["level"] = noise_level_B
        if found:
            seen["time"] = next(iter(found.values()))["time"]
        return y_BHWC

    experiment.process.denoise(network, x_BHWC, at_level(x_BHWC, sigma), conditioning)
    return seen["level"], seen.get("time", jnp.zeros((len(seen["level"]), 1)))


def _order(layer: str) -> tuple[int, int, str]:
    """Sort layers as they are used: the encoder down, the decoder up."""
    sizes = [int(number) for number in re.findall(r"\d+", layer)]
    upwards = layer.startswith("dec")
    by_size = "x" in layer  # of names like enc_16x16_block0; else a number of a stage
    first = sizes[0] if sizes else 0
    return int(upwards), first if upwards == by_size else -first, layer.zfill(40)


def arrays(analysed: Analysed) -> dict[str, np.ndarray]:
    """Return the arrays of `analysis.npz`: by layer and name, and those of the trajectory."""
    found = {"sigmas": analysed.sigmas, "frozen_sigma": np.array(analysed.frozen)}
    found["layers"] = np.array(list(analysed.layers))
    for layer, of_layer in analysed.layers.items():
        for name, value in of_layer.items():
            mean = name in FIELDS
            found[f"{layer}/{name}"] = value.mean((1, 3)) if mean else value
        for name in FIELDS[1:]:
            found[f"{layer}/{name}_variance"] = analysed.variance(layer, name)
    found["power"] = spectra.radial_power(analysed.denoised).mean(1)
    found["power_of_update"] = spectra.radial_power(np.diff(analysed.denoised, axis=0)).mean(1)
    found["settled_at"] = spectra.settled_at(analysed.denoised)
    return found
