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
KERNEL = "diffit_jax/models/diffit/attention_kernel.py"
EDITS = [
    ("products + bias_ref[:, _keys(sizes, start)]", "products"),
    ("        bias_sum_ref[:, _keys(sizes, start)] += logits_gradient\n", ""),
    (
        "    heads, side = table.shape[1], 2 * window - 1\n",
        "    return jnp.zeros((table.shape[1], window, 2 * window**2))\n",
    ),
]


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
    path = Path(folder) / KERNEL
    text = path.read_text()
    for before, after in EDITS:
        assert before in text, before
        text = text.replace(before, after)
    path.write_text(text)
    for setting in SETTINGS:
        ours, without = step_s(ROOT, *setting), step_s(Path(folder), *setting)
        print(
            f"{setting[0]:20} {setting[1]:10} {setting[2]:3} per chip: {ours:.4f} s, without bias "
            f"{without:.4f} s: {without / ours:.1%}"
        )
