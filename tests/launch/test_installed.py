"""A wheel, built from the tracked files, in an environment where nothing else is of the project."""

import shutil
import subprocess
import sys
import zipfile

from support.processes import ROOT, environment


def built(tmp_path):
    """The wheel of a copy of what git tracks, and what lies in the copy afterwards."""
    source = tmp_path / "source"
    if shutil.which("git") and (ROOT / ".git").exists():
        listed = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()
    else:
        listed = [str(path.relative_to(ROOT)) for path in ROOT.rglob("*") if path.is_file()]
    kept = ("diffit_jax/", "configs/", "setup.py", "README.md", "pyproject.toml", ".gitignore")
    for name in listed:
        if name.startswith(kept) and (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    before = {path.relative_to(source) for path in source.rglob("*") if path.is_file()}
    build = [sys.executable, "-c", "import setuptools.build_meta as b; print(b.build_wheel('..'))"]
    result = subprocess.run(build, cwd=source, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    after = {path.relative_to(source) for path in source.rglob("*") if path.is_file()}
    return wheel, {path.parts[0] for path in after - before}


def test_an_installed_wheel_has_the_command_the_configs_and_python(tmp_path):
    wheel, left = built(tmp_path)
    ignored = (ROOT / ".gitignore").read_text()
    assert all(name == "build" or name.endswith(".egg-info") for name in left)
    assert "/build/" in ignored and "*.egg-info/" in ignored  # `git status` stays clean
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
        entry = archive.read(f"diffit_jax-{version(wheel)}.dist-info/entry_points.txt").decode()
    assert "diffit = diffit_jax.cli:main" in entry
    env = environment(PYTHONPATH=str(site))
    code = """
import diffit_jax, sys
assert diffit_jax.__file__.startswith(sys.argv[1]), diffit_jax.__file__
from diffit_jax import DiffiT, UserError
from diffit_jax.runtime import config_files
print(config_files.load("digits").model.name, config_files.folder())
try:
    DiffiT.load("nothing")
except UserError as error:
    print(error)
"""
    command = [sys.executable, "-c", code, str(site)]
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert f"image_diffit {site}/diffit_jax/configs" in result.stdout
    for arguments, said in ((["--help"], "usage: diffit VERB"), (["configs"], "own_images")):
        result = subprocess.run(
            [sys.executable, "-m", "diffit_jax", *arguments],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0 and said in result.stdout, result.stderr[-2000:]


def version(wheel):
    return wheel.name.split("-")[1]
