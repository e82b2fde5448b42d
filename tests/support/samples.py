"""What samples of every network and sampler have to be."""

import numpy as np

from diffit_jax.sampling.sample import sample


def assert_samples_follow_their_seeds(workdir, settings, folder):
    """Finite, varied, and each a function of its seed: among others it is the same."""
    given = {"overrides": settings, "overwrite": True}
    four = np.load(sample(workdir, seeds=range(4), output=folder / "4.npz", **given))["arr_0"]
    others = [2, 9, 7, 8]
    again = np.load(sample(workdir, seeds=others, output=folder / "o.npz", **given))["arr_0"]
    assert np.isfinite(four).all() and four.std() > 0.1
    np.testing.assert_allclose(again[0], four[2], rtol=0, atol=1e-5 * np.abs(four).max())
