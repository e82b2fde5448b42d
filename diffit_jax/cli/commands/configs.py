"""Lists the configs that come with diffit_jax, one line each.

    diffit configs

`diffit train --config NAME` takes one, `--config NAME --help` prints its keys.
"""


def main() -> None:
    """Run the command."""
    from diffit_jax.runtime import config_files

    found = config_files.summaries()
    width = max(map(len, found))
    for name, text in found.items():
        print(f"{name:{width}}  {text}")
    print(f"\nin {config_files.folder()}")


def takes_devices() -> bool:
    """Return False: it only reads files."""
    return False
