"""A command of two processes that are not done at the same time, for test_distributed.py."""

import time

from diffit_jax import cli

CLUSTER = cli.define_cluster()


def main() -> None:
    from diffit_jax.runtime import distributed

    first = distributed.is_first()
    found = distributed.first_then_all(lambda: time.sleep(35), lambda: "waited")
    print(found, distributed.agreed(first), distributed.everywhere(first))
    if first:
        time.sleep(65)
        print("sent")


if __name__ == "__main__":
    cli.run(main, CLUSTER)
