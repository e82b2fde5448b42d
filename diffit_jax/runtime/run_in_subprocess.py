"""Functions in a process of their own.

Devices and memory that one holds are free when it ends, and its death does not kill the caller.
"""

import importlib
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from absl import logging as absl_logging

from diffit_jax.errors import UserError


def count_cores() -> int:
    """Return how many cores this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def run_in_subprocess(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function of a module in a fresh process; arguments and result are pickled.

    Raises:
      UserError: it raised one, or was killed, as the system does where memory is short.
    """
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=fresh) as pool:
        try:
            place = function.__module__, function.__qualname__
            return pool.submit(_call, *place, arguments).result()
        except BrokenProcessPool as error:
            raise UserError("its process was killed: probably memory ran out") from error


def _call(module: str, name: str, arguments: Sequence[Any]) -> Any:
    absl_logging.set_verbosity(absl_logging.ERROR)  # before Grain is imported, which logs
    return getattr(importlib.import_module(module), name)(*arguments)
