"""`diffit info`: what a file or a folder is."""

import json

import numpy as np
import pytest
from support.fid import save_vae
from support.golden import WEIGHTS
from support.images import pets, write_folder

from diffit_jax.errors import UserError
from diffit_jax.evaluation.info import info
from diffit_jax.ingest.prepare import prepare
from diffit_jax.sampling.sample import sample


def said(path):
    return "\n".join(info(path))


def test_runs_samples_and_their_records(run, tmp_path):
    workdir, state = run
    text = said(workdir)
    assert f"{workdir}: a run" in text and "model: ImageDiffiT for 8×8×1" in text
    assert f"trained: {int(state.step)} of" in text and "checkpoints: 2, 4, 6" in text
    assert "data set: synthetic" in text
    assert "multiply-adds of an evaluation" in text and "sampler: name" in text
    path = sample(workdir, seeds=range(3), output=tmp_path / "s.npz")
    for one in (path, path.with_suffix(".json")):
        assert "3 images of 8×8×1, with labels" in said(one) and f"workdir {workdir}" in said(one)
    (tmp_path / "s.json").unlink()
    assert "no record lies beside it" in said(path)


def test_weights_autoencoders_data_and_references(tmp_path):
    text = said(WEIGHTS["a"])
    assert "weights of a latent DiffiT in the released layout" in text and "carries no set" in text
    assert "an autoencoder (diffusers' AutoencoderKL)" in said(save_vae(tmp_path / "vae"))
    source = write_folder(tmp_path / "pets", pets(14, width=8, height=8))
    assert "a folder of 14 images, for diffit prepare --source" in said(source)
    prepare(source, name="pets", data_dir=tmp_path, workers=0)
    text = said(tmp_path / "pets")
    assert "a data set, split train: 14 examples of (8, 8, 3)" in text and "cat 7, dog 7" in text
    statistics = dict(mu=np.zeros(4), sigma=np.eye(4), arr_0=np.zeros((2, 8, 8, 3), np.uint8))
    np.savez(tmp_path / "r.npz", **statistics)
    assert "a reference with mu, sigma" in said(tmp_path / "r.npz")


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("x.png", b"\x89PNG\r\n", "is a PNG image"),
        ("x.bin", b"\x00\x01", "is an unknown file"),
        ("x.json", json.dumps({"a": 1}).encode(), "is JSON with a"),
        ("x.npz", b"PK", "is no whole npz file"),
        ("x.tar", b"0" * 600, "is a tar archive"),
    ],
)
def test_what_is_unknown_is_said_to_look_like_something(tmp_path, name, content, line):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=line) as error:
        info(tmp_path / name)
    assert "\n" not in str(error.value)


def test_an_empty_folder_and_nothing(tmp_path):
    with pytest.raises(UserError, match="it is empty"):
        info(tmp_path)
    with pytest.raises(UserError, match="is not there"):
        info(tmp_path / "nothing")
