"""Hashes of the programs of every config: a change that is meant to change no program changes none.

    PYTHONPATH=tests python tests/studies/program_hashes.py            # compares
    PYTHONPATH=tests python tests/studies/program_hashes.py --write    # takes them anew

The update and the sampler of each config are lowered to StableHLO for one device and for eight
(data 2 × fsdp 2 × tensor 2 where that serves), and hashed by what they compute: see `program_hash`.
The hashes are of one version of jax.
"""

import functools
import hashlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import jax
from support.configs import CONFIGS, config_of, small_config, small_latent_config

from diffit_jax.errors import UserError
from diffit_jax.run.state import setup_experiment
from diffit_jax.sampling.sampler import sampler_without_autoguidance
from diffit_jax.training.step import batch_shapes, lower_train_step

RESULTS = Path(__file__).with_suffix(".json")
OF_DATA = ("own_images", "chain")  # made of a data set's manifest
MORE = {
    "small": lambda: small_config(
        ema__power_lengths=(0.05, 0.1), training__batch_size=16, training__accumulation=2
    ),
    "small_dropout": lambda: small_config(model__dropout=0.1),
    "small_latent": lambda: small_latent_config(optimizer__name="lamb"),
    "small_latent_bfloat16": lambda: small_latent_config(
        model__dtype="bfloat16", model__slim_tmsa=True, model__remat="dots", model__dropout=0.1
    ),
    "small_general": lambda: small_config(
        sampling__sampler={"name": "general", "num_steps": 3, "churn_amount": 1.0}
    ),
    "small_dpm_solver": lambda: small_config(
        sampling__sampler={"name": "dpm_solver", "num_steps": 3}
    ),
}
MESHES = {"1 device": (1, (1, 1, 1)), "8 devices": (8, (2, 2, 2))}


def program_hash(lowered: jax.stages.Lowered) -> str:
    """A digest of what a program computes: of each result, through all operations that lead to it.

    Neither names and places in the source count, nor the order of operations that do not depend on
    each other, nor what is computed twice or for nothing.
    """
    module: Any = lowered.compiler_ir(dialect="stablehlo")
    functions = {operation.sym_name.value: operation for operation in module.body.operations
                 if operation.operation.name == "func.func"}  # fmt: skip
    meshes = [str(op) for op in module.body.operations if op.operation.name != "func.func"]
    values: dict[Any, str] = {}

    def digest(*parts: Any) -> str:
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def of_region(region: Any, depth: int) -> str:
        results = []
        for block in region.blocks:
            for index, argument in enumerate(block.arguments):
                values[argument] = digest("argument", depth, index, str(argument.type))
            for operation in block.operations:
                found = of_operation(operation.operation, depth)
                if not list(operation.operation.results):  # it returns, or acts
                    results.append(found)
        return digest(*results)

    @functools.cache
    def of_function(name: str) -> str:
        function = functions[name]
        attributes = [str(function.attributes[key]) for key in ("arg_attrs", "res_attrs")
                      if key in function.attributes]  # fmt: skip
        named = re.sub(r'jax\.(result_info|arg_info) = "[^"]*"', "", str(attributes))
        return digest(named, of_region(function.operation.regions[0], 0))

    def of_operation(operation: Any, depth: int) -> str:
        attributes = []
        for attribute in operation.attributes:
            name, value = (
                (attribute, operation.attributes[attribute])
                if isinstance(attribute, str)
                else (attribute.name, attribute.attr)
            )
            is_callee = operation.name == "func.call" and name == "callee"
            attributes.append(
                (name, of_function(str(value)[1:].strip('"')) if is_callee else str(value))
            )
        regions = [of_region(region, depth + 1) for region in operation.regions]
        operands = [values[operand] for operand in operation.operands]
        found = digest(operation.name, sorted(attributes), operands, regions)
        for index, result in enumerate(operation.results):
            values[result] = digest(found, index, str(result.type))
        return found

    return digest(sorted(meshes), of_function("main"))


def programs(config) -> dict[str, str]:
    """Hash of every program of a config by its name."""
    found = {}
    for name, (count, sizes) in MESHES.items():
        for data, fsdp, tensor in (sizes, (sizes[0] * sizes[2], sizes[1], 1)):
            config = config.copy_and_resolve_references().unlock()
            config.mesh = dict(data=data, fsdp=fsdp, tensor=tensor)
            try:
                setup = setup_experiment(config, jax.devices()[:count])
                break
            except UserError:  # heads that `tensor` does not divide
                if tensor == 1:
                    raise
        experiment, mesh, state = setup.experiment, setup.mesh, setup.state
        lowered = {
            "step": lower_train_step(setup, state, batch_shapes(experiment, mesh)),
            "sampler": sampler_without_autoguidance(experiment, mesh).lower(state.ema_variables),
        }
        for what, program in lowered.items():
            found[f"{what}, {name}"] = program_hash(program)
    return found


def main() -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    names = sorted(path.stem for path in CONFIGS.glob("*.py") if path.stem not in OF_DATA)
    makers = {name: lambda name=name: config_of(name) for name in names} | MORE
    chosen = [name for name in sys.argv[1:] if not name.startswith("-")] or list(makers)
    hashes = {name: programs(makers[name]()) for name in chosen}
    if "--write" in sys.argv:
        content = {"jax": jax.__version__, "programs": hashes}
        RESULTS.write_text(json.dumps(content, indent=1) + "\n")
        print(f"wrote {RESULTS.name}: {sum(map(len, hashes.values()))} programs")
        return
    before = json.loads(RESULTS.read_text())
    if before["jax"] != jax.__version__:
        sys.exit(f"error: the hashes are of jax {before['jax']}, this is {jax.__version__}")
    changed = [
        f"{name}: {what}"
        for name, found in hashes.items()
        for what, value in found.items()
        if before["programs"].get(name, {}).get(what) != value
    ]
    print("\n".join(changed) or f"all {sum(map(len, hashes.values()))} programs are the same")
    sys.exit(bool(changed))


if __name__ == "__main__":
    main()
