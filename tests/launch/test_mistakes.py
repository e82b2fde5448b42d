"""Mistakes at the command line: one line with the culprit and the remedy, before jax is imported.

Each is typed in a child of one process that has imported the command line and nothing else.
"""

import json
import subprocess
import sys

import pytest
from support.processes import ROOT, environment

CHILD = """
import contextlib, io, json, os, sys, time
from diffit_jax import cli
from diffit_jax.experiment import catalogue

catalogue.sections()  # read once, not by each child

def typed(arguments):
    read, write = os.pipe()
    if not (child := os.fork()):
        os.close(read)
        said, sys.argv, status = io.StringIO(), ["diffit", *arguments], 0
        began = time.process_time()
        try:
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
                cli.main()
        except SystemExit as error:
            status = error.code
            said.write(error.code if isinstance(error.code, str) else "")
        except BaseException as error:
            said.write(f"{type(error).__name__}: {error}")
        found = [status, said.getvalue(), "jax" in sys.modules, time.process_time() - began]
        os.write(write, json.dumps(found).encode())
        os._exit(0)
    os.close(write)
    content = b""
    while part := os.read(read, 2**16):
        content += part
    os.waitpid(child, 0)
    return json.loads(content)

print(json.dumps([typed(arguments) for arguments in json.loads(sys.stdin.read())]))
"""

TRAIN = ["train", "--workdir", "runs/x"]
CONFIG = [*TRAIN, "--config", "digits"]
SAMPLE = ["sample", "--workdir", "run"]
WEIGHTS = ["sample", "--weights", "w.safetensors"]
PREPARE = ["prepare", "--source", "pictures", "--name", "p"]
EVALUATE = ["evaluate", "--samples", "s.npz", "--reference", "r.npz"]

# What is typed, and what the line has to say.
MISTAKES = [
    # Verbs.
    (["tain"], "verb tain is unknown: did you mean train?"),
    (["make-refrence"], "did you mean make_reference?"),
    (["xyz"], "known are ablate, analyse"),
    # Flags that are not there.
    ([*TRAIN, "--bogus=1"], "--bogus is no flag of this command: --help lists them"),
    ([*TRAIN, "--batch_size=8"], "did you mean --config.training.batch_size?"),
    ([*TRAIN, "--bach_size=8"], "did you mean --config.training.batch_size?"),
    ([*TRAIN, "--total_steps=8"], "did you mean --config.training.total_steps?"),
    ([*TRAIN, "--learning_rate=1"], "did you mean --config.optimizer.learning_rate?"),
    ([*TRAIN, "--wrkdir=x"], "did you mean --workdir?"),
    ([*SAMPLE, "--guidance_scale=2"], "did you mean --guidance.scale?"),
    ([*SAMPLE, "--num_steps=2"], "did you mean --sampler.num_steps?"),
    ([*SAMPLE, "--sampler.steps=2"], "did you mean --sampler.num_steps?"),
    ([*SAMPLE, "--seed=2"], "did you mean --seeds?"),
    ([*SAMPLE, "--label=2"], "did you mean --labels?"),
    ([*SAMPLE, "--weight=x"], "did you mean --weights?"),
    ([*SAMPLE, "--evaluate"], "it is a verb, diffit evaluate --help"),
    ([*PREPARE, "--crop_size=3"], "is no flag of this command"),
    ([*PREPARE, "--worker=3"], "did you mean --workers?"),
    (["info", "a", "b"], "argument 'b' is not a flag"),
    ([*TRAIN, "runs/digits"], "argument 'runs/digits' is not a flag: write --name=value"),
    # Values of flags.
    ([*SAMPLE, "--seeds=5-x"], "--seeds '5-x' is not a list of whole numbers"),
    ([*SAMPLE, "--seeds=9-3"], "--seeds '9-3' is not a list of whole numbers"),
    ([*SAMPLE, "--sampler=hun"], "--sampler hun is unknown: did you mean heun?"),
    ([*SAMPLE, "--guidance=cfg"], "--guidance cfg is unknown: use none, constant"),
    ([*SAMPLE, "--sampler.num_steps=4.5"], "is '4.5': it must be a whole number"),
    ([*SAMPLE, "--guidance.scale=much"], "is 'much': it must be a number"),
    ([*SAMPLE, "--checkpoint=-1"], "is '-1': it must be a whole number of at least 0"),
    ([*SAMPLE, "--raw=perhaps"], "--raw is 'perhaps': write --raw or --noraw"),
    ([*SAMPLE, "--images=gif"], "--images gif is unknown: use png, jpeg, webp"),
    ([*SAMPLE, "--vae_dtype=float16", "--vae=v"], "did you mean bfloat16?"),
    ([*SAMPLE, "--trajectory"], "--trajectory has no value: write --trajectory=VALUE"),
    ([*PREPARE, "--crop=centre"], "--crop centre is unknown: did you mean center?"),
    ([*PREPARE, "--channels=4"], "--channels 4 is unknown: use 1, 3"),
    ([*PREPARE, "--holdout=5%"], "--holdout is '5%': it must be a number"),
    ([*PREPARE, "--holdout=5"], "it must be a number of at least 0.0 and at most 0.9"),
    ([*PREPARE, "--workers=-1"], "it must be a whole number of at least 0"),
    (["benchmark", "--config=digits", "--steps=0"], "a whole number of at least 1"),
    # What is missing, or does not go together.
    (["train", "--config", "digits"], "--workdir is missing: Directory of the run"),
    (TRAIN, "there is no run in "),
    (["sample"], "exactly one of --workdir, --weights is needed"),
    ([*SAMPLE, "--weights=w"], "exactly one of --workdir, --weights is needed"),
    ([*SAMPLE, "--config=digits"], "--config goes with --weights"),
    ([*WEIGHTS, "--checkpoint=3"], "--checkpoint goes with --workdir"),
    ([*WEIGHTS, "--raw"], "--raw goes with --workdir"),
    ([*SAMPLE, "--vae_batch_size=3"], "go with --vae"),
    ([*PREPARE, "--size=64"], "--size 64 needs a way to bring images to it: --crop center"),
    ([*PREPARE, "--crop=center"], "--crop center needs a side in pixels: --size 64"),
    (["prepare", "--name=x"], "--source is missing: Folder, zip, tar"),
    (["evaluate", "--samples=s.npz"], "--reference is missing: samples are measured against one"),
    (EVALUATE, "--inception is missing: name the weights of the FID network"),
    ([*EVALUATE, "--labels=3"], "--labels goes with --workdir or --weights"),
    (["decode", "--latents=l.npz"], "--vae is missing: name the autoencoder"),
    (["score"], "--samples is missing"),
    (["convert", "--workdir=run"], "exactly one of --to_workdir, --to_weights is needed"),
    (["convert", "--workdir=run", "--to_weights=w", "--num_classes=3"], "go with --weights"),
    # What is not there.
    (["sample", "--workdir=run2"], "holds no run (no config.json): did you mean "),
    (["sample", "--workdir=nothing"], "holds no run (no config.json)"),
    (["sample", "--weights=diffit_256.safetensors"], "name hf://nvidia/DiffiT/diffit_256"),
    ([*SAMPLE, "--vae=sd-vae-ft-ema"], "name hf://stabilityai/sd-vae-ft-ema"),
    (["prepare", "--source=picture", "--name=p"], "is not there: did you mean "),
    # Configs.
    ([*TRAIN, "--config=digts"], "neither a file nor one of configs/: did you mean digits?"),
    ([*TRAIN, "--config=none.py"], "there is no file none.py"),
    ([*TRAIN, "--config=run"], "it is a directory of a run"),
    ([*TRAIN, "--config"], "--config is empty"),
]
KEYS = [
    ("training.bach_size=3", "training.bach_size is unknown: did you mean training.batch_size?"),
    ("training1.batch_size=3", "training1 is unknown: did you mean training?"),
    ("batch_size=3", "batch_size is unknown: "),
    ("training.batch_size=sixty", "training.batch_size is 'sixty': it must be a whole number"),
    ("training.batch_size=-4", "training.batch_size is -4: it must be at least 1"),
    ("training.label_dropout=2", "training.label_dropout is 2.0: it must be between 0 and 1"),
    ("optimizer.learning_rate=0", "optimizer.learning_rate is 0.0: it must be above 0"),
    ("optimizer.name=adm", "optimizer.name is 'adm': use adam, lamb"),
    ("model.name=dit", "model.name is 'dit': use image_diffit or latent_diffit"),
    ("sampling.sampler.name=hun", "sampling.sampler.name is 'hun': use "),
    ("model.window=four", "model.window is 'four': it must be a whole number"),
    ("evaluation.raw=maybe", "evaluation.raw is 'maybe': it must be true or false"),
]


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What the command says to each, in a folder with a run, pictures and a few files."""
    folder = tmp_path_factory.mktemp("typed")
    for name in ("run", "pictures", "v"):
        (folder / name).mkdir()
    (folder / "run" / "config.json").write_text("{}")
    for name in ("w.safetensors", "w", "s.npz", "r.npz", "l.npz"):
        (folder / name).touch()
    typed = [arguments for arguments, _ in MISTAKES]
    typed += [[*CONFIG, f"--config.{text}"] for text, _ in KEYS]
    result = subprocess.run(
        [sys.executable, "-c", CHILD],
        input=json.dumps(typed),
        capture_output=True,
        text=True,
        timeout=300,
        cwd=folder,
        env=environment(PYTHONPATH=str(ROOT)),
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_every_mistake_is_one_line_with_the_remedy_before_jax_is_imported(answers):
    wanted = [*MISTAKES, *((text, line) for text, line in KEYS)]
    wrong = [
        (typed, line, answer)
        for (typed, line), answer in zip(wanted, answers, strict=True)
        if line not in answer[1]
        or answer[1].rstrip("\n").count("\n")
        or not answer[1].startswith("error: ")
        or answer[0] in (0, None)
        or answer[2]
    ]
    assert not wrong, "\n".join(map(str, wrong))
    assert len(wanted) >= 60


def test_nothing_is_written_by_a_mistake(answers, tmp_path_factory):
    folder = max(tmp_path_factory.getbasetemp().glob("typed*"))
    names = {path.name for path in folder.iterdir()}
    assert names == {"run", "pictures", "v", "w.safetensors", "w", "s.npz", "r.npz", "l.npz"}
