"""What tests need that start several processes on this machine."""

import dataclasses
import itertools
import os
import socket
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from support import warm

ROOT = Path(__file__).parents[2]

# Most of the suite's time is compiling, and unoptimised machine code does for small models. XLA's
# older code generator, where it still is there, compiles them in a third of the time (3.4 instead
# of 9.3 s for the steps and samplers of two small networks).
QUICK_TO_COMPILE = "--xla_backend_optimization_level=0"
if tuple(map(int, version("jaxlib").split(".")[:2])) <= (0, 10):
    QUICK_TO_COMPILE += " --xla_cpu_use_fusion_emitters=false"
    # One piece of code, not several side by side, is a sixth less work; both cores are busy.
    QUICK_TO_COMPILE += " --xla_cpu_parallel_codegen_split_count=1"

# Of a program that computes for longer than optimised code takes to compile, `jax.jit`'s
# compiler_options.
OPTIMISED = {"xla_backend_optimization_level": 2}


def compile_quickly():
    """Leaves optimisation out where the package asks for a little of it too: initialisation takes
    half of the time to compile. Its last bits differ then, so not where commands import for
    themselves."""
    from diffit_jax import platforms

    if warm.python() == sys.executable:
        return
    cpu = platforms.PLATFORMS["cpu"]
    platforms.PLATFORMS["cpu"] = dataclasses.replace(cpu, once=None)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(devices=2, **more):
    base = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    flags = f"{QUICK_TO_COMPILE} --xla_force_host_platform_device_count={devices}"
    return base | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"} | more


def write_config(path, config):
    """A config file that gives `config`, for commands."""
    path.write_text(
        "from ml_collections import ConfigDict\ndef get_config():\n    return "
        f"ConfigDict({config.to_dict()!r}).lock()\n"
    )
    return path


def checkpoints_of(workdir):
    """Step numbers of the complete checkpoints in a work directory, ascending."""
    folder = workdir / "checkpoints"
    return (
        sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())
        if folder.exists()
        else []
    )


def command(verb, *flags, cwd, **more):
    """(exit status, stderr) of `launch/verb.py` in a process of its own; `more` goes into its
    environment."""
    arguments = [warm.python(), str(ROOT / "launch" / f"{verb}.py"), *map(str, flags)]
    result = subprocess.run(
        arguments, capture_output=True, text=True, cwd=cwd, env=environment(**more), timeout=120
    )
    return result.returncode, result.stderr.strip()


def at_question(number):
    """In place of `PreemptionNotice.reached`: yes to that question, counted from 1."""
    asked = itertools.count(1)
    return lambda self: next(asked) == number
