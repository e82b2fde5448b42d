"""Sizes of the latent network: the paper's counts, names, and what does not fit together."""

import jax
import pytest
from support.counts import multiply_adds

from diffit_jax import models
from diffit_jax.errors import UserError
from diffit_jax.models.diffit.latent import SIZES, LatentDiffiT, named_size
from diffit_jax.models.model import traced_multiply_adds

SMALL = dict(
    input_size=8,
    input_channels=2,
    patch_size=2,
    hidden_size=16,
    depth=3,
    num_heads=2,
    num_classes=5,
)


def count(model):
    return sum(
        leaf.size
        for leaf in jax.tree.leaves(
            jax.eval_shape(lambda: models.init_variables(model, jax.random.key(0)))["params"]
        )
    )


def test_full_size_parameters():
    xl = named_size("XL/2")
    assert count(LatentDiffiT(32, **xl)) == 561_035_232
    assert count(LatentDiffiT(64, **xl)) == 562_382_816
    # Without the key's time projection, 28 × 1152², and its bias and the key's own.
    assert (
        561_035_232 - count(LatentDiffiT(32, **xl, slim_tmsa=True))
        == 37_223_424
        == 37_158_912 + 28 * 2 * 1152
    )
    nine = count(LatentDiffiT(32, **(xl | {"num_heads": 9})))
    assert 561_035_232 - nine == 28 * 7 * 31**2  # only the bias table knows the heads


@pytest.mark.parametrize(("input_size", "giga"), [(32, 118.507), (64, 524.424)])
def test_full_size_multiply_adds(input_size, giga):
    """The closed form agrees with the paper's count and, but for the key's time projection, with
    what is traced."""
    model = LatentDiffiT(input_size, **named_size("XL/2"))
    parts = multiply_adds(model)
    assert round(sum(parts.values()) / 1e9, 3) == giga
    for slim, never_computed in ((False, 28 * 1152**2), (True, 0)):
        model = model.clone(slim_tmsa=slim)
        assert traced_multiply_adds(model) == sum(multiply_adds(model).values()) - never_computed


def test_named_sizes():
    """Each block has 15 width² weights: 3 for q, k and v, 3 for their time projections, 1 after
    attention, 8 in the MLP."""
    for name, size in SIZES.items():
        assert (
            1
            < count(LatentDiffiT(32, **named_size(name)))
            / (15 * size["depth"] * size["hidden_size"] ** 2)
            < 1.04
        )
    with pytest.raises(UserError, match="model size 'M/2' is unknown: use S/2, B/2, L/2, XL/2"):
        named_size("M/2")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(input_size=9), "input_size 9 is not divisible by patch_size 2"),
        (dict(num_heads=3), "hidden_size 16 is not a multiple of num_heads 3"),
        (dict(hidden_size=18), "hidden_size 18 is not a multiple of num_heads 2 and of 4"),
        (dict(depth=0), "depth is 0: it must be at least 1"),
        (dict(remat="some"), "remat is 'some': use none, dots, full"),
    ],
)
def test_sizes_that_do_not_fit(change, message):
    with pytest.raises(UserError, match=message):
        LatentDiffiT(**(SMALL | change)).check()
