"""Losses on tokens on digits: none, dispersive, SRA, Self-Flow, REPA and REG, three seeds.

    python tests/studies/digits_repa.py FOLDER [SEED …]

Each is trained by `configs/digits_repa.py` for 1,500 updates. 1,000 samples, of the averages after
500, 1,000 and 1,500 updates, without guidance and by 25 steps of Heun's method, are compared in
pixels with the held-out digits. FOLDER keeps everything; started again, what is there stays.
Results are in configs/RECIPES.md and tests/studies/digits_repa.json.
"""

import json
import logging
import sys
from pathlib import Path
from typing import Any

from on_digits import measured, print_table, trained

KINDS = ("none", "dispersive", "sra", "self_flow", "repa", "reg")
UPDATES = (500, 1_000, 1_500)


def main(folder: Path, seeds: list[int]) -> None:
    results: dict[str, dict[str, Any]] = {}
    for seed in seeds:
        for kind in KINDS:
            workdir = trained(
                f"digits_repa:{kind}", folder / str(seed) / kind, seed, UPDATES[-1],
                keep_checkpoints=4,
            )  # fmt: skip
            for updates in UPDATES:
                of_kind = results.setdefault(f"{kind}, {updates}", {})
                of_kind[str(seed)] = measured(workdir, updates, {"guidance": "none"})
                print(kind, updates, of_kind, flush=True)
            (folder / "results.json").write_text(json.dumps(results, indent=1))
    print_table(results)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    main(Path(sys.argv[1]), [int(seed) for seed in sys.argv[2:]] or [0, 1, 2])
