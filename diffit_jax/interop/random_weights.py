"""Random weights in the layout of the released ones, to try commands without a network connection.

Samples drawn with them are noise.

    python -m diffit_jax.interop.random_weights FOLDER

writes FOLDER/diffit_256.safetensors and FOLDER/sd-vae-ft-ema, an autoencoder of an eighth of the
side, as the published one. Samples are images of 64×64 pixels.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp

from diffit_jax import models
from diffit_jax.errors import UserError
from diffit_jax.interop import diffusers, official
from diffit_jax.models.diffit.latent import LatentDiffiT
from diffit_jax.models.pretrained.autoencoder import Autoencoder


def write(folder: str | Path) -> None:
    """Write both into a folder, which is made if need be. Raises `UserError` if it cannot be."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made ({error.strerror}): name another") from error
    model = LatentDiffiT(input_size=8, hidden_size=32, depth=2, num_heads=2)
    variables = models.init_variables(model, jax.random.key(0))
    # A new network answers 0: random numbers show more.
    last = variables["params"]["final"]
    last["kernel"] = 0.2 * jax.random.normal(jax.random.key(1), last["kernel"].shape)
    official.save(folder / "diffit_256.safetensors", model, variables)
    autoencoder = Autoencoder(channels=(8, 8, 8, 8), num_blocks=1, num_groups=4)
    images = jnp.zeros((1, 64, 64, 3))
    init = jax.jit(lambda key: autoencoder.init(key, images))
    diffusers.save(folder / "sd-vae-ft-ema", autoencoder, init(jax.random.key(2)))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m diffit_jax.interop.random_weights FOLDER")
    try:
        write(sys.argv[1])
    except UserError as error:
        sys.exit(f"error: {error}")
    print(f"wrote {sys.argv[1]}/diffit_256.safetensors and sd-vae-ft-ema, both random")
