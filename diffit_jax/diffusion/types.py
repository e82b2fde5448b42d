"""What holds networks, diffusion processes and samplers together: small agreements, in code.

A network is a function, a process the mathematics around it, and neither knows how the other is
made. Call networks inside jit, with their variables arguments of the jitted function
(`models.as_network`): captured from outside, these would become constants of the program.

Shape suffixes: B batch, H, W, C height, width and channels of a sample.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

# Further inputs of a network, by name: `label` (B,) int. An absent key means none.
Conditioning = Mapping[str, jax.Array]
# Of a flow map: (B,) what it is told of the time to go to (absent: the noise level's own), and
# (B, 3) the guidance that it shall have in it, scale and the times between which it acts (absent:
# none).
END_TIME, TOLD_GUIDANCE = "end_time", "guidance"

# (x_BHWC, level_B, conditioning) → y_BHWC', float32; or pytrees of arrays in place of x and y, of
# one structure. What the level (B,) is, a timestep or EDM's `c_noise`, is the process's affair.
Network = Callable[[Any, jax.Array, Conditioning], Any]

# The same with EDM's noise level sigma in place of the network's own: D(x; sigma), an estimate of
# the clean sample.
Denoiser = Network

# (number) → (B, H, W, C) float32 standard normal noise, or a pytree of such, like the samples.
# Number 0 is the initial noise of a sampler, i + 1 that of its step i.
Noise = Callable[[jax.Array | int], Any]


def of_outputs(function: Callable[[jax.Array, jax.Array], jax.Array], x: Any, found: Any) -> Any:
    """Apply a function of an array x and a network's output for it, shaped like it.

    Args:
      function: of both.
      x: (B, H, W, C), or a dict of such.
      found: what a network returns for it: like x, or a tuple of outputs that are.
    """
    if isinstance(found, tuple):
        return tuple(of_outputs(function, x, each) for each in found)
    return jax.tree.map(function, x, found)


class Noised(NamedTuple):
    """Noisy data at which a network is evaluated, and what its loss is made of.

    Attributes:
      x_BHWC: what the network sees, float32.
      level_B: (B,) the network's noise level.
      target_BHWC: what the loss compares with: the clean data, their noise, or a velocity.
      weight_B: (B,) of each example's loss; `DDPM` has none.
      draws: what was drawn to make them, by name: `noise` (B, H, W, C), and `sigma` (B,) with
        `noisy`, data plus noise, or `step` or `time` (B,) with `clean`.
    """

    x_BHWC: jax.Array
    level_B: jax.Array
    target_BHWC: jax.Array
    weight_B: jax.Array
    draws: Mapping[str, jax.Array]


class Process(Protocol):
    """A diffusion process: a frozen, hashable object that sees no parameters, meshes or configs.

    In training it gives its example in two halves, `noise` before the network is evaluated and
    `loss_of` after it.
    """

    @property
    def loss_terms(self) -> tuple[str, ...]:
        """Names of the terms that `loss` reports with the loss."""
        ...

    @property
    def trains(self) -> bool:
        """Whether there is a loss, or networks are only sampled."""
        ...

    def output_channels(self, channels: int) -> int:
        """Return how many channels a network must return for data with `channels`."""
        ...

    def noise(self, x_BHWC: jax.Array, key_B: jax.Array) -> Noised:
        """Add noise to clean data, at levels of the process's choice.

        Args:
          x_BHWC: (B, H, W, C) float32 data.
          key_B: (B,) one key per example, so that an example's noise does not depend on how the
            batch is split.
        """
        ...

    def loss_of(self, noised: Noised, y_BHWC: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Compute the training loss of a network's output for `noised.x_BHWC` and `noised.level_B`.

        Returns:
          (B,) float32, and its `loss_terms`, (B,) each.
        """
        ...

    def loss(
        self, network: Network, x_BHWC: jax.Array, conditioning: Conditioning, key_B: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Compute `loss_of` a network's output for `noise`, (B,) float32, and its terms.

        Args:
          network: called once.
          x_BHWC: (B, H, W, C) float32 data.
          conditioning: passed on to the network.
          key_B: (B,) keys.
        """
        noised = self.noise(x_BHWC, key_B)
        return self.loss_of(noised, network(noised.x_BHWC, noised.level_B, conditioning))

    def denoise(
        self, network: Network, x_BHWC: jax.Array, sigma_B: jax.Array, conditioning: Conditioning
    ) -> jax.Array:
        """Evaluate the network as a `Denoiser` D(x; sigma), (B, H, W, C) float32.

        A network that returns a tuple of outputs makes a tuple of estimates.

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
        """Round noise levels to the nearest that the network knows, (n,) float64."""
        ...

    def sigmas(self, num_steps: int) -> np.ndarray:
        """Return noise levels for N steps of a sampler, (N + 1,) float64 descending, then 0."""
        ...

    def time_of(self, sigma: np.ndarray) -> np.ndarray:
        """Return the time with noise level sigma, (n,): of a flow, or t / T in [0, 1).

        The latter of a discrete schedule with T steps.
        """
        ...
