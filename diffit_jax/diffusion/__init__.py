"""The mathematics between a network and a sample. A network is a function here, see `types`."""

from diffit_jax.diffusion.ddpm import DDPM
from diffit_jax.diffusion.edm import EDM
from diffit_jax.diffusion.flow import Flow
from diffit_jax.diffusion.flow_map import FlowMap
from diffit_jax.diffusion.general_sampler import General
from diffit_jax.diffusion.guidance import GUIDANCE
from diffit_jax.diffusion.map_sampler import MapSampler
from diffit_jax.diffusion.preconditioning import IDDPM, VE, VP
from diffit_jax.diffusion.samplers import DDIM, Ancestral, DPMSolver, Euler, Heun
from diffit_jax.diffusion.sde import SDE

PROCESSES = {
    "edm": EDM,
    "ddpm": DDPM,
    "vp": VP,
    "ve": VE,
    "iddpm": IDDPM,
    "flow": Flow,
    "flow_map": FlowMap,
}
SAMPLERS = {
    "ddpm": Ancestral,
    "ddim": DDIM,
    "euler": Euler,
    "heun": Heun,
    "dpm_solver": DPMSolver,
    "general": General,
    "sde": SDE,
    "map": MapSampler,
}

__all__ = ["GUIDANCE", "PROCESSES", "SAMPLERS"]
