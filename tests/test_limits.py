"""Every attribute of every section, model and process is refused in one line where it cannot be,
whatever it is given."""

import copy
import math

import numpy as np
import pytest
from support.configs import small_config, small_latent_config

from diffit_jax import limits
from diffit_jax.errors import UserError
from diffit_jax.experiment.config import CHOICES, build, keys_of, section_classes
from diffit_jax.run.state import setup_experiment

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


# Samplers and guidance that the configs do not have.
OTHERS = {
    "image": [
        {"sampler": {"name": "dpm_solver", "num_steps": 3}},
        {"guidance": {"kind": "interval", "scale": 2.0}},
    ],
    "latent": [
        {"sampler": {"name": "ddim", "num_steps": 3}},
        {"guidance": {"kind": "autoguidance", "scale": 2.0, "workdir": "w"}},
    ],
}


def configs():
    """(kind, config as a dict)."""
    for kind, config in CONFIGS.items():
        plain = config().to_dict()
        yield kind, plain
        for other in OTHERS[kind]:
            yield kind, {**plain, "sampling": {**plain["sampling"], **other}}


def cases():
    """(kind, config, section, name) of every attribute of every config; those of a network once,
    since it is traced for each value, but for those that samplers and guidance look at."""
    seen = set()
    for kind, config in configs():
        for section, name in attributes(config):
            looked_at = name in ("num_classes", "learn_sigma")
            if section != "model" or looked_at or (kind, name) not in seen:
                yield kind, config, section, name
            seen.add((kind, name))


def attributes(config):
    """(section, name) of every attribute of a config, its defaults included."""
    yield "", "seed"
    for section, cls in section_classes(config).items():
        for name in keys_of(section, cls):
            if f"{section}.{name}" not in CHOICES:
                yield section, name
    for section in CHOICES:
        yield section.rpartition(".")[0], section.rpartition(".")[2]


@pytest.mark.parametrize(
    ("kind", "config", "section", "name"),
    cases(),
    ids=lambda value: "" if isinstance(value, dict) else str(value),
)
def test_any_value_is_taken_or_refused_in_one_line(kind, config, section, name):
    """A network up to the shapes of its state; what is refused names the key, or those that do not
    go together."""
    for value in VALUES:
        config = copy.deepcopy(config)
        node = config
        for part in section.split(".") if section else ():
            node = node.setdefault(part, {})
        node[name] = value
        try:
            setup_experiment(config) if section == "model" else build(config)
        except UserError as error:
            assert "\n" not in str(error) and name in str(error), (value, error)


def test_every_attribute_is_declared():
    """A number or text without limits beside it could not be checked."""
    for _, config in configs():
        for section, cls in section_classes(config).items():
            for name, field in keys_of(section, cls).items():
                if f"{section}.{name}" not in CHOICES:
                    assert limits.problem(object(), field.type), f"{section}.{name} takes anything"


@pytest.mark.parametrize(
    ("declared", "value", "problem"),
    [
        (limits.Count, 0, "is 0: it must be at least 1"),
        (limits.Count, 2**31, "is 2147483648: it must be between 1 and 2147483647"),
        (limits.Count, True, "is True: it must be of type int"),
        (limits.Count, 2.0, "is 2.0: it must be of type int"),
        (limits.Annotated[float, limits.fraction()], 1.5, "is 1.5: it must be between 0 and 1"),
        (
            limits.Annotated[float, limits.fraction(below_one=True)],
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
        (limits.Annotated[int, limits.at_least(1, also=(-1,))], -1, ""),
        (
            limits.Annotated[int, limits.at_least(1, also=(-1,))],
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
    assert limits.problem(value, declared) == problem
