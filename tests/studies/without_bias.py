"""What the position bias costs on a TPU, by estimate: preflight with and without it. python
tests/studies/without_bias.py

Without it: a copy of the package whose attention kernel adds no bias and returns no gradient of it.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
SETTINGS = [
    ("imagenet512_latent", "v5e:4x4", 4),
    ("imagenet512_latent", "v5p:2x2x4", 8),
    ("imagenet256_latent", "v5p:2x2x4", 32),
]
EDITS = {
    "diffit_jax/models/diffit/attention_kernel.py": [
        (
            "_dot(q, k, 1, 1) + strips_ref[0, :, _keys(len(k), start)].astype(jnp.float32)",
            "_dot(q, k, 1, 1)",
        ),
        ("            strips_out_ref[0, :, _keys(tokens, start)] += logits_gradient\n", ""),
        (
            "    heads, tokens, rows = table.shape[1]",
            "    return jnp.zeros((table.shape[1], BLOCK, BLOCK))\n    heads, tokens, rows = "
            "table.shape[1]",
        ),
    ],
    "diffit_jax/preflight/schedule.py": [
        ("2 * tokens - attention_kernel.BLOCK)", "attention_kernel.BLOCK)")
    ],
}


def step_s(root: Path, config: str, topology: str, batch: int) -> float:
    """Estimate of the training step with nine heads of 128 and the slim parametrisation."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        flags = [
            f"--config=configs/{config}.py",
            f"--topology={topology}",
            f"--batch_per_chip={batch}",
            "--programs=train",
        ]
        flags += [
            "--config.model.num_heads=9",
            "--config.model.slim_tmsa=True",
            f"--json={file.name}",
        ]
        environment = os.environ | {"PYTHONPATH": str(root)}
        subprocess.run(
            [sys.executable, "launch/preflight.py", *flags],
            cwd=root,
            env=environment,
            check=True,
            capture_output=True,
        )
        return json.loads(Path(file.name).read_text())["train"]["step_s"]


with tempfile.TemporaryDirectory() as folder:
    for name in ("diffit_jax", "configs", "launch"):
        shutil.copytree(ROOT / name, Path(folder) / name)
    for name, edits in EDITS.items():
        path = Path(folder) / name
        text = path.read_text()
        for before, after in edits:
            assert text.count(before) == 1, (name, before)
            text = text.replace(before, after)
        path.write_text(text)
    for setting in SETTINGS:
        ours, without = step_s(ROOT, *setting), step_s(Path(folder), *setting)
        print(
            f"{setting[0]:20} {setting[1]:10} {setting[2]:3} per chip: {ours:.4f} s, without bias "
            f"{without:.4f} s: {without / ours:.1%}"
        )
