"""What a run logs is in TensorBoard's events and at Weights & Biases, and can be read again."""

import json
import struct
import sys
import time

import numpy as np
import pytest
from support.commands import assert_one_line_error, launch
from support.configs import small_latent_config
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData
from wandb.proto.wandb_internal_pb2 import Record

from diffit_jax.errors import UserError
from diffit_jax.training.loggers import WeightsAndBiases, check_wandb, events_in, flat, read_figures
from diffit_jax.training.train import train


def watched(**more):
    return small_latent_config(
        training__wandb="team/digits", training__log_steps=1, training__grid_steps=2, **more
    )


@pytest.fixture(scope="module")
def stopped_and_continued(tmp_path_factory):
    """A work directory whose run was ended after four updates and went on to six."""
    workdir = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        for total in (4, 6):
            train(watched(training__total_steps=total), workdir=workdir)
            time.sleep(1.1)  # files of events are named by the second
    return workdir


def records_of(path):
    """Of a file of an offline run: a header of seven bytes, then records with a checksum, a length
    and a kind (a whole one, or its first, middle and last part), in blocks of 32 KiB."""
    content, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, size, kind = struct.unpack("<IHB", content[at : at + 7])
        parts += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):
            yield Record.FromString(parts)
            parts = b""


def test_one_run_at_wandb_has_everything(stopped_and_continued):
    """Both parts under one id: figures by step, images, and the hyper-parameters."""
    kept = json.loads((stopped_and_continued / "wandb.json").read_text())
    assert kept["project"] == "team/digits"
    files = sorted((stopped_and_continued / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2
    losses, images = {}, {}
    for path in files:
        for record in records_of(path):
            if record.WhichOneof("record_type") == "run":
                assert (record.run.run_id, record.run.project) == (kept["id"], "digits")
                assert record.run.entity == "team"
                settings = {one.key: json.loads(one.value_json) for one in record.run.config.update}
                assert settings["training.batch_size"] == 8
            if record.WhichOneof("record_type") == "history":
                items = {
                    item.key or ".".join(item.nested_key): json.loads(item.value_json)
                    for item in record.history.item
                }
                if "loss" in items:
                    losses[items["step"]] = items["loss"]
                for name in items:
                    if name.startswith("grid"):
                        images.setdefault(items["step"], items[name])
    assert losses == pytest.approx(read_figures(stopped_and_continued)["loss"], rel=1e-6)
    assert sorted(losses) == [1, 2, 3, 4, 5, 6] and sorted(images) == [2, 4, 6]


def test_tensorboard_has_hyper_parameters_and_grids(stopped_and_continued):
    begun, images = [], {}
    for path in (stopped_and_continued / "events").iterdir():
        for event in events_in(path.read_bytes()):
            for value in event.summary.value:
                if value.tag == "_hparams_/session_start_info":
                    content = value.metadata.plugin_data.content
                    begun.append(HParamsPluginData.FromString(content).session_start_info.hparams)
                if value.tag == "grid":
                    images[event.step] = (value.image.height, value.image.width)
    assert len(begun) == 2
    assert {one["training.batch_size"].number_value for one in begun} == {8}
    assert sorted(images) == [2, 4, 6] and len(set(images.values())) == 1


def test_a_record_that_is_not_whole_is_left_out(tmp_path):
    """A file that is being written, cut at every byte of its last record."""
    event = Event(step=3)
    event.summary.value.add(tag="loss", simple_value=0.5)
    text = event.SerializeToString()
    record = struct.pack("<QI", len(text), 0) + text + struct.pack("<I", 0)
    (tmp_path / "events").mkdir()
    for length in range(len(record)):
        path = tmp_path / "events" / "events.out.tfevents.1.host"
        path.write_bytes(record + record.replace(b"loss", b"more")[:length])
        assert read_figures(tmp_path) == {"loss": {3: 0.5}}


def test_when_wandb_fails_training_goes_on(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_MODE", "offline")
    logger = WeightsAndBiases(tmp_path, watched(), "digits")
    logger._run.finish()
    logger._run.log = lambda values: (_ for _ in ()).throw(OSError("the net is down"))
    logger.figures(1, {"loss": 1.0})
    logger.image(1, "grid", np.zeros((8, 8, 1), np.uint8))
    logger.close()
    warnings = [one.getMessage() for one in caplog.records if one.name.startswith("diffit_jax")]
    assert [text for text in warnings if "goes on without it" in text] == [
        "wandb: OSError (the net is down); training goes on without it"
    ]


def test_half_an_id_is_a_new_run(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / "wandb.json").write_text('{"project": "dig')
    WeightsAndBiases(tmp_path, watched(), "digits").close()
    assert len(json.loads((tmp_path / "wandb.json").read_text())["id"]) == 8


def test_no_key_is_said_before_anything_is_written(tmp_path):
    """By the command, in an environment without one."""
    result = launch(
        "train",
        "--workdir",
        tmp_path / "run",
        config=watched(),
        tmp_path=tmp_path,
        HOME=str(tmp_path),
        WANDB_API_KEY="",
        WANDB_MODE="online",
    )
    assert_one_line_error(result, "'team/digits', but there is no key for wandb: run `wandb login`")
    assert not (tmp_path / "run").exists()


def test_a_missing_wandb_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="wandb is not installed: pip install wandb, or set it to"):
        check_wandb("digits")
    check_wandb("")


def test_flat_names_every_value():
    found = flat(small_latent_config())
    assert found["training.batch_size"] == 8 and found["sampling.sampler.name"] == "ddpm"
    assert all(isinstance(value, (bool, int, float, str)) for value in found.values())
