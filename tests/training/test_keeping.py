"""What a run leaves for people: events, images that never end it, errors with the right remedy,
configs of other versions."""

import errno
import os
import shutil
import signal
import subprocess
import time

import jax
import numpy as np
import pytest
from PIL import Image
from support import warm
from support.configs import small_config, small_latent_config
from support.processes import ROOT, checkpoints_of, environment, write_config
from tensorboardX.proto.event_pb2 import SessionLog

from diffit_jax.data import pixels
from diffit_jax.errors import UserError
from diffit_jax.experiment.spaces import LatentSpace, PixelSpace
from diffit_jax.runtime import files
from diffit_jax.runtime.checkpoint import Checkpoints
from diffit_jax.sampling.request import Run
from diffit_jax.sampling.sample import sample
from diffit_jax.training import train as train_verb
from diffit_jax.training.loggers import events_in
from diffit_jax.training.train import train

# --- Events


def events_of(workdir):
    """Every record of the run's event files, in the order in which they were begun."""
    for path in sorted(
        (workdir / "events").iterdir(),
        key=lambda path: (path.name.split(".")[3], path.stat().st_mtime_ns),
    ):
        yield from events_in(path.read_bytes())


def steps_shown(workdir, tag="loss"):
    """Steps of a curve as TensorBoard shows it: a new session's START takes away what the old ones
    have from its step on."""
    shown = []
    for event in events_of(workdir):
        if event.session_log.status == SessionLog.START:
            shown = [step for step in shown if step < event.step]
        shown += [event.step for value in event.summary.value if value.tag == tag]
    return shown


@pytest.mark.parametrize(("first", "logs"), [(6, 1), (5, 2)])
def test_every_point_is_shown_once_after_a_resume(tmp_path, first, logs):
    """Resumed at a step that was logged, or between two."""
    for total in (first, 10):
        train(
            small_latent_config(training__log_steps=logs, training__total_steps=total),
            workdir=tmp_path,
        )
        time.sleep(1.1)  # files of events are named by the second
    expected = {step for step in range(1, 11) if step % logs == 0} | {first, 10}
    assert steps_shown(tmp_path) == sorted(expected)


def test_steps_that_are_made_twice_are_shown_once(tmp_path):
    """Steps after the last good checkpoint are logged again: the first copies are not shown."""
    train(small_latent_config(training__log_steps=1), workdir=tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / "6")
    time.sleep(1.1)
    train(small_latent_config(training__log_steps=1, training__total_steps=8), workdir=tmp_path)
    assert steps_shown(tmp_path) == list(range(1, 9))


def test_sigkill_after_a_checkpoint_loses_no_event_before_it(tmp_path):
    config = small_latent_config(
        training__log_steps=5, training__checkpoint_steps=10, training__total_steps=100_000
    )
    flags = [
        "--config",
        str(write_config(tmp_path / "c.py", config)),
        "--workdir",
        str(tmp_path / "run"),
    ]
    process = subprocess.Popen(
        [warm.python(), str(ROOT / "launch" / "train.py"), *flags],
        stderr=subprocess.DEVNULL,
        env=environment(),
        cwd=tmp_path,
    )
    while max(checkpoints_of(tmp_path / "run"), default=0) < 40 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    newest = max(checkpoints_of(tmp_path / "run"))
    assert [step for step in steps_shown(tmp_path / "run") if step <= newest] == list(
        range(5, newest + 1, 5)
    )


# --- Images


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize("latents", [False, True])
def test_any_number_of_channels_makes_a_image(tmp_path, channels, latents):
    shape = (3, 8, 6, channels)
    samples = (
        np.random.default_rng(0).normal(size=shape).astype(np.float32)
        if latents
        else np.full(shape, 200, np.uint8)
    )
    space = LatentSpace("vae") if latents else PixelSpace()
    pixels.write_preview(tmp_path / "deep" / "p.png", samples, space.preview)
    with Image.open(tmp_path / "deep" / "p.png") as image:
        assert image.mode == ("RGB" if channels >= 3 else "L")


@pytest.mark.parametrize(
    "samples",
    [np.zeros((0, 8, 8, 3), np.uint8), np.zeros((2, 8), np.uint8), np.zeros((2, 8, 8, 3), object)],
)
def test_what_cannot_be_drawn_is_one_warning(tmp_path, caplog, samples):
    preview = PixelSpace().preview
    pixels.write_preview(tmp_path / "p.png", samples, preview)
    assert caplog.text.count("could not be made") <= 1 and (
        (tmp_path / "p.png").exists() or "p.png could not be made" in caplog.text
    )
    (tmp_path / "file").write_text("")
    pixels.write_preview(tmp_path / "file" / "p.png", np.zeros((2, 8, 8, 3), np.uint8), preview)
    assert "file/p.png could not be made" in caplog.text


def test_a_run_of_five_channels_goes_on_through_its_grids_and_is_sampled(tmp_path):
    config = small_config(model__image_channels=5, training__total_steps=2, training__grid_steps=1)
    train(config, workdir=tmp_path)
    assert sorted(path.name for path in (tmp_path / "grids").iterdir()) == [
        "00000001.png",
        "00000002.png",
    ]
    with np.load(sample(tmp_path, seeds=[0, 1])) as arrays:
        assert arrays["arr_0"].shape == (2, 8, 8, 5)


def test_a_grid_that_cannot_be_made_does_not_end_a_run(tmp_path, caplog, monkeypatch):
    """Nowhere to write it, then no memory to draw it."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "grids").write_text("a file in the way")
    assert (
        int(train(small_latent_config(training__grid_steps=3), workdir=tmp_path / "run").step) == 6
    )
    assert (
        "00000003.png could not be made" in caplog.text
        and "00000006.png could not be made" in caplog.text
    )

    def full(*_):
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 395137867968 bytes."
        )

    monkeypatch.setattr(train_verb.Sampler, "draw_batch", full)
    config = small_latent_config(training__grid_steps=6)
    assert int(train(config, workdir=tmp_path / "other").step) == 6
    assert (
        "00000006.png could not be drawn: memory ran out (" in caplog.text
        and "fewer training.grid_images" in caplog.text
    )


# --- Remedies


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "make room"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "make room"),
        (ValueError("RESOURCE_EXHAUSTED: Error writing x: No space left on device"), "make room"),
        (PermissionError(errno.EACCES, "Permission denied"), "make it writable"),
        (OSError(errno.EROFS, "Read-only file system"), "make it writable"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory"), "put the directory back"),
        (OSError(errno.EIO, "Input/output error"), "look at the disk or network"),
        (OSError(errno.ENOTEMPTY, "Directory not empty"), "choose another place"),
        (ValueError("cannot save arrays with zero size"), None),
        (TypeError("unsupported type"), None),
        (RuntimeError("cannot schedule new futures after shutdown"), None),
        (ZeroDivisionError("division by zero"), None),
    ],
)
def test_only_storage_errors_have_the_remedies_of_storage(error, remedy, tmp_path, monkeypatch):
    """A fault of the program keeps its traceback; libraries wrap what the system says, several
    times over."""
    assert (files.remedy_for_writing(error) or "").startswith(remedy or "") and (
        remedy is None
    ) == (files.remedy_for_writing(error) is None)
    wrapped = RuntimeError("a future failed")
    wrapped.__cause__ = error
    assert files.remedy_for_writing(wrapped) == files.remedy_for_writing(error)
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    monkeypatch.setattr(
        type(checkpoints._manager), "save", lambda *_, **__: (_ for _ in ()).throw(error)
    )
    with pytest.raises(UserError if remedy else type(error)) as raised:
        checkpoints.save(1, {"tree": {"a": jax.numpy.zeros(2)}}, {"step": 1})
    if remedy:
        assert f": {remedy}" in str(raised.value) and "there is none yet" in str(raised.value)


def test_a_work_directory_deleted_while_the_run_goes_on(tmp_path, monkeypatch, caplog):
    """What is saved afterwards is a run again: with its config, it can be sampled and continued."""
    save = train_verb.save_state

    def deleting(checkpoints, state, size):
        save(checkpoints, state, size)
        if int(state.step) == 2:
            checkpoints.wait()
            shutil.rmtree(tmp_path / "run")

    monkeypatch.setattr(train_verb, "save_state", deleting)
    config = small_latent_config(training__checkpoint_steps=2)
    try:
        train(config, workdir=tmp_path / "run")
    except UserError as error:  # Orbax may miss the directory first: that is said
        assert "put the directory back, which has been moved or deleted" in str(error)
        return
    assert (
        "was deleted while the run went on" in caplog.text
        and (tmp_path / "run" / "config.json").exists()
    )
    sample(tmp_path / "run", seeds=[0])


def test_a_reader_of_checkpoints_can_wait_for_nothing(tmp_path):
    Checkpoints(tmp_path / "none").wait()


# --- Owners, profiler, churn


def test_files_of_an_owner_without_a_name(latent_run, tmp_path):
    """A container's volume: neither runs nor weights ask who owns them."""
    if os.geteuid():
        pytest.skip("only root can give files away")
    mine = shutil.copytree(latent_run[0], tmp_path / "mine")
    for folder, _, names in os.walk(mine):
        for name in (".", *names):
            os.chown(os.path.join(folder, name), 12345, 12345)
    sample(mine, seeds=[0], output=tmp_path / "s.npz")
    assert int(train(small_latent_config(training__total_steps=7), workdir=mine).step) == 7


def test_a_profiler_that_is_busy_does_not_end_a_run(tmp_path, caplog):
    options = jax.profiler.ProfileOptions()
    options.host_tracer_level = options.python_tracer_level = 0  # its own trace nobody reads
    jax.profiler.start_trace(str(tmp_path / "mine"), profiler_options=options)
    try:
        assert (
            int(
                train(
                    small_latent_config(training__total_steps=2),
                    workdir=tmp_path / "run",
                    profile_steps=(1, 2),
                ).step
            )
            == 2
        )
    finally:
        jax.profiler.stop_trace()
    assert "no trace is written" in caplog.text


def test_churn_changes_samples_of_heun_and_is_refused_elsewhere(run, tmp_path):
    plain, churned = (
        np.load(
            sample(
                run[0],
                seeds=range(4),
                output=tmp_path / f"{amount}.npz",
                overrides={"sampler.churn_amount": amount},
            )
        )["arr_0"]
        for amount in (0.0, 30.0)
    )
    assert (plain != churned).any()
    with pytest.raises(UserError, match=r"--sampler.churn_amount has no effect with sampler euler"):
        sample(Run(run[0]), seeds=[0], overrides={"sampler": "euler", "sampler.churn_amount": 1.0})
