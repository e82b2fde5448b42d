"""An experiment: a config as typed values."""

from diffit_jax.experiment.config import (
    Experiment,
    build,
    class_name,
    given_config,
    keys_of,
    section_classes,
)
