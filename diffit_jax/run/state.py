"""An experiment on a mesh, and the state of its run: one pytree, made, saved and restored."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from flax import struct
from jax.sharding import Mesh
from ml_collections import ConfigDict

from diffit_jax import models
from diffit_jax.data.sources import Source, Wanted, open_dataset
from diffit_jax.errors import UserError
from diffit_jax.experiment.config import Experiment, build, class_name
from diffit_jax.run.objective import DENOISING, Objective
from diffit_jax.run.optimizer import make_optimizer
from diffit_jax.runtime import backend, parallel
from diffit_jax.runtime.checkpoint import Checkpoints


@struct.dataclass
class TrainState:
    """Everything that an update changes. All float32 but the counters.

    Attributes:
      step: int32 scalar, batches seen so far; the data position and all random numbers follow from
        it.
      skipped: int32 scalar, how many of them made no update because the gradient was not finite.
      skipped_in_row: int32 scalar, how many of the last ones.
      params: parameters of the network.
      constants: fixed arrays of the network, which training does not change.
      opt_state: state of the optax optimizer.
      ema: moving average of `params`.
      power_emas: one more average for each of `ema.power_lengths`.
      objective: `params` and `opt_state` of the objective's own parameters; {} if it has none.
    """

    step: jax.Array
    skipped: jax.Array
    skipped_in_row: jax.Array
    params: Any
    constants: Any
    opt_state: Any
    ema: Any
    power_emas: tuple[Any, ...]
    objective: Any = struct.field(default_factory=dict)

    @property
    def ema_variables(self) -> dict[str, Any]:
        """The network's variables with the averaged parameters: what samples are drawn with."""
        return {"params": self.ema, "constants": self.constants}


@backend.pinned()
def abstract_state(
    experiment: Experiment, mesh: Mesh, objective: Objective | None = None
) -> TrainState:
    """Shapes, dtypes and shardings of the state, as `ShapeDtypeStruct`s; allocates nothing.
    `objective`: whose parameters it has too."""
    shapes = jax.eval_shape(lambda: _init(experiment, objective))
    facts = models.parameter_facts(experiment.model)
    ours = parallel.abstract(mesh, shapes.objective)  # a copy on each device
    return parallel.abstract(mesh, shapes.replace(objective={}), facts).replace(objective=ours)


@backend.pinned()
def create_state(
    experiment: Experiment, mesh: Mesh, objective: Objective = DENOISING
) -> TrainState:
    """A fresh state, made by one jitted function straight into its shardings."""
    abstract = abstract_state(experiment, mesh, objective)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return jax.jit(lambda: _init(experiment, objective), out_shardings=shardings)()


@jax.jit
def all_finite(state: TrainState) -> jax.Array:
    """Whether parameters and averages have no NaN or infinity, a bool scalar."""
    leaves = jax.tree.leaves((state.params, state.ema, state.power_emas, state.objective))
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in leaves]))


def fresh_state(variables: Mapping[str, Any], experiment: Experiment) -> TrainState:
    """The state before the first update, from the variables of the experiment's network."""
    params, constants = variables["params"], variables["constants"]
    optimizer = make_optimizer(experiment.optimizer, experiment.model)
    copies = [jax.tree.map(jnp.copy, params) for _ in range(1 + len(experiment.ema.power_lengths))]
    zero = jnp.zeros((), jnp.int32)
    return TrainState(
        step=zero,
        skipped=zero,
        skipped_in_row=zero,
        params=params,
        constants=constants,
        opt_state=optimizer.init(params),
        ema=copies[0],
        power_emas=tuple(copies[1:]),
    )


def _init(experiment: Experiment, objective: Objective | None) -> TrainState:
    key = jax.random.key(experiment.seed, impl="threefry2x32")
    state = fresh_state(models.init_variables(experiment.model, key), experiment)
    params = objective and objective.init(experiment, jax.random.fold_in(key, 1))
    if not params:
        return state
    optimizer = make_optimizer(experiment.optimizer, experiment.model)
    return state.replace(objective={"params": params, "opt_state": optimizer.init(params)})


def save_state(checkpoints: Checkpoints, state: TrainState, batch_size: int) -> None:
    """Starts writing a checkpoint of the state; what samples are drawn with is in items of its own,
    for those who only sample."""
    step, updates = int(state.step), int(state.step) - int(state.skipped)
    soundness = {
        "updates": updates,
        "skipped_in_row": int(state.skipped_in_row),
        "finite": bool(all_finite(state)),
    }
    checkpoints.save(
        step, items_of(state), {"step": step, "images_seen": step * batch_size} | soundness
    )


def restore_state(
    checkpoints: Checkpoints, abstract: TrainState, allow_nonfinite: bool = False
) -> TrainState | None:
    """The state of the newest usable checkpoint, laid out as `abstract` says; None if there is no
    checkpoint."""
    restored = checkpoints.restore(items_of(abstract), allow_nonfinite=allow_nonfinite)
    if restored is None:
        return None
    _, items = restored
    power_emas = tuple(items["power_emas"][name] for name, _ in named(abstract.power_emas))
    apart = {
        "ema": items["ema"],
        "power_emas": power_emas,
        "constants": items.get("constants", abstract.constants),
        "objective": items.get("objective", {}),
    }
    return TrainState(**items["state"] | apart)


def items_of(state: TrainState) -> dict[str, Any]:
    kept = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    kept |= {"ema": None, "power_emas": (), "constants": None}
    del kept["objective"]  # as checkpoints have it since there is such
    items: dict[str, Any] = {"state": kept, "ema": state.ema}
    if state.constants:
        items["constants"] = state.constants
    if state.power_emas:
        items["power_emas"] = dict(named(state.power_emas))
    if state.objective:
        items["objective"] = state.objective
    return items


def named(trees: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """("0", tree), ("1", tree) …: how several averages are named in a checkpoint."""
    return ((str(index), tree) for index, tree in enumerate(trees))


@dataclasses.dataclass(frozen=True)
class Opened:
    """An experiment on a mesh, checked.

    Attributes:
      experiment: the config as typed values.
      mesh: the devices.
      state: shapes, dtypes and shardings of a run's state; its `ema_variables` are those that
        samples are drawn with.
      objective: what training minimises.
    """

    experiment: Experiment
    mesh: Mesh
    state: TrainState
    objective: Objective = DENOISING


def open_experiment(
    config: ConfigDict | Mapping[str, Any],
    devices: Sequence[Any] | None = None,
    to_train: bool = True,
    config_file: epath.PathLike | None = None,
    objective: Objective = DENOISING,
) -> Opened:
    """Checks everything about a config that can be checked before anything is allocated, compiled
    or written: what every verb begins with.

    Args:
      config: of the experiment.
      devices: to use; None: all of all processes. Descriptions of devices that are not there
        (`preflight`) will do.
      to_train: whether its training batch is needed, and so a mesh that divides it; otherwise a
        mesh that does not fit the devices gives way to one that does.
      config_file: of the work directory that the config was read from, see `experiment.build`.
      objective: what training minimises.

    Raises:
      UserError: a config, mesh or batch that cannot be.
    """
    experiment = build(config, config_file)
    training = experiment.training
    if to_train:
        if not experiment.process.trains:
            name = class_name("process", experiment.process)
            raise UserError(
                f"config key process.name is {name}: its networks are only sampled; train with "
                "ddpm, edm, vp or ve"
            )
        mesh = parallel.make_mesh(devices, experiment.mesh)
        parallel.check_batch_size(
            mesh, training.batch_size, "training.batch_size", parts=training.accumulation
        )
    else:
        mesh = parallel.any_mesh(devices, experiment.mesh)
    if experiment.model.tries_kernel:
        parallel.try_kernel(mesh)
    # What is only drawn from needs no parameters of an objective.
    state = abstract_state(experiment, mesh, objective if to_train else None)
    parallel.check_axes(mesh, state.params, models.parameter_facts(experiment.model))
    return Opened(experiment, mesh, state, objective)


def open_training_data(experiment: Experiment, split: str = "train") -> Source:
    """The data set that an experiment trains on; "test": the split that it does not see."""
    data, model = experiment.data, experiment.model
    scaling = {"latent_mean": data.latent_mean, "latent_scale": data.latent_scale}
    wanted = Wanted(model.sample_shape, model.num_classes, experiment.space.example, **scaling)
    return open_dataset(data.name, split, data.data_dir, wanted)
