"""An experiment on a mesh, and the state of its run: one pytree, made, saved and restored."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from flax import struct
from jax.sharding import Mesh
from ml_collections import ConfigDict

from diffit_jax import models, platforms
from diffit_jax.data.sources import DataSpec, Source, open_dataset
from diffit_jax.errors import UserError
from diffit_jax.experiment.config import Experiment, build, class_name
from diffit_jax.run.objective import DENOISING, Objective, objective_of
from diffit_jax.run.optimizer import make_optimizer
from diffit_jax.run.representation import arrays_beside, encoder_of_features
from diffit_jax.runtime import backend, parallel
from diffit_jax.runtime.checkpoint import Checkpoints


@struct.dataclass
class TrainState:
    """Everything that an update changes. All float32 but the counters.

    Attributes:
      step: int32 scalar, batches seen so far; the data position and all random numbers follow from
        it.
      skipped: int32 scalar, how many of them made no update because the gradient was not finite.
      consecutive_skipped: int32 scalar, how many of the last ones; checkpoints and logs call it
        `skipped_in_row`.
      params: parameters of the network.
      constants: fixed arrays of the network, which training does not change.
      opt_state: state of the optax optimizer.
      ema: moving average of `params`.
      power_emas: one more average for each of `ema.power_lengths`.
      objective: `params` and `opt_state` of the objective's own parameters; {} if it has none.
    """

    step: jax.Array
    skipped: jax.Array
    consecutive_skipped: jax.Array
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


@backend.reproducible_numerics()
def abstract_variables(experiment: Experiment, mesh: Mesh) -> Any:
    """Return shapes, dtypes and shardings of the network's variables; allocate nothing."""
    shapes = models.initial_shapes(experiment.model)
    return parallel.abstract(mesh, shapes, models.parameter_metadata(experiment.model))


@backend.reproducible_numerics()
def abstract_state(
    experiment: Experiment, mesh: Mesh, objective: Objective | None = None
) -> TrainState:
    """Return the state's shapes, dtypes and shardings as `ShapeDtypeStruct`s; allocate nothing.

    Args:
      experiment: model, optimizer and averages.
      mesh: the devices.
      objective: whose parameters the state has too; None: no such parameters.
    """
    shapes = jax.eval_shape(lambda: _init(experiment, objective))
    metadata = models.parameter_metadata(experiment.model)
    ours = parallel.abstract(mesh, shapes.objective)  # a copy on each device
    return parallel.abstract(mesh, shapes.replace(objective={}), metadata).replace(objective=ours)


@backend.reproducible_numerics()
def create_state(
    experiment: Experiment, mesh: Mesh, objective: Objective = DENOISING
) -> TrainState:
    """Initialise a state by one jitted function straight into its shardings."""
    abstract = abstract_state(experiment, mesh, objective)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    init = jax.jit(lambda: _init(experiment, objective), out_shardings=shardings)
    return init.lower().compile(platforms.of_mesh(mesh).once)()


@jax.jit
def all_finite(state: TrainState) -> jax.Array:
    """Whether parameters and averages have no NaN or infinity, a bool scalar."""
    leaves = jax.tree.leaves((state.params, state.ema, state.power_emas, state.objective))
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in leaves]))


def fresh_state(
    variables: Mapping[str, Any], experiment: Experiment, objective: Objective | None = None
) -> TrainState:
    """Return the state before the first update, from the variables of the experiment's network.

    With the objective's own parameters, drawn with the experiment's seed.
    """
    params, constants = variables["params"], variables["constants"]
    optimizer = make_optimizer(experiment.optimizer, experiment.model)
    copies = [jax.tree.map(jnp.copy, params) for _ in range(1 + len(experiment.ema.power_lengths))]
    zero, ours = jnp.zeros((), jnp.int32), {}
    key = jax.random.fold_in(jax.random.key(experiment.seed, impl="threefry2x32"), 1)
    if objective and (own := objective.init(experiment, key)):
        ours = {"params": own, "opt_state": optimizer.init(own)}
    return TrainState(
        step=zero,
        skipped=zero,
        consecutive_skipped=zero,
        params=params,
        constants=constants,
        opt_state=optimizer.init(params),
        ema=copies[0],
        power_emas=tuple(copies[1:]),
        objective=ours,
    )


def _init(experiment: Experiment, objective: Objective | None) -> TrainState:
    key = jax.random.key(experiment.seed, impl="threefry2x32")
    return fresh_state(models.init_variables(experiment.model, key), experiment, objective)


def save_state(checkpoints: Checkpoints, state: TrainState, batch_size: int) -> None:
    """Start writing a checkpoint of the state.

    The averages are items of their own, for those who only sample.
    """
    step, updates = int(state.step), int(state.step) - int(state.skipped)
    soundness = {
        "updates": updates,
        "skipped_in_row": int(state.consecutive_skipped),
        "finite": bool(all_finite(state)),
    }
    checkpoints.save(
        step, items_of(state), {"step": step, "images_seen": step * batch_size} | soundness
    )


def restore_state(
    checkpoints: Checkpoints, abstract: TrainState, allow_nonfinite: bool = False
) -> TrainState | None:
    """Restore the newest usable checkpoint into the shapes and shardings of `abstract`.

    Returns:
      None if there is no checkpoint.
    """
    restored = checkpoints.restore(items_of(abstract), allow_nonfinite=allow_nonfinite)
    if restored is None:
        return None
    _, items = restored
    power_emas = tuple(items["power_emas"][name] for name, _ in named(abstract.power_emas))
    separate = {
        "ema": items["ema"],
        "power_emas": power_emas,
        "constants": items.get("constants", abstract.constants),
        "objective": items.get("objective", {}),
    }
    fields = dict(items["state"])
    fields["consecutive_skipped"] = fields.pop("skipped_in_row")
    return TrainState(**fields | separate)


def items_of(state: TrainState) -> dict[str, Any]:
    """Divide a state, or its shapes, into the named items of a checkpoint."""
    kept = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    kept["skipped_in_row"] = kept.pop("consecutive_skipped")  # its name in checkpoints
    kept |= {"ema": None, "power_emas": (), "constants": None}
    del kept["objective"]  # an item of its own, see below
    items: dict[str, Any] = {"state": kept, "ema": state.ema}
    if state.constants:
        items["constants"] = state.constants
    if state.power_emas:
        items["power_emas"] = dict(named(state.power_emas))
    if state.objective:
        items["objective"] = state.objective
    return items


def named(trees: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """Yield ("0", tree), ("1", tree) …: the names of averages in a checkpoint."""
    return ((str(index), tree) for index, tree in enumerate(trees))


@dataclasses.dataclass(frozen=True)
class Setup:
    """An experiment on a mesh, checked.

    Attributes:
      experiment: the config as typed values.
      mesh: the devices.
      objective: what training minimises.
    """

    experiment: Experiment
    mesh: Mesh
    objective: Objective

    @functools.cached_property
    def variables(self) -> Any:
        """Shapes, dtypes and shardings of the network's variables; samples are drawn with such."""
        return abstract_variables(self.experiment, self.mesh)

    @functools.cached_property
    def state(self) -> TrainState:
        """Shapes, dtypes and shardings of a run's state."""
        return abstract_state(self.experiment, self.mesh, self.objective)


def setup_experiment(
    config: ConfigDict | Mapping[str, Any],
    devices: Sequence[Any] | None = None,
    to_train: bool = True,
    config_file: epath.PathLike | None = None,
    objective: Objective | None = None,
) -> Setup:
    """Check everything about a config before anything is allocated or written.

    Verbs that train, sample or price a config begin with it.

    Args:
      config: of the experiment.
      devices: to use; None: all of all processes. Descriptions of devices that are not there
        (`preflight`) will do.
      to_train: whether its training batch is needed, and so a mesh that divides it; otherwise a
        mesh that does not fit the devices gives way to one that does.
      config_file: of the work directory that the config was read from, see `experiment.build`.
      objective: what training minimises; None: see `objective_of`.

    Raises:
      UserError: an impossible config, mesh or batch.
    """
    experiment = build(config, config_file)
    training = experiment.training
    objective = objective_of(experiment) if objective is None else objective
    if to_train:
        if not experiment.process.trains:
            name = class_name("process", experiment.process)
            raise UserError(
                f"config key process.name is {name}: its networks are only sampled; train with "
                "ddpm, edm, vp or ve"
            )
        if experiment.model.attention == "pallas":
            backend, reason = experiment.model.attention_backend("tpu")
            if backend != "pallas":
                raise UserError(f"config key model.attention is pallas, but {reason}: use auto")
        mesh = parallel.make_mesh(devices, experiment.mesh)
        parallel.check_batch_size(
            mesh, training.batch_size, "training.batch_size", parts=training.accumulation
        )
    else:
        mesh = parallel.any_mesh(devices, experiment.mesh)
    if experiment.model.tries_kernel:
        parallel.try_kernel(mesh, forward_mode=to_train and experiment.model.is_map)
    setup = Setup(experiment, mesh, objective)
    metadata = models.parameter_metadata(experiment.model)
    parallel.check_axes(mesh, setup.variables["params"], metadata)
    return setup


def open_training_data(experiment: Experiment, split: str = "train") -> Source:
    """Open the data set that an experiment trains on; "test": the split that it does not see."""
    data, model = experiment.data, experiment.model
    further: dict[str, Any] = {"latent_mean": data.latent_mean, "latent_scale": data.latent_scale}
    if split == "train":
        further["arrays"] = arrays_beside(experiment)
        further["encoder"] = encoder_of_features(experiment)
    wanted = DataSpec(model.sample_shape, model.num_classes, experiment.space.example, **further)
    return open_dataset(data.name, split, data.data_dir, wanted)
