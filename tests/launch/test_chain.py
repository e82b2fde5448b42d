"""The chain from pictures to a number, in its short form: every command as the page has it."""

import json
import subprocess

import numpy as np
from PIL import Image
from support import warm
from support.processes import ROOT, environment


def test_the_short_chain_ends_with_pictures_and_numbers(tmp_path):
    command = ["bash", str(ROOT / "launch/chain.sh"), "chain", "short"]
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=400,
        cwd=tmp_path,
        env=environment(1, PYTHON=warm.python()),
    )
    assert result.returncode == 0, result.stderr[-3000:]
    folder = tmp_path / "chain"
    assert "its figures have no meaning" in result.stderr
    with np.load(folder / "samples_360x32x32x3.npz") as samples:
        assert samples["arr_0"].shape == (360, 32, 32, 3) and samples["arr_0"].dtype == np.uint8
    for picture in ("samples_360x32x32x3.png", "latents/grids/00000008.png"):
        with Image.open(folder / picture) as grid:
            assert grid.size[0] == 10 * 33 - 1 and grid.mode == "RGB"
    small = json.loads((folder / "samples_360x32x32x3.metrics.json").read_text())
    assert small["count"] == 360 and small["classifier_accuracy_real"] > 0.9
    adm = json.loads((folder / "adm.metrics.json").read_text())
    assert list(adm["metrics"]) == ["fid", "sfid", "inception_score"] and adm["count"] == 40
    watched = json.loads((folder / "latents/evaluations/00000008.json").read_text())
    assert watched["weights"]["ema"]["count"] == 20
    assert "held-out loss ema" in result.stderr
    assert str(folder / "autoencoder" / "reconstructions.png") in result.stdout
