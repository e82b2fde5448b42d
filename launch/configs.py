"""`diffit configs`, in a checkout."""

from diffit_jax.cli import launch

if __name__ == "__main__":
    launch("configs")
