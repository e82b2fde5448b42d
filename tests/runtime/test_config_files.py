"""Config files and keys on the command line: a mistake is shown with its line, and any key that a
section has can be given."""

import math

import pytest
from ml_collections import ConfigDict, config_dict
from support.configs import small_config, small_latent_config
from support.processes import command, write_config

from diffit_jax.errors import UserError
from diffit_jax.experiment import config as experiment
from diffit_jax.runtime import config_files


def taken(*arguments):
    """The config that a command with these arguments has."""
    texts = [str(argument) for argument in arguments]
    return experiment.given_config(config_files.ConfigArgs.find(texts))


MISTAKES = {
    "import os\ndef get_config():\n    return os.environ['NO_SUCH_ROOT']\n": (
        "line 3: return os.environ['NO_SUCH_ROOT']: KeyError: 'NO_SUCH_ROOT'"
    ),
    "def get_config():\n    return colour\n": "line 2: return colour: NameError: name 'colour'",
    "import no_such_module\n": "line 1: import no_such_module: ModuleNotFoundError",
    "def get_config(:\n": "line 1: def get_config(:: SyntaxError",
    "def get_config():\n\treturn 1\n        return 2\n": "line 3",
    "x = 1 / 0\n": "line 1: x = 1 / 0: ZeroDivisionError: division by zero",
    "def config():\n    pass\n": "has no function get_config()",
    "def get_config():\n    return 7\n": "get_config() returned 7, not a ConfigDict",
    "def get_config():\n    pass\n": "get_config() returned None, not a ConfigDict",
    "get_config = 3\n": "has no function get_config()",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_a_mistake_is_shown_with_its_line(tmp_path, text):
    path = tmp_path / "broken.py"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        config_files.load(str(path))
    said = str(error.value)
    assert MISTAKES[text] in said and "broken.py" in said and "\n" not in said


def test_a_mistake_in_a_file_beside_it_is_shown_there(tmp_path):
    (tmp_path / "base.py").write_text("def get_config():\n    return undefined\n")
    path = tmp_path / "derived.py"
    path.write_text(
        "from pathlib import Path\nfrom runpy import run_path\n\n\ndef get_config():\n"
        "    return run_path(str(Path(__file__).with_name('base.py')))['get_config']()\n"
    )
    with pytest.raises(UserError, match=r"derived\.py .*base\.py, line 2: return undefined"):
        config_files.load(str(path))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.py", "there is no file"),
        ("folder", "it is a directory"),
        ("run", "it is a directory of a run"),
        ("config.json", "it is the config of a run, not Python"),
        ("weights.safetensors", "it is a .safetensors file, not Python"),
        ("", "--config is empty"),
    ],
)
def test_only_files_with_get_config_are_taken(tmp_path, name, message):
    (tmp_path / "folder").mkdir()
    (tmp_path / "run").mkdir()
    for file in ("run/config.json", "config.json", "weights.safetensors"):
        (tmp_path / file).write_text("{}")
    with pytest.raises(UserError, match=message):
        config_files.load(str(tmp_path / name) if name else "")


def test_a_plain_dict_is_a_config(tmp_path):
    path = tmp_path / "plain.py"
    path.write_text(f"def get_config():\n    return {small_config().to_dict()!r}\n")
    assert experiment.build(taken("--config", path)).training.batch_size == 8


def test_an_argument_for_a_config_that_takes_none(tmp_path):
    path = write_config(tmp_path / "c.py", small_config())
    with pytest.raises(UserError, match=r"cannot be loaded .*TypeError: get_config\(\) takes 0"):
        taken("--config", f"{path}:B/2")


def test_keys_left_open_are_to_be_given(tmp_path):
    path = tmp_path / "open.py"
    path.write_text(
        "from ml_collections import ConfigDict, config_dict\n\n\ndef get_config():\n"
        f"    config = ConfigDict({small_config().to_dict()!r})\n"
        "    config.training.batch_size = config_dict.required_placeholder(int)\n"
        "    return config\n"
    )
    with pytest.raises(UserError, match=r"training\.batch_size is left open in .*open\.py"):
        taken("--config", path)
    config = taken("--config", path, "--config.training.batch_size=4")
    assert experiment.build(config).training.batch_size == 4
    assert config_dict.required_placeholder(int) is not None


GIVEN = {
    "optimizer.weight_decay=0.01": 0.01,
    "training.checkpoint_minutes=10": 10.0,
    "optimizer.schedule=cosine": "cosine",
    "optimizer.decay_steps=100": 100,
    "ema.power_lengths=(0.05,0.10)": (0.05, 0.10),
    "mesh.fsdp=2": 2,
    "model.mlp_ratio=2": 2,
    "model.dtype=bfloat16": "bfloat16",
    "process.sigma_data=1": 1.0,
    "sampling.pixel_rounding=adm": "adm",
    "sampling.sampler.churn_amount=3": 3.0,
    "sampling.guidance.scale=2": 2.0,
    "sampling.guidance.channels=1": 1,
}


@pytest.mark.parametrize("argument", GIVEN)
def test_a_key_that_the_file_does_not_list_can_be_given(tmp_path, argument):
    """In the section's type; and nothing else is added to the config."""
    path = write_config(tmp_path / "c.py", small_config())
    key, _, _ = argument.partition("=")
    config = taken("--config", path, f"--config.{argument}")
    value = config
    for part in key.split("."):
        value = value[part]
    assert value == GIVEN[argument] and type(value) is type(GIVEN[argument])
    expected = small_config()
    with expected.unlocked(), expected.ignore_type():
        if "mesh" in config:
            expected.mesh = ConfigDict({"fsdp": 2})
        node = expected
        for part in key.split(".")[:-1]:
            node = node[part]
        node[key.rpartition(".")[2]] = GIVEN[argument]
    assert config.to_dict() == expected.to_dict()


def test_values_are_typed_and_last(tmp_path):
    path = write_config(tmp_path / "c.py", small_latent_config())
    flags = "--config.model.slim_tmsa --config.training.batch_size 2 --config.training.batch_size=4"
    experiment_ = experiment.build(taken("--config", path, *flags.split()))
    assert experiment_.model.slim_tmsa and experiment_.training.batch_size == 4
    with pytest.raises(UserError, match=r"batch_size"):
        taken("--config", path, "--config.training.batch_size=many")


def test_another_sampler_or_guidance_keeps_what_they_share(tmp_path):
    path = write_config(tmp_path / "c.py", small_latent_config())
    config = taken(
        "--config",
        path,
        "--config.sampling.sampler.name=heun",
        "--config.sampling.sampler.churn_amount=2",
        "--config.sampling.guidance.kind=interval",
        "--config.sampling.guidance.sigma_high=inf",
    )
    sampling = experiment.build(config).sampling
    assert (sampling.sampler.num_steps, sampling.sampler.churn_amount) == (4, 2.0)
    assert (sampling.guidance.scale, sampling.guidance.sigma_high) == (4.4, math.inf)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("model.widow=3", r"model\.widow is unknown: did you mean model\.window\?"),
        ("modle.window=3", r"modle is unknown: did you mean model\?"),
        ("training.batch_size.x=3", r"x is unknown: training\.batch_size is not a section"),
        ("sampling.num_steps=3", r"did you mean sampling\.sampler\.num_steps\?"),
        ("sampling.guidance_scale=3", r"did you mean sampling\.guidance\.scale\?"),
        ("sampling.images=3", r"images is unknown: known are batch_per_device"),
    ],
)
def test_unknown_keys_say_what_is_meant(tmp_path, argument, message):
    path = write_config(tmp_path / "c.py", small_config())
    with pytest.raises(UserError, match=message):
        taken("--config", path, f"--config.{argument}")


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        (dict(num_steps=3, guidance_scale=2.0), r"num_steps is unknown: did you mean sampling"),
        (dict(sampler="heun", batch_per_device=2), r"sampler is 'heun': it must be a section"),
    ],
)
def test_a_config_with_flat_keys_names_the_nearest(sampling, message):
    with pytest.raises(UserError, match=message):
        experiment.build({**small_config().to_dict(), "sampling": sampling})


def test_an_unknown_flag_names_the_nearest(tmp_path):
    status, stderr = command("sample", "--workdir", "x", "--guidance_scale=2", cwd=tmp_path)
    assert status == 1 and len(stderr.splitlines()) == 1, stderr
    assert stderr.startswith("error: --guidance_scale is no flag of this command")
    assert "did you mean --guidance.scale?" in stderr
