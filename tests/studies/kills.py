"""SIGKILL at random moments of a command, which is then given again: python tests/studies/kills.py
[COUNT [SEED [SIGNAL]]].

Of each of six commands COUNT runs are killed once, at a uniformly random moment of their time, and
continued; what they wrote is compared with that of a run that was left alone, byte for byte
(checkpoints: array for array). With SIGNAL TERM or INT it also prints how long the end took."""

import hashlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np

ROOT = pathlib.Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONWARNINGS": "ignore"}
STEPS = dict(total_steps=60, log_steps=10, checkpoint_steps=10, grid_steps=30, batch_size=16)


def commands(work):
    """{verb: (arguments with OUT for the place to write, digest of what is there)}."""
    data = f"--data_dir={work}/data"
    train = [f"--config.training.{key}={value}" for key, value in STEPS.items()]
    train += [f"--config.data.data_dir={work}/digits", "--config.training.grid_images=4"]
    images = ["--source", f"{work}/pictures", "--name", "OUT", data, "--workers", "1"]
    run, vae = f"{work}/trained", f"{work}/made/sd-vae-ft-ema"
    of_run = ["--workdir", run, "--seeds", "0-199", "--config.sampling.batch_per_device=16"]
    measured = ["--samples", f"{work}/samples.npz", "--inception", "random"]
    return {
        "prepare": ([*images, "--crop", "center", "--size", "128"], records_in),
        "encode": ([*images, "--crop", "center", "--size", "64", "--vae", vae], records_in),
        "train": (["--config", "digits", *train, "--workdir", f"{work}/OUT"], checkpoint_in),
        "sample": ([*of_run[:4], "--output", f"{work}/OUT.npz"], arrays_in),
        "make_reference": ([*measured, "--output", f"{work}/OUT.npz"], arrays_in),
        "evaluate": (
            [*measured, "--reference", f"{work}/reference.npz", "--output", f"{work}/OUT.json"],
            scores_in,
        ),
    }


def records_in(work, name):
    folder = work / "data" / name
    parts = sorted([*folder.glob("*.array_record"), folder / "train.manifest.json"])
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in parts]


def arrays_in(work, name):
    with np.load(work / f"{name}.npz") as file:
        return [hashlib.sha256(file[each].tobytes()).hexdigest() for each in sorted(file.files)]


def scores_in(work, name):
    scores = json.loads((work / f"{name}.json").read_text())
    return [scores["metrics"], scores["count"], scores["protocol"]["samples_digest"]]


def checkpoint_in(work, name):
    facts = work / name / "checkpoints" / str(STEPS["total_steps"]) / "facts" / "metadata"
    return json.loads(facts.read_text())["sums"]


def start(verb, arguments, work, name):
    arguments = [text.replace("OUT", name) for text in arguments]
    command = [sys.executable, str(ROOT / "launch" / f"{verb}.py"), *arguments]
    return subprocess.Popen(
        command, cwd=work, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def finish(process):
    _, errors = process.communicate()
    if process.returncode:
        raise SystemExit(f"status {process.returncode}: {errors.decode()[-600:]}")


def main(count, seed, name_of_signal="KILL"):
    number_of_signal = signal.Signals[f"SIG{name_of_signal}"]
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as folder:
        work = pathlib.Path(folder)
        python = [sys.executable, "-m"]
        for module, *rest in (
            ("diffit_jax.data.digits", f"{work}/pictures_", "300"),
            ("diffit_jax.interop.random_weights", f"{work}/made"),
        ):
            subprocess.run([*python, module, *rest], check=True, cwd=ROOT, env=ENVIRONMENT)
        shutil.move(work / "pictures_" / "train", work / "pictures")
        every, worst = commands(work), 0
        for verb, (arguments, digest) in every.items():
            began = time.monotonic()
            finish(start(verb, arguments, work, f"{verb}_alone"))
            seconds, whole = time.monotonic() - began, digest(work, f"{verb}_alone")
            if verb == "train":
                shutil.copytree(work / "train_alone", work / "trained")
            if verb == "sample":
                shutil.copy(work / "sample_alone.npz", work / "samples.npz")
            if verb == "make_reference":
                shutil.copy(work / "make_reference_alone.npz", work / "reference.npz")
            same, ends, statuses = 0, [], set()
            for number in range(count):
                name, moment = f"{verb}_{number}", float(rng.uniform(0.3, 1)) * seconds
                process = start(verb, arguments, work, name)
                try:
                    process.wait(moment)
                except subprocess.TimeoutExpired:
                    process.send_signal(number_of_signal)
                asked = time.monotonic()
                process.communicate()
                ends.append(time.monotonic() - asked)
                statuses.add(process.returncode)
                if process.returncode:
                    finish(start(verb, arguments, work, name))
                same += digest(work, name) == whole
            worst += same < count
            print(
                f"{verb:16}{seconds:6.1f} s alone; {same} of {count} equal to the bit; ended after "
                f"{max(ends):.1f} s at most, with {sorted(statuses)}",
                flush=True,
            )
    return int(worst > 0)


if __name__ == "__main__":
    given = [*sys.argv[1:], *("5", "0", "KILL")[len(sys.argv) - 1 :]]
    sys.exit(main(int(given[0]), int(given[1]), given[2]))
