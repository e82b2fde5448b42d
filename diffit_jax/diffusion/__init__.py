"""The mathematics between a network and a sample. A network is a function here, see `seams`."""

from diffit_jax.diffusion.ddpm import DDPM
from diffit_jax.diffusion.ddpm_samplers import DDIM, Ancestral
from diffit_jax.diffusion.edm import EDM
from diffit_jax.diffusion.guidance import GUIDANCE
from diffit_jax.diffusion.samplers import DPMSolver, Euler, Heun

PROCESSES = {"edm": EDM, "ddpm": DDPM}
SAMPLERS = {sampler.name: sampler for sampler in (Ancestral, DDIM, Euler, Heun, DPMSolver)}

__all__ = ["GUIDANCE", "PROCESSES", "SAMPLERS"]
