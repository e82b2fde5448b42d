"""In how many files of the project a command calls functions.

    python tests/studies/files_walked.py launch/train.py --config configs/digits.py --workdir DIR …

From the command's first line on, in all threads. What runs while modules are imported, and bodies
of classes, do not count.
"""

import inspect
import runpy
import sys
import threading
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OURS = tuple(f"{ROOT / name}/" for name in ("diffit_jax", "launch", "configs"))
walked: Counter[str] = Counter()


def importing(frame) -> bool:
    """Whether a module of the project is being imported."""
    while frame is not None:
        name = frame.f_globals.get("__name__")
        if frame.f_code.co_name == "<module>" and name not in ("__main__", "__mp_main__"):
            return True
        frame = frame.f_back
    return False


def profile(frame, event, _):
    code = frame.f_code
    is_function = event == "call" and code.co_flags & inspect.CO_NEWLOCALS
    if is_function and code.co_filename.startswith(OURS) and not importing(frame):
        walked[code.co_filename] += 1


def main() -> None:
    sys.argv = sys.argv[1:]
    path = Path(sys.argv[0]).resolve()
    sys.path[0] = str(ROOT)
    threading.setprofile(profile)
    sys.setprofile(profile)
    try:
        runpy.run_path(str(path), run_name="__main__")
    finally:
        sys.setprofile(None)
        names = sorted(str(Path(name).relative_to(ROOT)) for name in walked)
        print(f"{len(names)} files: {', '.join(names)}")


if __name__ == "__main__":
    main()
