"""`hf://` addresses, against a stand-in for the hub; the client reads where it is when it is
imported, so that each session is a process of its own."""

import json
import os
import re
import subprocess
import sys

import pytest
from support.hub import COMMIT, Hub
from support.images import pets, write_folder
from support.processes import ROOT

from diffit_jax.errors import UserError
from diffit_jax.ingest.prepare import prepare
from diffit_jax.runtime import hub
from diffit_jax.runtime.hub import Address

pytest.importorskip("huggingface_hub")

REPOSITORIES = {
    "owner/model": {
        "a/file.safetensors": b"weights" * 1000,
        "config.json": b"{}",
        "vae/config.json": b"{}",
        "vae/diffusion_pytorch_model.safetensors": b"vae",
        "vae/diffusion_pytorch_model.bin": b"too large",
    },
    "datasets/owner/data": {
        "data/train-0.parquet": b"0",
        "data/train-1.parquet": b"1",
        "data/test-0.parquet": b"2",
        "data/deep/train-2.parquet": b"3",
    },
    "owner/gated": {"f.bin": b"x"},
    "owner/bad": {"f.bin": b"xyz"},
}
CODE = """
import json, sys, time
time.sleep = lambda seconds: None  # between attempts
from diffit_jax.errors import UserError
from diffit_jax.runtime import hub
answers = {}
for address in json.loads(sys.argv[1]):
    try:
        answers[address] = str(hub.local(address, "--weights", ("*.json", "*.safetensors")))
    except UserError as error:
        answers[address] = f"error: {error}"
print(json.dumps(answers))
"""


def session(place, url, *addresses, **more):
    """{address: the local path, or the error}, as a process with this cache has it."""
    env = os.environ | {
        "HF_ENDPOINT": url,
        "HF_HOME": str(place / "cache"),
        "HOME": str(place),
        "HF_HUB_DISABLE_XET": "1",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-c", CODE, json.dumps(addresses)]
    result = subprocess.run(command, capture_output=True, text=True, env=env | more, timeout=120)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """(folder of the cache, the hub, answers) of a session with everything that can be asked."""
    place = tmp_path_factory.mktemp("hub")
    addresses = [
        "hf://owner/model/a/file.safetensors",
        f"hf://owner/model@{COMMIT}/a/file.safetensors",
        "hf://owner/model/vae",
        "hf://datasets/owner/data/data/train-*.parquet",
        "hf://owner/none/x.bin",
        "hf://owner/gated/f.bin",
        "hf://owner/bad/f.bin",
        "hf://owner/model@v9/config.json",
        "hf://owner/model/none.txt",
        "hf://owner/model/none",
    ]
    with Hub(REPOSITORIES, gated=["owner/gated"], damaged=["f.bin"]) as server:
        answers = session(place, server.url, *addresses, HF_TOKEN="secret")
        yield place, server, answers


def test_files_come_as_they_are(served):
    _, server, answers = served
    for address in list(answers)[:2]:
        with open(answers[address], "rb") as file:
            assert file.read() == REPOSITORIES["owner/model"]["a/file.safetensors"]
    fetched = [line for line in server.asked if re.match("GET .*/a/file.safetensors$", line)]
    assert len(fetched) == 1 and fetched[0].startswith("GET /owner/model/resolve/")
    assert "Bearer secret" in server.tokens  # from where tokens usually are


def test_of_a_folder_comes_what_is_wanted(served):
    _, server, answers = served
    there = sorted(os.listdir(answers["hf://owner/model/vae"]))
    assert there == ["config.json", "diffusion_pytorch_model.safetensors"]
    assert not any("model.bin" in line for line in server.asked)


def test_a_pattern_stays_one_for_what_has_come(served):
    """`*` is not `/`, and names that do not fit are not fetched."""
    folder, _, pattern = served[2]["hf://datasets/owner/data/data/train-*.parquet"].rpartition("/")
    assert pattern == "train-*.parquet"
    assert sorted(os.listdir(folder)) == ["train-0.parquet", "train-1.parquet"]


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("hf://owner/none/x.bin", "there is no such model owner/none, or it is private"),
        ("hf://owner/gated/f.bin", "accept them on .*owner/gated, then log in by `hf auth login`"),
        ("hf://owner/bad/f.bin", "came damaged: its SHA-256 is .* the hub says .* it is deleted"),
        ("hf://owner/model@v9/config.json", "owner/model has no revision v9"),
        ("hf://owner/model/none.txt", "owner/model has no file none.txt: see http"),
        ("hf://owner/model/none", "owner/model has no file none: see http"),
    ],
)
def test_what_cannot_be_had_is_one_line_with_a_remedy(served, address, message):
    assert re.search(message, served[2][address]), served[2][address]


def test_prepared_data_are_read_from_the_hub(tmp_path):
    """What `prepare` wrote and somebody has uploaded; and nowhere is written to the hub."""
    source = write_folder(tmp_path / "pets", pets(12, width=8, height=8))
    prepare(source, name="pets", data_dir=tmp_path / "data", workers=0)
    folder = tmp_path / "data"
    names = [path for path in folder.rglob("*") if path.is_file()]
    content = {str(path.relative_to(folder)): path.read_bytes() for path in names}
    code = """
import sys
from diffit_jax.data.sources import open_dataset
print(len(open_dataset("pets", "train", sys.argv[1])))
"""
    with Hub({"datasets/me/sets": content | {"other/train.manifest.json": b"{}"}}) as server:
        env = os.environ | {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "cache")}
        command = [sys.executable, "-c", code, "hf://datasets/me/sets"]
        result = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)
    assert result.stdout == "12\n", result.stderr
    assert not any("/other/" in line for line in server.asked)
    with pytest.raises(UserError, match="is on the Hugging Face hub, which is only read from"):
        prepare(source, name="pets", data_dir="hf://datasets/me/sets")


def test_a_damaged_file_does_not_stay(served):
    place, _, _ = served
    assert not [path for path in (place / "cache").rglob("f.bin") if path.exists()]


def test_what_has_come_serves_without_a_network(served):
    """Offline by the client's own switch; and with a hub that does not answer."""
    place, _, answers = served
    known = ["hf://owner/model/a/file.safetensors", "hf://owner/model/vae"]
    for more in ({"HF_HUB_OFFLINE": "1"}, {}):
        found = session(place, "http://127.0.0.1:9", *known, "hf://owner/other/x.bin", **more)
        assert [found[address] for address in known] == [answers[address] for address in known]
        assert "the hub cannot be reached from here" in found["hf://owner/other/x.bin"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hf://a/b", Address("model", "a/b", None, "")),
        ("hf://a/b@v1.0/c/d.bin", Address("model", "a/b", "v1.0", "c/d.bin")),
        ("hf://datasets/a/b/c", Address("dataset", "a/b", None, "c")),
        (
            "hf://datasets/a/b@refs/convert/parquet/c",
            Address("dataset", "a/b", "refs/convert/parquet", "c"),
        ),
        ("hf://a/b@refs%2Fpr%2F1/c", Address("model", "a/b", "refs/pr/1", "c")),
        ("hf://models/a/b/", Address("model", "a/b", None, "")),
    ],
)
def test_addresses_are_read_as_the_hubs_own_file_system_does(text, expected):
    assert hub.parse(text, "--x") == expected


@pytest.mark.parametrize("text", ["hf://", "hf://owner", "hf://spaces/a/b/c", "hf:///a/b"])
def test_other_addresses_are_refused(text):
    with pytest.raises(UserError, match="is no address of a model or data set"):
        hub.parse(text, "--weights")


def test_the_grammar_is_that_of_the_library():
    """Beside its own parser, which needs no network for these."""
    from huggingface_hub import HfFileSystem

    for text in ("hf://datasets/a/b@main/c/d", "hf://a/b@v1/c"):
        ours = hub.parse(text, "--x")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(HfFileSystem, "_repo_and_revision_exist", lambda *_: (True, None))
            theirs = HfFileSystem().resolve_path(text)
        assert (theirs.repo_type, theirs.repo_id) == (ours.kind, ours.repository)
        assert (theirs.revision, theirs.path_in_repo) == (ours.revision, ours.path)
