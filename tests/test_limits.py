"""Every attribute of every section, model and process is refused in one line where it cannot be,
whatever it is given."""

import dataclasses
import math

import flax.linen as nn
import numpy as np
import pytest
from conftest import small_config, small_latent_config

from diffit_jax import limits
from diffit_jax.errors import UserError
from diffit_jax.experiment import build
from diffit_jax.training.state import open_experiment

CONFIGS = {"image": small_config, "latent": small_latent_config}
VALUES = (
    0,
    -1,
    1,
    2,
    3,
    7,
    -7,
    10**12,
    10**400,
    0.0,
    -0.5,
    1e-300,
    1e300,
    math.nan,
    math.inf,
    -math.inf,
    None,
    True,
    "",
    "x",
    "None",
    (),
    (0,),
)
VALUES += ((1, -2), ("a",), (None,), [3, 0], {}, np.float32(1.5), np.int64(2), b"x")


def attributes(config):
    """(section, name) of every attribute of a config, its defaults included."""
    for section, value in vars(build(config)).items():
        if not dataclasses.is_dataclass(value):
            yield "", section
            continue
        for field in dataclasses.fields(value):
            if not (isinstance(value, nn.Module) and field.name in ("parent", "name")):
                yield section, field.name


@pytest.mark.parametrize(
    ("kind", "section", "name"),
    [(kind, *key) for kind, config in CONFIGS.items() for key in attributes(config())],
)
def test_any_value_is_taken_or_refused_in_one_line(kind, section, name):
    """A network up to the shapes of its state; what is refused names the key, or those that do not
    go together."""
    for value in VALUES:
        config = CONFIGS[kind]().to_dict()
        (config.setdefault(section, {}) if section else config)[name] = value
        try:
            open_experiment(config) if section == "model" else build(config)
        except UserError as error:
            assert "\n" not in str(error) and name in str(error), (value, error)


def test_every_attribute_is_declared():
    """A number or text without limits beside it could not be checked."""
    from diffit_jax.diffusion.guidance import Guidance
    from diffit_jax.diffusion.samplers import Churn
    from diffit_jax.experiment import PROCESSES
    from diffit_jax.models import MODELS
    from diffit_jax.runtime.parallel import MeshShape
    from diffit_jax.sections import EMA, Data, Optimizer, Sampling, Training

    for kind in (
        Data,
        Optimizer,
        EMA,
        Training,
        Sampling,
        MeshShape,
        Guidance,
        Churn,
        *PROCESSES.values(),
        *MODELS.values(),
    ):
        for field in dataclasses.fields(kind):
            if issubclass(kind, nn.Module) and field.name in ("parent", "name"):
                continue
            assert limits._problem(object(), field.type), (
                f"{kind.__name__}.{field.name} takes anything"
            )


@pytest.mark.parametrize(
    ("declared", "value", "problem"),
    [
        (limits.Count, 0, "is 0: it must be at least 1"),
        (limits.Count, 2**31, "is 2147483648: it must be between 1 and 2147483647"),
        (limits.Count, True, "is True: it must be of type int"),
        (limits.Count, 2.0, "is 2.0: it must be of type int"),
        (limits.Annotated[float, limits.share()], 1.5, "is 1.5: it must be between 0 and 1"),
        (
            limits.Annotated[float, limits.share(below_one=True)],
            1,
            "is 1: it must be between 0 and 1, and not the latter",
        ),
        (
            limits.Annotated[float, limits.at_least(0)],
            math.inf,
            "is inf: it must be finite and at least 0",
        ),
        (limits.Annotated[float, limits.at_least(0, infinite=True)], math.inf, ""),
        (
            limits.Annotated[float, limits.at_least(0, infinite=True)],
            math.nan,
            "is nan: it must be finite and at least 0",
        ),
        (float, -math.inf, "is -inf: it must be a finite number"),
        (limits.Annotated[int, limits.at_least(1, besides=(-1,))], -1, ""),
        (
            limits.Annotated[int, limits.at_least(1, besides=(-1,))],
            0,
            "is 0: it must be at least 1, or -1",
        ),
        (limits.Dtype, "float16", "is 'float16': use float32 or bfloat16"),
        (limits.Dtype, "bfloat16", ""),
        (
            limits.Annotated[limits.Sequence[limits.Count], limits.at_least(1)],
            (),
            r"is (): it must have at least 1 entries",
        ),
        (limits.Sequence[limits.Count], (3, 0), "has 0: each must be at least 1"),
        (limits.Sequence[limits.Count], "33", "is '33': it must be a list"),
    ],
)
def test_what_is_said(declared, value, problem):
    assert limits._problem(value, declared) == problem
