"""Writes the estimates that tests/preflight/test_preflight.py compares with, for the version of
libtpu at hand: python tests/studies/estimates.py

Run it after a change that is meant to change them, or with a new libtpu; the file keeps those of
other versions. The compiler's answers to all programs of those tests are left in
tests/golden/preflight: run it too when the tests have become slow, since a program or the estimator
is not the same any more.
"""

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"

from diffit_jax.preflight import compiler, preflight

ROOT = Path(__file__).parents[2]
FILE = ROOT / "tests" / "golden" / "estimates.json"
TOPOLOGIES = {
    "digits": "v5e:2x2",
    "digits_latent": "v5e:2x2",
    "imagenet256_latent": "v5p:2x2x4",
    "imagenet512_latent": "v5e:8x8",
    "imagenet512_latent_large_batch": "v5e:16x16",
}

compiler.CACHE = ROOT / "tests" / "golden" / "preflight"
shutil.rmtree(compiler.CACHE, ignore_errors=True)
compiler.CACHE.mkdir()
estimates = {}
for name, topology in TOPOLOGIES.items():
    config = runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["get_config"]()
    report = preflight.preflight(config, topology=topology, programs=["train"])
    estimates[name] = [topology, report.train.step_s]
    print(f"{name:32} {topology:10} {report.train.step_s:.5f} s")
known = json.loads(FILE.read_text()) if FILE.exists() else {}
FILE.write_text(json.dumps(known | {compiler.libtpu_version(): estimates}, indent=2) + "\n")
of_tests = ["tests/preflight/test_preflight.py", "tests/preflight/test_pricing.py"]
tests = [sys.executable, "-m", "pytest", *of_tests]
renewing = os.environ | {"RENEW_ANSWERS": str(compiler.CACHE)}
sys.exit(subprocess.run(tests, cwd=ROOT, env=renewing).returncode)
