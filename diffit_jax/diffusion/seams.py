"""What holds networks, diffusion processes and samplers together: small agreements, in code.

A network is a function, a process the mathematics around it, and neither knows how the other is
made. Call networks inside jit, with their variables arguments of the jitted function
(`models.as_network`): captured from outside, these would become constants of the program.

Shape suffixes: B batch, H, W, C height, width and channels of a sample.
"""

from collections.abc import Callable, Mapping
from typing import Protocol

import jax
import numpy as np

# What a network is told beside its input, by name: `label` (B,) int. An absent key means none.
Conditioning = Mapping[str, jax.Array]

# (x_BHWC, level_B, conditioning) → y_BHWC', float32. What the level (B,) is, a timestep or EDM's
# `c_noise`, is the affair of the process.
Network = Callable[[jax.Array, jax.Array, Conditioning], jax.Array]

# The same with EDM's noise level sigma in place of the network's own: D(x; sigma), an estimate of
# the clean sample.
Denoiser = Network

# (number) → (B, H, W, C) float32 standard normal noise. Number 0 is the initial noise of a sampler,
# i + 1 that of its step i.
Noise = Callable[[jax.Array | int], jax.Array]


class Process(Protocol):
    """A diffusion process: a frozen, hashable object that sees no parameters, meshes or configs."""

    @property
    def loss_terms(self) -> tuple[str, ...]:
        """Names of what `loss` reports beside the loss."""
        ...

    @property
    def trains(self) -> bool:
        """Whether there is a loss, or networks are only sampled."""
        ...

    def output_channels(self, channels: int) -> int:
        """How many channels a network must return for data with `channels`."""
        ...

    def loss(
        self, network: Network, x_BHWC: jax.Array, conditioning: Conditioning, key_B: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The training loss of clean data at noise levels of the process's choice.

        Args:
          network: called once.
          x_BHWC: (B, H, W, C) float32 data.
          conditioning: passed on to the network.
          key_B: (B,) one key per example, so that an example's noise does not depend on how the
            batch is split.

        Returns:
          (B,) float32 loss, and its `loss_terms`, (B,) each.
        """
        ...

    def denoise(
        self, network: Network, x_BHWC: jax.Array, sigma_B: jax.Array, conditioning: Conditioning
    ) -> jax.Array:
        """D(x; sigma): the network as a `Denoiser`, (B, H, W, C) float32.

        Args:
          network: called once.
          x_BHWC: (B, H, W, C) float32 clean data plus noise of standard deviation sigma.
          sigma_B: (B,) float32 > 0.
          conditioning: passed on to the network.
        """
        ...

    @property
    def sigma_range(self) -> tuple[float, float]:
        """The lowest and the highest noise level that the network knows."""
        ...

    def round_sigma(self, sigma: np.ndarray) -> np.ndarray:
        """(n,) float64 noise levels → the nearest ones that the network knows."""
        ...

    def sigmas(self, num_steps: int) -> np.ndarray:
        """(N + 1,) float64 descending noise levels for N steps of a sampler, the last one 0."""
        ...

    def time_of(self, sigma: np.ndarray) -> np.ndarray:
        """Share t / T, in [0, 1), of a discrete schedule that has the noise level sigma, (n,)."""
        ...
