"""`diffit encode`, in a checkout."""

from diffit_jax.__main__ import launch

if __name__ == "__main__":
    launch("encode")
