"""What the sums of a checkpoint's arrays cost, beside saving and restoring it, at XL/2's size:
python tests/studies/checkpoint_sums.py [GIGABYTES].

Arrays of the shapes of DiffiT-XL/2's largest, float32, so many that they have these bytes."""

import sys
import tempfile
import time

import jax

from diffit_jax.runtime import checkpoint


def main(gigabytes):
    shape = (28, 1152, 4608)  # the stacked kernels of the MLPs: 0.59 GB
    count = max(1, round(gigabytes * 1e9 / (4 * 28 * 1152 * 4608)))
    # Random: what is constant would be packed to nothing.
    draw = jax.jit(lambda key: jax.random.normal(key, shape))
    tree = {f"kernel_{n}": draw(jax.random.key(n)) for n in range(count)}
    jax.block_until_ready(tree)
    size = sum(leaf.nbytes for leaf in tree.values()) / 1e9
    checkpoint.sums_of({"tree": tree})  # compiled
    began = time.monotonic()
    checkpoint.sums_of({"tree": tree})
    sums = time.monotonic() - began
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        checkpoints = checkpoint.Checkpoints(folder, keep=1)
        checkpoints.save(1, {"tree": tree}, {"step": 1})
        checkpoints.wait()
        save = time.monotonic() - began
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree
        )
        del tree
        began = time.monotonic()
        checkpoint.Checkpoints(folder).restore({"tree": abstract})
        restore = time.monotonic() - began
    print(
        f"{size:.1f} GB: sums {sums:.2f} s, {sums / save:.1%} of a save ({save:.1f} s), "
        f"{sums / restore:.1%} of a restore ({restore:.1f} s)"
    )


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 5.4)
