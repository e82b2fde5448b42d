"""The networks, as pure Flax modules: arrays in, arrays out."""

from diffit_jax.models.diffit.image import ImageDiffiT
from diffit_jax.models.diffit.latent import LatentDiffiT
from diffit_jax.models.model import (
    Model,
    as_network,
    describe_attention,
    init_variables,
    initial_shapes,
    measured_network,
    parameter_metadata,
    variable_shapes,
)
from diffit_jax.models.unet.songunet import SongUNet

MODELS = {"image_diffit": ImageDiffiT, "latent_diffit": LatentDiffiT, "songunet": SongUNet}
