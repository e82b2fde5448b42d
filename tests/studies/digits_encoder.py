"""The small encoder that stands in for DINOv2 on digits: trained on their labels.

    python tests/studies/digits_encoder.py [FILE]

A DINOv2 of two blocks, width 64 and one head sees digits as REPA's rule enlarges them, in turns as
8×8 patches, one for each pixel of a digit, and as 4×4. Its class token is classified; patch tokens
get the gradient through attention. FILE (default: digits_encoder.safetensors of `interop`) gets its
tensors under the released names, float16. The accuracy on held-out digits is printed. (It takes a
CPU 3 minutes.)
"""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors.numpy import save_file

from diffit_jax.data import digits
from diffit_jax.interop import dinov2 as interop
from diffit_jax.models.pretrained import resizing
from diffit_jax.models.pretrained.dinov2 import ENCODERS

STEPS, BATCH, GRIDS = 3_000, 32, (8, 4)
MODULE = ENCODERS["digits"]


def init(key: jax.Array) -> dict:
    shapes = jax.eval_shape(MODULE.init, key, jnp.zeros((1, 14, 14, 3)))
    leaves, tree = jax.tree_util.tree_flatten_with_path(shapes)
    drawn = []
    for number, (path, leaf) in enumerate(leaves):
        name = path[-1].key
        normal = jax.random.normal(jax.random.fold_in(key, number), leaf.shape)
        if name == "kernel":
            drawn.append(normal * leaf.shape[-2] ** -0.5)
        elif name in ("scale", "scale_attention", "scale_mlp"):
            drawn.append(jnp.ones(leaf.shape))
        elif name == "bias":
            drawn.append(jnp.zeros(leaf.shape))
        else:
            drawn.append(0.02 * normal)
    head = 0.1 * jax.random.normal(jax.random.fold_in(key, len(drawn)), (MODULE.width, 10))
    return {"encoder": jax.tree.unflatten(tree, drawn), "head": head}


def logits(params: dict, images: jax.Array, grid: int) -> jax.Array:
    pictures = jnp.repeat(images.astype(jnp.float32), 3, axis=-1)
    seen = resizing.RULES["repa"].apply(pictures, (MODULE.patch * grid, MODULE.patch * grid))
    return MODULE.apply(params["encoder"], seen).class_BD @ params["head"]


def main(path: str) -> None:
    params, draws = init(jax.random.key(0)), np.random.default_rng(0)
    optimizer = optax.adamw(optax.cosine_decay_schedule(1e-3, STEPS), weight_decay=0.05)
    state = optimizer.init(params)

    @functools.partial(jax.jit, static_argnums=4)
    def update(params, state, images, labels, grid):
        def loss(params):
            losses = optax.softmax_cross_entropy_with_integer_labels
            return losses(logits(params, images, grid), labels).mean()

        value, gradient = jax.value_and_grad(loss)(params)
        change, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, change), state, value

    images, labels = digits.read("train", "")
    for step in range(STEPS):
        some = draws.choice(len(images), BATCH, replace=False)
        params, state, value = update(params, state, images[some], labels[some], GRIDS[step % 2])
        if step % 251 == 0:
            print(step, float(value), flush=True)
    held, classes = digits.read("test", "")
    classify = jax.jit(logits, static_argnums=2)
    for grid in GRIDS:
        parts = np.array_split(held, 6)
        found = np.concatenate([classify(params, part, grid).argmax(1) for part in parts])
        print(f"held-out accuracy, {grid}x{grid}: {np.mean(found == classes):.4f}")
    tensors = interop.released_tensors(MODULE, params["encoder"])
    save_file({name: array.astype(np.float16) for name, array in tensors.items()}, path)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else str(interop.DIGITS_FILE))
