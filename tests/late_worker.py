"""A command of two processes of which one is late, three times, for test_distributed.py."""

import time

from diffit_jax import cli

CLUSTER = cli.define_cluster()


def main() -> None:
    import jax
    import numpy as np

    from diffit_jax.runtime import distributed, parallel

    first = distributed.is_primary()
    found = distributed.primary_first(lambda: time.sleep(35), lambda: "waited")
    print(found, distributed.broadcast_flag(first), distributed.all_hosts(first))

    def total(x):  # as if the second one took long to compile it
        time.sleep(0 if first else 35)
        return x.sum()

    mesh = parallel.make_mesh()
    numbers = {"x": np.arange(4)[parallel.local_batch_indices(mesh, 4)]}
    batch = parallel.put_batch(mesh, numbers, 4)
    summed = jax.jit(total, out_shardings=parallel.replicated(mesh))
    events = []
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: events.append(name))
    result = int(distributed.call_after_barrier(summed, batch["x"]))
    print(result, sum(name.endswith("backend_compile_duration") for name in events), "compiled")
    if first:
        time.sleep(65)
        print("sent")


if __name__ == "__main__":
    cli.run(main, CLUSTER)
