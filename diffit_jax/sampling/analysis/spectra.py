"""Radially averaged power spectra of images, and when their frequencies settle."""

import numpy as np


def radial_power(images: np.ndarray) -> np.ndarray:
    """Average the power of images over rings of the frequency plane.

    Args:
      images: (…, H, W, C), H = W.

    Returns:
      (…, R) float64, R = H // 2 + 1: mean of |FFT|² / (H W)² over frequencies whose distance from
      zero rounds to 0, 1, … H // 2 periods per image, and over channels.
    """
    side = images.shape[-2]
    spectrum = np.fft.fft2(np.asarray(images, np.float64), axes=(-3, -2)) / side**2
    power = np.mean(np.abs(spectrum) ** 2, axis=-1)
    periods = np.fft.fftfreq(side, 1 / side)
    ring = np.rint(np.hypot(periods[:, None], periods[None])).astype(int)
    rings = range(side // 2 + 1)
    return np.stack([power[..., ring == number].mean(-1) for number in rings], axis=-1)


def settled_at(estimates: np.ndarray, share: float = 0.1) -> np.ndarray:
    """Find the step from which each frequency stays as it ends.

    Args:
      estimates: (T, B, H, W, C) of the clean image, step by step.
      share: of a ring's power that may still be missing or wrong.

    Returns:
      (R,) int: the first step from which on the power of the difference from the last estimate is
      below `share` of the last estimate's, for rings as of `radial_power`.
    """
    off = radial_power(estimates - estimates[-1]).mean(1)
    within = off <= share * radial_power(estimates[-1]).mean(0)
    # The last step that is not within, and one.
    return np.where(within.all(0), 0, len(within) - np.argmin(within[::-1], axis=0))
