"""Damaging checkpoints."""

import os


def data_files(step_directory):
    """All files with array data. Tests damage all of them: how the arrays are spread over them
    varies, and some are superseded."""
    return [
        path for path in step_directory.rglob("*") if path.is_file() and path.parent.name == "d"
    ]


def truncate(*paths):
    for path in paths:
        os.truncate(path, path.stat().st_size // 2)
