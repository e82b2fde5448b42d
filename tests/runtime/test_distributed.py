"""Several processes as one run, on this machine: 2 × 2 virtual devices with real collectives."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from support import warm
from support.configs import small_latent_config
from support.processes import checkpoints_of, environment, free_port, write_config

from diffit_jax.errors import UserError
from diffit_jax.runtime.distributed import Cluster, initialize
from diffit_jax.sampling.sample import sample

ROOT = Path(__file__).parents[2]
LATE = Path(__file__).parents[1] / "late_worker.py"


class Pair:
    """Two processes of `launch/train.py` (or sample.py), each with two devices."""

    def __init__(
        self,
        tmp_path,
        config=None,
        workdirs=None,
        command="train",
        arguments=(),
        configs=None,
        timeout=120,
    ):
        port, self.processes, self.logs = free_port(), [], []
        for number in (0, 1):
            path = tmp_path / f"config{number}.py"
            chosen = (configs or [config, config])[number]
            if chosen is not None:
                write_config(path, chosen)
            workdir = (workdirs or [tmp_path / "run"] * 2)[number]
            of_run = ["--workdir", str(workdir)] if command in ("train", "sample") else []
            flags = [
                *of_run,
                "--coordinator",
                f"127.0.0.1:{port}",
                "--num_processes=2",
                f"--process_id={number}",
            ]
            flags += ["--cluster_timeout", str(timeout), *map(str, arguments)] + (
                ["--config", str(path)] if chosen is not None else []
            )
            log = tmp_path / f"log{number}-{port}.txt"
            self.logs.append(log)
            self.processes.append(
                subprocess.Popen(
                    [warm.python(), str(ROOT / "launch" / f"{command}.py"), *flags],
                    stderr=log.open("w"),
                    env=environment(),
                    cwd=tmp_path,
                )
            )

    def wait(self, timeout=240):
        """Exit statuses and what each said."""
        statuses = [process.wait(timeout=timeout) for process in self.processes]
        return statuses, [log.read_text() for log in self.logs]

    def wait_for(self, path, timeout=200):
        deadline = time.monotonic() + timeout
        while not path.exists():
            assert time.monotonic() < deadline and all(
                process.poll() is None for process in self.processes
            ), [log.read_text()[-2000:] for log in self.logs]
            time.sleep(0.02)


@pytest.fixture(scope="module", autouse=True)
def one_late():
    """A command on two processes that wait for each other, three times. It takes 140 s, in which
    the tests go on."""
    flags = ["--coordinator", f"127.0.0.1:{free_port()}", "--num_processes=2"]
    processes = [
        subprocess.Popen(
            [warm.python(), LATE, *flags, f"--process_id={number}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment(),
        )
        for number in (0, 1)
    ]
    yield processes
    for process in processes:
        process.kill()


LONG = dict(
    training__total_steps=4000,
    training__checkpoint_steps=20,
    training__log_steps=10,
    # Snapshots of averages at the steps of checkpoints, and a loss beside them.
    ema={"halflife_images": 64, "power_lengths": (0.1,), "snapshot_steps": 20},
    evaluation={"loss_steps": 500, "loss_examples": 8},
)


def test_sigterm_to_one_saves_both_and_the_run_goes_on(tmp_path):
    """Only the second process is told; both save the same step and end with the status that means:
    run me again."""
    long = LONG | dict(training__grid_steps=10_000)  # and at the end
    pair = Pair(tmp_path, small_latent_config(**long))
    pair.wait_for(tmp_path / "run" / "checkpoints" / "20")
    pair.processes[1].send_signal(signal.SIGTERM)
    statuses, texts = pair.wait()
    assert statuses == [75, 75], texts
    saved = checkpoints_of(tmp_path / "run")[-1]
    assert all(
        f"checkpoint {saved} of 4000 steps is saved" in text
        and "run the same command again" in text
        for text in texts
    )
    assert "starting at step 0" in texts[0] and "starting" not in texts[1]  # one speaks

    again = Pair(tmp_path, small_latent_config(**long | dict(training__total_steps=saved + 3)))
    statuses, texts = again.wait()
    assert statuses == [0, 0] and f"resuming at step {saved} of {saved + 3}" in texts[0], texts
    assert checkpoints_of(tmp_path / "run")[-1] == saved + 3
    assert (tmp_path / "run" / "ema_snapshots" / str(saved + 3)).exists()
    assert (tmp_path / "run" / "grids" / f"{saved + 3:08d}.png").exists()
    assert f"step {saved + 3}: held-out loss ema" in texts[0]
    assert (
        json.loads((tmp_path / "run" / "config.json").read_text())["training"]["total_steps"]
        == saved + 3
    )


def test_sampling_on_two_processes_is_told_by_any_signal_to_any_of_them(latent_run, tmp_path):
    """SIGUSR1 to the second: both end with 75; the same command goes on, to the samples that one
    process draws."""
    request = [
        "--seeds",
        "0-59",
        "--batch_per_device",
        "1",
        "--sampler.num_steps",
        "100",
        "--output",
        tmp_path / "s.npz",
    ]
    pair = Pair(tmp_path, workdirs=[latent_run[0]] * 2, command="sample", arguments=request)
    pair.wait_for(tmp_path / "s.npz.parts" / "00000012-00000016.npy")
    pair.processes[1].send_signal(signal.SIGUSR1)
    statuses, texts = pair.wait()
    assert statuses == [75, 75] and all(
        "of 60 samples are saved beside" in text for text in texts
    ), texts
    statuses, texts = Pair(
        tmp_path, workdirs=[latent_run[0]] * 2, command="sample", arguments=request
    ).wait()
    assert statuses == [0, 0], texts
    alone = sample(
        latent_run[0],
        seeds=range(60),
        overrides={"sampler.num_steps": 100},
        output=tmp_path / "alone.npz",
    )
    with np.load(tmp_path / "s.npz") as ours, np.load(alone) as theirs:
        np.testing.assert_allclose(
            ours["arr_0"], theirs["arr_0"], rtol=0, atol=1e-4 * np.abs(theirs["arr_0"]).max()
        )


def test_benchmark_and_evaluate_on_two_processes(tmp_path):
    """One speaks and writes; a batch that does not divide is one line on each."""
    figures = tmp_path / "b.json"
    arguments = ["--steps", "2", "--json", figures]
    statuses, texts = Pair(
        tmp_path, small_latent_config(), command="benchmark", arguments=arguments
    ).wait()
    assert statuses == [0, 0] and json.loads(figures.read_text())["devices"] == 4, texts
    pair = Pair(
        tmp_path,
        small_latent_config(training__batch_size=6),
        command="benchmark",
        arguments=arguments,
    )
    statuses, texts = pair.wait()
    assert statuses == [1, 1] and all(
        "training.batch_size 6 does not divide over 4 devices" in text for text in texts
    ), texts
    rng = np.random.default_rng(0)
    np.savez(
        tmp_path / "s.npz",
        arr_0=rng.integers(0, 256, (360, 8, 8, 1), np.uint8),
        arr_1=rng.integers(0, 10, 360),
    )
    statuses, texts = Pair(
        tmp_path, command="score", arguments=["--samples", tmp_path / "s.npz"]
    ).wait()
    assert (
        statuses == [0, 0] and json.loads((tmp_path / "s.metrics.json").read_text())["count"] == 360
    ), texts


def test_the_other_process_does_not_outlive_one_that_was_killed(tmp_path):
    """Within 60 s it says that another process was lost, and exits with an error. What was saved
    stays, and both together go on from it (asked where process 0 was killed, which writes). Of one
    pair the worker is killed, of another, which waits beside it, the coordinator."""
    folders = {1: tmp_path / "worker", 0: tmp_path / "coordinator"}
    pairs = {}
    for killed, folder in folders.items():
        folder.mkdir()
        pairs[killed] = Pair(folder, small_latent_config(**LONG))
    for killed, pair in pairs.items():
        pair.wait_for(folders[killed] / "run" / "checkpoints" / "20")
        pair.processes[killed].kill()
    for killed, pair in pairs.items():
        status = pair.processes[1 - killed].wait(timeout=60)
        text = pair.logs[1 - killed].read_text()
        assert status not in (0, 75) and (
            "another process was lost" in text or "another task died" in text
        ), text[-2000:]
        saved = checkpoints_of(folders[killed] / "run")
        assert saved and saved[-1] >= 20
    longer = small_latent_config(**LONG | dict(training__total_steps=saved[-1] + 2))
    statuses, texts = Pair(folders[0], longer).wait()
    assert statuses == [0, 0] and f"resuming at step {saved[-1]}" in texts[0], texts


def test_processes_that_differ_are_refused(tmp_path):
    """Another config on one host, then a work directory that is not shared: both processes end with
    the reason, and write nothing."""
    other = small_latent_config(model__depth=3)
    statuses, texts = Pair(tmp_path, configs=[small_latent_config(), other]).wait()
    assert statuses == [1, 1] and all(
        "process 1 has another config than process 0" in text for text in texts
    ), texts
    assert not (tmp_path / "run").exists()
    statuses, texts = Pair(
        tmp_path, small_latent_config(), workdirs=[tmp_path / "here", tmp_path / "there"]
    ).wait()
    assert statuses == [1, 1] and all(
        "is not shared: process 1 does not see the files of process 0" in text for text in texts
    ), texts


def test_a_refusal_on_process_0_ends_all(tmp_path):
    (tmp_path / "run" / "checkpoints" / "2").mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text(small_latent_config(model__depth=5).to_json())
    statuses, texts = Pair(tmp_path, small_latent_config()).wait()
    assert (
        statuses == [1, 1]
        and "holds a run with model.depth = 5" in texts[0]
        and "process 0 could not go on" in texts[1]
    ), texts


def test_who_is_missing_is_said(tmp_path):
    """Two of three come: both say that the third is missing, in the time allowed."""
    port = free_port()
    code = (
        "import sys\nfrom diffit_jax.runtime.distributed import Cluster, "
        "initialize\ninitialize(Cluster(sys.argv[1], 3, int(sys.argv[2]), 5))"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, f"127.0.0.1:{port}", number],
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        for number in ("0", "1")
    ]
    for process in processes:
        _, errors = process.communicate(timeout=60)
        assert (
            process.returncode == 1 and "2 of 3 processes came within 5 s (missing: 2)" in errors
        ), errors


@pytest.mark.parametrize(
    ("cluster", "message"),
    [
        (Cluster("127.0.0.1:9", 2), "go together"),
        (Cluster("127.0.0.1:9", 2, 2), "--process_id 2 is not in 0-1"),
        (Cluster("nowhere", 2, 0), "nowhere is not an address"),
        (
            Cluster("127.0.0.1:9", 2, 1, timeout_s=1),
            "process 0 did not answer at 127.0.0.1:9 within 1 s",
        ),
    ],
)
def test_impossible_clusters(cluster, message):
    with pytest.raises(UserError, match=message):
        initialize(cluster)


# --- Slurm's variables

ALLOCATION = {"SLURM_JOB_ID": "123", "SLURM_NTASKS": "4"}
STEP = ALLOCATION | {
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NODELIST": "localhost",
}


@pytest.mark.parametrize(
    "variables",
    [
        ALLOCATION,  # salloc, ssh to the node, an IDE
        ALLOCATION | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"},  # the script of a batch job
        STEP | {"SLURM_STEP_NUM_TASKS": "1"},
        STEP | {"SLURM_STEP_NUM_TASKS": ""},
        STEP | {"SLURM_PROCID": ""},
        {"SLURM_NTASKS": "", "SLURM_JOB_ID": ""},
        {"SLURM_NTASKS": "4(x2)", "SLURM_STEP_NUM_TASKS": "many"},
    ],
    ids=[
        "allocation",
        "batch script",
        "one task",
        "empty number",
        "empty rank",
        "empty",
        "nonsense",
    ],
)
def test_one_process_in_an_allocation_is_one_process(variables, monkeypatch):
    """Only tasks that srun started are processes of a run."""
    monkeypatch.setattr(
        "jax.distributed.initialize", lambda *_, **__: pytest.fail("it waits for others")
    )
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    initialize()


def test_tasks_of_a_step_meet(monkeypatch):
    """As many as the step has, which may be fewer than the allocation's; and one can stay alone."""
    met = []
    monkeypatch.setattr("jax.distributed.initialize", lambda *given, **_: met.append(given))
    for name, value in (STEP | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}).items():
        monkeypatch.setenv(name, value)
    initialize()
    assert met == [(None, 2, 1)]
    initialize(Cluster(num_processes=1))
    assert len(met) == 1


def test_a_step_whose_tasks_do_not_come_ends_in_one_line(tmp_path):
    code = (
        "from diffit_jax.runtime.distributed import Cluster, initialize\n"
        "initialize(Cluster(timeout_s=4))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment(**STEP),
    )
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 1 and len(lines) == 1 and "Traceback" not in result.stderr, (
        result.stderr
    )
    assert (
        "Slurm's variables speak of a step of 4 tasks; for one process alone add --num_processes=1"
        in lines[0]
    )


def test_a_process_may_come_late(one_late):
    """Process 0 of a pod may download, score or send for as long as it takes, and another compile:
    here longer than the 30 s after which the first collective of CPUs ends a run, and at the end
    than the minute after which jax does."""
    texts = [process.communicate(timeout=240)[0] for process in one_late]
    assert [process.returncode for process in one_late] == [0, 0], texts
    assert "None True False" in texts[0] and "waited True False" in texts[1], texts
    assert all("\n6 1 compiled\n" in text for text in texts), texts
    assert "sent" in texts[0]
