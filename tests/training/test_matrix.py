"""`benchmark`: `--sweep` measures every combination, each in a process of its own;
`--beside_torch` takes turns with PyTorch."""

import json

import pytest
from support.commands import assert_one_line_error, launch
from support.configs import small_config, small_latent_config

from diffit_jax.errors import UserError
from diffit_jax.runtime.console import parse_sweep
from diffit_jax.training import benchmark

EVERY = {"batch": [], "remat": [], "attention": []}
BY = {"device": "d", "devices": 1}
FLAGS = ["--steps", "1", "--json", "m.json"]


def test_every_combination_and_the_best(tmp_path):
    asked = ["--sweep", "batch=2,4,remat=full,attention=xla"]
    result = launch("benchmark", *FLAGS, *asked, config=small_latent_config(), tmp_path=tmp_path)
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "m.json").read_text())
    assert [(one["batch"], one["remat"]) for one in found] == [(2, "full"), (4, "full")]
    for one in found:
        assert one["images_per_s"] == pytest.approx(one["batch"] * one["steps_per_s"])
    best = max(found, key=lambda one: one["images_per_s"])
    assert (
        f"with --config.training.batch_size={best['batch']} --config.model.remat=full "
        "--config.model.attention=xla\n" in result.stdout
    )


def test_what_does_not_fit_is_a_line_and_not_the_best(monkeypatch):
    def run_in_subprocess(function, config, *_):
        if config["training"]["batch_size"] == 16:
            raise UserError("memory ran out")
        speed = float(config["training"]["batch_size"])
        return dict(images_per_s=speed, step_ms_median=1.0, peak_memory_gb=1.0) | BY

    monkeypatch.setattr(benchmark, "run_in_subprocess", run_in_subprocess)
    lines = []
    found = benchmark.matrix(
        small_latent_config(),
        steps=1,
        sweep=parse_sweep("batch,remat=none,attention=xla", benchmark.KNOWN),
        show=lines.append,
    )
    assert [one.get("error") for one in found] == [None, None, "memory ran out"]
    assert "memory ran out" in lines[3] and "training.batch_size=8 " in lines[-1]


def test_defaults_follow_the_platform_and_the_network(monkeypatch):
    """A GPU tries cuDNN, a TPU the kernel, for both networks."""
    asked = []

    def run_in_subprocess(function, *arguments):
        if function is benchmark._platform:
            return platform
        asked.append((arguments[0]["training"]["batch_size"], arguments[0]["model"]))
        return dict(images_per_s=1.0, step_ms_median=1.0, peak_memory_gb=1.0) | BY

    monkeypatch.setattr(benchmark, "run_in_subprocess", run_in_subprocess)
    for platform, attentions in (  # noqa: B007
        ("gpu", {"xla", "cudnn"}),
        ("tpu", {"xla", "pallas"}),
    ):
        asked.clear()
        found = benchmark.matrix(small_latent_config(), steps=1, sweep=EVERY, show=lambda _: None)
        assert len(found) == 3 * 3 * 2
        assert {size for size, _ in asked} == {4, 8, 16}
        assert {model["attention"] for _, model in asked} == attentions
        assert {model["remat"] for _, model in asked} == {"none", "dots", "full"}
    found = benchmark.matrix(small_config(), steps=1, sweep=EVERY, show=lambda _: None)
    assert len(found) == 3 * 3 * 2


def test_one_that_is_killed_is_a_line(monkeypatch):
    """As the system does it where memory is short."""
    with pytest.raises(UserError, match="its process was killed: probably memory ran out"):
        benchmark.run_in_subprocess(_die)


def _die():
    import os
    import signal

    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("batch=4,x", "--sweep has batch=x: it must be a whole number"),
        ("batch=0", "training.batch_size is 0"),
        ("remat=some", "model.remat is 'some'"),
        ("remat,attention=flash", "model.attention is 'flash'"),
        ("remats=none", "--sweep has 'remats': write KEY=VALUE,VALUE,… with some of batch, remat"),
        (
            "batch=4,remat=none,attention=cudnn",
            "none could be measured; the last: not served here: xla (cuDNN serves bfloat16 on GPUs",
        ),
    ],
)
def test_what_cannot_be_measured(asked, message, tmp_path):
    flags = [*FLAGS, "--sweep", asked]
    result = launch("benchmark", *flags, config=small_latent_config(), tmp_path=tmp_path)
    assert_one_line_error(result, message)
    assert not (tmp_path / "m.json").exists()


def test_ours_and_pytorchs_in_turns(tmp_path):
    """PyTorch, which the tests do not install, is played by a program that takes 7 seconds, it
    says, for whatever it is told."""
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/bash\necho PyTorch of $2 >> asked\necho PyTorch 2\n"
        "while read verb; do echo $verb >> asked; echo 7.0; done\n"
    )
    python.chmod(0o755)
    asked = ["--beside_torch", str(python)]
    result = launch("benchmark", *FLAGS, *asked, config=small_latent_config(), tmp_path=tmp_path)
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "m.json").read_text())
    first, *verbs = (tmp_path / "asked").read_text().splitlines()
    assert "batch_size: 8" in first.replace('"', "") and verbs == ["train", "forward"] * 4
    for verb in ("train", "forward"):
        assert found[f"{verb}_torch_ms"] == 7000 and 0 < found[f"{verb}_ms"] < 7000
        assert found[f"{verb}_ratio"] == pytest.approx(7000 / found[f"{verb}_ms"])


@pytest.mark.parametrize(
    ("config", "python", "words"),
    [
        (small_config, "python", "compares latent networks"),
        (small_latent_config, "no-such-python", "cannot be started (No such file or directory)"),
        (small_latent_config, "false", "the network in PyTorch ended (it ended)"),
    ],
)
def test_no_comparison_without_pytorch(config, python, words):
    with pytest.raises(UserError) as caught:
        benchmark.beside_torch(config(), steps=1, python=python)
    assert words in str(caught.value)
