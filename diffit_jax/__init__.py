"""DiffiT, Diffusion Vision Transformers for Image Generation, in JAX and Flax."""

__version__ = "0.2.0"
