"""Damaged files of every kind that is read: python tests/studies/fuzz.py [COUNT [SEED]].

Prints what became of them, and each fault with its number."""

import logging
import pathlib
import resource
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
from support import fuzz

if __name__ == "__main__":
    count, seed = (int(text) for text in (*sys.argv[1:], *("2000", "0")[len(sys.argv) - 1 :]))
    logging.getLogger("diffit_jax").setLevel(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_AS, (16 * 2**30, 16 * 2**30))
    began, faults = time.monotonic(), []
    with tempfile.TemporaryDirectory() as folder:
        tried, faults = fuzz.try_all(pathlib.Path(folder), count, seed)
    for kind, found in tried.items():
        for part in ("structure", "payload"):
            told = {what: n for (of, what), n in sorted(found.items()) if of == part}
            if told:
                print(f"{kind:24}{part:11}{told}")
    for fault in faults:
        if not (fault[3] == "other data" and fault[:2] in fuzz.UNCHECKED):
            print("fault:", *fault)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{count} of each, seed {seed}: {time.monotonic() - began:.0f} s, {peak:.2f} GiB at most")
