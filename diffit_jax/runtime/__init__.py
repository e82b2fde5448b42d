"""What any JAX program needs, without diffusion."""
