"""The launchers: what their dry runs print, and what they do with stand-ins for gcloud, Slurm and
Python."""

import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from support.launchers import calls, launch, program, wait_for

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(ROOT.glob("launch/*.sh"))
# Arguments that a careless script would tear apart.
TRAIN = [
    "--config",
    "configs/imagenet512_latent.py:B/2",
    "--workdir",
    "gs://bucket/it's a run",
    "--config.data.name=synthetic",
]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_clean(script):
    """Bash reads them, and shellcheck, where it is installed, has nothing to say."""
    subprocess.run(["bash", "-n", str(script)], check=True)
    if shutil.which("shellcheck"):
        result = subprocess.run(
            ["shellcheck", "-x", str(script)], cwd=ROOT, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stdout


def test_local_dry_run():
    lines, _ = launch("local", "--dry_run", "--extra", "cuda", "--", *TRAIN)
    assert shlex.split(lines[0]) == ["bash", "launch/setup_env.sh", "cuda"]
    assert shlex.split(lines[1]) == [".venv/bin/python", "launch/train.py", *TRAIN]


def test_local_goes_on_after_a_preemption(project):
    """Status 75 starts the run again; any other ends the launcher with it."""
    python = project / ".venv" / "bin"
    program(
        python, "python", f'case "$(wc -l <"{python}/calls")" in 3) exit 4 ;; *) exit 75 ;; esac'
    )
    status, errors = launch("local", "--", *TRAIN, root=project, check=False)
    assert status == 4 and errors.count("going on") == 2
    assert calls(python) == ["python launch/train.py " + " ".join(TRAIN)] * 3


def test_local_hands_a_signal_on(project):
    """SIGTERM reaches the run, which saves; then nothing starts again."""
    python = project / ".venv" / "bin"
    program(
        python,
        "python",
        f"trap 'exit 75' TERM; touch {project}/started; for _ in $(seq 200); do sleep 0.1; done; "
        "exit 9",
    )
    process = subprocess.Popen(
        ["bash", "launch/local.sh", "--", *TRAIN], cwd=project, env={"PATH": "/usr/bin:/bin"}
    )
    wait_for(project / "started")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 75 and len(calls(python)) == 1


PLACE = ["--name", "pod", "--zone", "us-west4-a"]


@pytest.mark.parametrize(
    ("action", "arguments", "expected"),
    [
        (
            "create",
            ["--type", "v5litepod-256", "--spot"],
            "gcloud compute tpus queued-resources create pod --node-id=pod --zone=us-west4-a "
            "--accelerator-type=v5litepod-256 --runtime-version=v2-alpha-tpuv5-lite --spot",
        ),
        (
            "logs",
            [],
            "gcloud compute tpus tpu-vm ssh pod --zone=us-west4-a --worker=0 '--command=tail -n "
            "100 -F diffit_jax/train.log'",
        ),
        (
            "delete",
            ["--project", "p"],
            "gcloud compute tpus queued-resources delete pod --zone=us-west4-a --project=p --force "
            "--quiet",
        ),
    ],
)
def test_tpu_pod_dry_run(action, arguments, expected):
    lines, _ = launch("tpu_pod", action, *PLACE, *arguments, "--dry_run")
    assert shlex.split(lines[0]) == shlex.split(expected)


def test_tpu_pod_copies_and_runs_on_all_hosts():
    archive, scp, install = (
        shlex.split(line) for line in launch("tpu_pod", "copy", *PLACE, "--dry_run")[0]
    )
    assert (
        archive[:3] == ["git", "archive", "--format=tar.gz"] and archive[3] == f"--output={scp[5]}"
    )
    assert scp[-1] == install[-2] == "--worker=all" and "setup_env.sh tpu" in install[-1]
    (line,), _ = launch("tpu_pod", "run", *PLACE, "--dry_run", "--", *TRAIN)
    *_, workers, command = shlex.split(line)
    inner = shlex.split(command.removeprefix("--command="))
    start = inner.index("--extra")
    assert workers == "--worker=all" and inner[start + 2 :][: 1 + len(TRAIN)] == ["--", *TRAIN]


def on_the_host(home, command):
    """Runs what a host would be told, with the output in a pipe, as ssh has it."""
    return subprocess.run(
        ["bash", "-c", command],
        cwd=home,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=20,
    )


def test_tpu_pod_run_and_stop_on_a_host(project):
    """`run` returns at once and refuses a second run; `stop` waits until the first has saved and
    ended."""
    home = project / "home"
    shutil.copytree(project / "launch", home / "diffit_jax" / "launch")
    python = home / "diffit_jax" / ".venv" / "bin"
    program(
        python,
        "python",
        f"trap 'sleep 0.3; echo saved >>{home}/saved; exit 75' TERM; for _ in $(seq 100); do sleep "
        "0.1; done",
    )
    told = {}
    for action in ("run", "stop"):
        (line,), _ = launch(
            "tpu_pod", action, *PLACE, "--dry_run", *(["--", *TRAIN] if action == "run" else [])
        )
        told[action] = shlex.split(line)[-1].removeprefix("--command=")
    assert on_the_host(home, told["run"]).returncode == 0
    deadline = time.monotonic() + 20
    while not (python / "calls").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    again = on_the_host(home, told["run"])
    assert again.returncode == 1 and "a run is under way: stop it first" in again.stdout
    on_the_host(home, told["stop"])
    assert (home / "saved").read_text() == "saved\n" and len(calls(python)) == 1


def test_tpu_pod_waits_until_it_is_there(project):
    """WAITING, then ACTIVE; a request that failed ends in an error that says so."""
    bin_ = project / "bin"
    program(bin_, "sleep", "true")
    program(
        bin_,
        "gcloud",
        f'case "$*" in *describe*) test -e {bin_}/asked && cat {bin_}/end || (echo WAITING; touch '
        f"{bin_}/asked) ;; esac",
    )
    (bin_ / "end").write_text("ACTIVE\n")
    _, errors = launch(
        "tpu_pod", "create", *PLACE, "--type", "v5p-64", root=project, path=str(bin_)
    )
    assert "pod: WAITING" in errors and "pod: ACTIVE" in errors and "sleep 30" in calls(bin_)
    (bin_ / "end").write_text("FAILED\n")
    status, errors = launch(
        "tpu_pod", "create", *PLACE, "--type", "v5p-64", root=project, path=str(bin_), check=False
    )
    assert status == 1 and "error: the request for pod ended as FAILED" in errors


def test_slurm_dry_run():
    lines, _ = launch("slurm", "--nodes", "4", "--gpus", "2", "--dry_run", "--", *TRAIN)
    sbatch, srun = shlex.split(lines[0]), shlex.split(lines[1])
    assert {
        "--nodes=4",
        "--ntasks-per-node=2",
        "--gpus-per-node=2",
        "--cpus-per-task=8",
        "--signal=TERM@120",
        "--requeue",
    } <= set(sbatch)
    assert (
        sbatch[-len(TRAIN) - 2 :] == ["launch/slurm.sh", "--", *TRAIN]
        and srun[-len(TRAIN) :] == TRAIN
    )


@pytest.mark.parametrize(("status", "requeued"), [(0, False), (75, True), (1, False)])
def test_slurm_job_queues_up_again_when_preempted(project, status, requeued):
    bin_ = project / "bin"
    program(bin_, "srun", f"exit {status}")
    program(bin_, "scontrol", "true")
    arguments = dict(
        root=project, path=str(bin_), check=False, SLURM_JOB_ID="7", DIFFIT_JAX_ROOT=str(project)
    )
    ended, _ = launch("slurm", "--", *TRAIN, **arguments)
    assert (
        ended == (0 if requeued else status)
        and (calls(bin_)[1:] == ["scontrol requeue 7"]) == requeued
    )


@pytest.mark.parametrize(
    ("topology", "hosts", "chips", "accelerator"),
    [
        ("v5e:16x16", 64, 4, "tpu-v5-lite-podslice"),
        ("v5p:4x4x8", 32, 4, "tpu-v5p-slice"),
        ("v6e:2x2", 1, 4, "tpu-v6e-slice"),
        ("v5e:1x1", 1, 1, "tpu-v5-lite-podslice"),
    ],
)
def test_gke_manifest(topology, hosts, chips, accelerator):
    """The manifest is YAML with every value in its place, the run's arguments unharmed."""
    arguments = [
        "--name",
        "run",
        "--image",
        "registry/image:1",
        "--topology",
        topology,
        "--num_slices",
        "2",
        "--dry_run",
        "--",
        *TRAIN,
    ]
    lines, _ = launch("gke", *arguments)
    assert shlex.split(lines[0]) == ["kubectl", "apply", "-f", "-"]
    manifest = yaml.safe_load("\n".join(lines[1:]))
    assert (
        manifest["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
        and manifest["kind"] == "JobSet"
        and manifest["metadata"]["name"] == "run"
    )
    (slice_,) = manifest["spec"]["replicatedJobs"]
    job = slice_["template"]["spec"]
    assert (slice_["replicas"], job["parallelism"], job["completions"], job["backoffLimit"]) == (
        2,
        hosts,
        hosts,
        0,
    )
    pod = job["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": accelerator,
        "cloud.google.com/gke-tpu-topology": topology.split(":")[1],
    }
    (container,) = pod["containers"]
    assert container["image"] == "registry/image:1" and container["resources"]["limits"] == {
        "google.com/tpu": chips
    }
    assert container["command"] == [
        "bash",
        "launch/local.sh",
        "--extra",
        "tpu",
        "--",
        *TRAIN,
        "--config.mesh.num_slices=2",
    ]
    assert (
        manifest["spec"]["failurePolicy"]["maxRestarts"] == 100 and pod["restartPolicy"] == "Never"
    )


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("local", ["--", "--config", "c.py"], "name the work directory after --"),
        ("local", ["--workdir", "w"], "argument --workdir is unknown"),
        ("slurm", ["--nodes"], "--nodes needs a value"),
        ("slurm", ["--", *TRAIN], "sbatch is not installed"),
        ("tpu_pod", ["launch", *PLACE, "--dry_run"], "action launch is unknown"),
        ("tpu_pod", ["create", "--name", "n", "--dry_run"], "--zone is missing"),
        (
            "tpu_pod",
            ["create", *PLACE, "--type", "v9-8", "--dry_run"],
            "no runtime is known for --type v9-8",
        ),
        (
            "gke",
            ["--name", "n", "--image", "i", "--topology", "v5e", "--dry_run", "--", *TRAIN],
            "--topology v5e is not a topology",
        ),
        (
            "gke",
            ["--name", "n", "--image", "i", "--topology", "v5e:0x4", "--dry_run", "--", *TRAIN],
            "--topology v5e:0x4 is not a topology",
        ),
        (
            "gke",
            ["--name", "n", "--image", "i", "--topology", "v7:2x2", "--dry_run", "--", *TRAIN],
            "chip v7 is unknown",
        ),
    ],
)
def test_mistakes_are_named(script, arguments, message):
    status, errors = launch(script, *arguments, check=False)
    assert status == 1 and f"error: {message}" in errors and errors.count("\n") == 1, errors


VERBS = {
    "benchmark": ["--config", "configs/digits.py", "--steps", "10"],
    "sample": ["--workdir", "gs://bucket/it's a run", "--seeds", "0-49999"],
    "evaluate": ["--samples", "gs://bucket/s.npz"],
}


@pytest.mark.parametrize(("verb", "flags"), VERBS.items(), ids=VERBS)
def test_every_launcher_runs_every_verb(verb, flags):
    """On one machine, a pod, GKE (where only what trains is told the number of slices) and
    Slurm."""
    lines, _ = launch("local", "--dry_run", "--verb", verb, "--extra", "cuda", "--", *flags)
    assert shlex.split(lines[1]) == [".venv/bin/python", f"launch/{verb}.py", *flags]
    (line,), _ = launch("tpu_pod", "run", *PLACE, "--verb", verb, "--dry_run", "--", *flags)
    inner = shlex.split(shlex.split(line)[-1].removeprefix("--command="))
    start = inner.index("launch/local.sh")
    assert inner[start + 1 :][: 5 + len(flags)] == ["--verb", verb, "--extra", "tpu", "--", *flags]
    place = ["--name", "run", "--image", "i", "--topology", "v5e:4x4", "--num_slices", "2"]
    lines, _ = launch("gke", *place, "--verb", verb, "--dry_run", "--", *flags)
    (slice_,) = yaml.safe_load("\n".join(lines[1:]))["spec"]["replicatedJobs"]
    (container,) = slice_["template"]["spec"]["template"]["spec"]["containers"]
    more = ["--config.mesh.num_slices=2"] if verb == "benchmark" else []
    assert container["command"] == [
        "bash",
        "launch/local.sh",
        "--verb",
        verb,
        "--extra",
        "tpu",
        "--",
        *flags,
        *more,
    ]
    sbatch, srun = (
        shlex.split(line)
        for line in launch("slurm", "--verb", verb, "--dry_run", "--", *flags)[0][:2]
    )
    assert sbatch[-len(flags) - 4 :] == ["launch/slurm.sh", "--verb", verb, "--", *flags]
    assert (
        srun[-len(flags) - 2 :]
        == [".venv/bin/python", f"launch/{verb}.py", *flags][-len(flags) - 2 :]
    )


@pytest.mark.parametrize(
    ("verb", "flags", "message"),
    [
        (
            "prepare",
            ["--workdir", "w"],
            "--verb prepare is unknown: use train, encode, benchmark, sample or evaluate",
        ),
        ("sample", ["--seeds", "0"], "name a run or weights after --"),
        ("benchmark", ["--workdir", "w"], "name the config after --"),
        ("evaluate", [], "name what is measured after --"),
        ("encode", [], "name the images after --"),
    ],
)
def test_what_a_verb_needs_is_named(verb, flags, message):
    status, errors = launch("local", "--dry_run", "--verb", verb, "--", *flags, check=False)
    assert status == 1 and f"error: {message}" in errors and errors.count("\n") == 1, errors


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1], ids=lambda number: number.name)
def test_local_hands_other_signals_on(project, number):
    python = project / ".venv" / "bin"
    program(
        python,
        "python",
        f"trap 'exit 75' HUP USR1; touch {project}/started; for _ in $(seq 200); do sleep 0.1; "
        "done; exit 9",
    )
    process = subprocess.Popen(
        ["bash", "launch/local.sh", "--", *TRAIN], cwd=project, env={"PATH": "/usr/bin:/bin"}
    )
    wait_for(project / "started")
    process.send_signal(number)
    assert process.wait(timeout=30) == 75 and len(calls(python)) == 1


def test_local_stopped_while_it_sets_up_is_run_again(project):
    (project / "launch" / "setup_env.sh").write_text(f"touch {project}/started; sleep 20\n")
    process = subprocess.Popen(
        ["bash", "launch/local.sh", "--", *TRAIN], cwd=project, env={"PATH": "/usr/bin:/bin"}
    )
    wait_for(project / "started")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 75
