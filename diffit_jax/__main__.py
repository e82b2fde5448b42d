"""`python -m diffit_jax VERB …`: the same as `diffit VERB …`."""

from diffit_jax.cli import main

if __name__ == "__main__":
    main()
