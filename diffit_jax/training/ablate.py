"""The verb `ablate`: one config with one switch changed at a time, over seeds, as a table.

A file of `configs/ablations/` has `get_ablation()`, which returns a dict, see `Ablation`. Every row
and seed is a run of its own: trained, sampled and measured, then a file in `results/` of the work
directory. Many machines may share a directory, or have theirs merged.
"""

import dataclasses
import functools
import hashlib
import io
import json
import logging
import math
import platform
import re
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import flax
import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

import diffit_jax
from diffit_jax import limits
from diffit_jax.errors import UserError
from diffit_jax.evaluation.evaluate import evaluate
from diffit_jax.evaluation.evaluator import Comparison
from diffit_jax.evaluation.score import score
from diffit_jax.experiment import config as experiments
from diffit_jax.limits import Count, at_least, one_of
from diffit_jax.run import workdir as workdirs
from diffit_jax.run.state import setup_experiment
from diffit_jax.runtime import config_files, distributed, files
from diffit_jax.sampling.request import Run, SamplingOptions
from diffit_jax.sampling.sample import sample
from diffit_jax.training.held_out import HeldOutLoss, open_held_out
from diffit_jax.training.train import train

log = logging.getLogger(__name__)

KIND = config_files.Kind(
    "--ablation", "get_ablation()", "configs/ablations/digits.py", within="ablations"
)
RESULTS, RUNS = "results", "runs"
# What a table shows of a metric, in its order.
_FIGURES = {"frechet": ("frechet", "classifier_accuracy"), "fid": ("fid",)}
_LOSS = "held_out_loss"
_TITLES = {
    "frechet": "Fréchet distance, pixels",
    "classifier_accuracy": "accuracy",
    "held_out_loss": "held-out loss",
    "fid": "FID",
}


@dataclasses.dataclass(frozen=True)
class Ablation(limits.Section):
    """What is compared with what.

    Attributes:
      title: of the table.
      config: file of the config that all rows change, relative to the ablation's.
      rows: of each row its overrides, values by dotted key: `{"model.time_in": "bias"}`.
      overrides: of all rows: the budget.
      seeds: of the config; each is a run.
      samples: drawn of each run, of the seeds 0, 1, 2 …
      steps: numbers of steps of the sampler with which all samples are drawn and measured; empty:
        the config's.
      metric: "frechet" in pixels, for a small data set with a test split, or "fid".
      paper: what the paper has for rows, numbers by row.
    """

    title: str
    config: str
    rows: Mapping[str, Mapping[str, Any]]
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    seeds: Annotated[Sequence[Annotated[int, at_least(0)]], at_least(1)] = (0, 1, 2)
    samples: Count = 50_000
    steps: Sequence[Count] = ()
    metric: Annotated[str, one_of(*_FIGURES)] = "fid"
    paper: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @classmethod
    def load(cls, file: str) -> "Ablation":
        """Load an ablation file, perhaps with an argument after a colon, and check every row.

        Raises:
          UserError: it is no such file, a row that cannot be, or rows that are the same.
        """
        given = config_files.load(file, KIND).to_dict()
        fields = {field.name: field for field in dataclasses.fields(cls)}
        for key in given.keys() - fields.keys():
            raise UserError(f"{file}: the key {key} is unknown: known are {', '.join(fields)}")
        for name, field in fields.items():
            if name not in given and not experiments.has_default(field):
                raise UserError(f"{file}: the key {name} is missing: add it to get_ablation()")
        path, variant = config_files.divided(str(given["config"]))
        folder = config_files.divided(file, KIND)[0].resolve().parent
        whole = str((folder / path).resolve()) + ("" if variant is None else f":{variant}")
        try:
            ablation = cls(**{**given, "config": whole})
            ablation.check()
        except UserError as error:
            raise UserError(f"{file}: {error}") from error
        return ablation

    def check(self) -> None:
        """Raise `UserError` for rows that cannot be, or that are the same."""
        if len(self.rows) < 2:
            raise UserError("rows has fewer than two rows: there is nothing to compare")
        for row in self.paper.keys() - self.rows.keys():
            raise UserError(f"paper has {row!r}, which is no row: rows are {', '.join(self.rows)}")
        seen: dict[str, str] = {}
        for row in self.rows:
            try:
                settings = workdirs.all_settings(self.config_of(row, self.seeds[0]).to_dict())
            except UserError as error:
                raise UserError(f"row {row!r}: {error}") from error
            known = json.dumps(settings, sort_keys=True, default=str)
            if known in seen:
                raise UserError(
                    f"rows {seen[known]!r} and {row!r} are the same: what they override changes "
                    "nothing between them; leave one out, or correct its keys"
                )
            seen[known] = row
        names = [_slug(row) for row in self.rows]
        if len(set(names)) < len(names):
            raise UserError("two rows have the same letters and digits: name them apart")

    def config_of(self, row: str, seed: int) -> ConfigDict:
        """Return the config of a row and a seed."""
        settings = {**self.overrides, **self.rows[row], "seed": seed}
        arguments = [f"--config.{key}={value}" for key, value in settings.items()]
        given = config_files.ConfigArgs.find([f"--config={self.config}", *arguments])
        return experiments.given_config(given)


def ablate(
    ablation: Ablation,
    *,
    workdir: epath.PathLike,
    row: str | None = None,
    seed: int | None = None,
    comparison: Comparison | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> list[dict[str, Any]]:
    """Run rows and seeds, one after the other; what has a result is not run again.

    Interrupted, the same call resumes.

    Args:
      ablation: what is compared.
      workdir: directory of runs and results, local or `gs://`.
      row: the only one to run; None: all.
      seed: the only one to run; None: all.
      comparison: with what samples are compared, for the metric "fid".
      devices: to train on, as of `train`.

    Returns:
      The results of these rows and seeds.

    Raises:
      UserError: no such row or seed, results of another config in the directory, or as `train`,
        `sample` and `evaluate`.
    """
    rows = list(ablation.rows) if row is None else [row]
    seeds = list(ablation.seeds) if seed is None else [seed]
    if row is not None and row not in ablation.rows:
        raise UserError(f"--row {row!r} is unknown: rows are {', '.join(ablation.rows)}")
    if seed is not None and seed not in ablation.seeds:
        known = ", ".join(map(str, ablation.seeds))
        raise UserError(f"--seed {seed} is not among the ablation's: {known}")
    if ablation.metric == "fid" and comparison is None:
        raise UserError("this ablation is measured by FID: name --reference and --inception")
    workdir = files.resolve(workdir, "workdir")
    places = [(one, number) for one in rows for number in seeds]
    held = {place: _held(workdir, ablation, *place) for place in places}
    found = []
    for number, place in enumerate(places, 1):
        result = held[place]
        if result is None:
            log.info("run %d of %d: %s, seed %d", number, len(places), *place)
            result = _run(ablation, workdir, place, comparison, devices)
            path = _place(workdir, *place)
            distributed.on_primary(functools.partial(_write, path, result))
        found.append(result)
    return found


def _run(
    ablation: Ablation,
    workdir: epath.Path,
    place: tuple[str, int],
    comparison: Comparison | None,
    devices: Sequence[jax.Device] | None,
) -> dict[str, Any]:
    """Train, sample and measure one row with one seed."""
    started, config = time.monotonic(), ablation.config_of(*place)
    directory = workdir / RUNS / f"{_slug(place[0])}-{place[1]}"
    train(config, workdir=directory, devices=devices)
    run = Run(directory)
    setup = setup_experiment(config, devices, to_train=False)
    figures: dict[str, float] = {}
    for steps in ablation.steps or (0,):
        overrides = {"sampler.num_steps": steps} if steps else {}
        if ablation.metric == "frechet":
            samples = sample(run, seeds=range(ablation.samples), overrides=overrides)
            data = setup.experiment.data
            scores = score(samples, dataset=data.name, data_dir=data.data_dir, overwrite=True)
            found = {name: scores[name] for name in ("frechet", "classifier_accuracy")}
        else:
            assert comparison is not None
            output = directory / f"evaluation-{steps}.json" if steps else None
            evaluated = evaluate(
                run,
                comparison=comparison,
                options=SamplingOptions(overrides=overrides),
                count=ablation.samples,
                output=output,
            )
            found = dict(evaluated["metrics"])
        figures |= {_of_steps(name, steps): value for name, value in found.items()}
    try:
        source = distributed.primary_first(lambda: open_held_out(setup.experiment))
    except UserError as error:
        log.info("no held-out loss: %s", error)
    else:
        variables, _ = run.load(setup)
        figures[_LOSS] = HeldOutLoss(setup, source)({"ema": variables})["ema"]
    return {
        "row": place[0],
        "seed": place[1],
        "figures": figures,
        "config_sha256": digest(config),
        "commit": _commit(),
        "versions": {
            "diffit_jax": diffit_jax.__version__,
            "jax": jax.__version__,
            "flax": flax.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "device": jax.devices()[0].device_kind,
        "seconds": round(time.monotonic() - started, 1),
    }


def _of_steps(name: str, steps: int) -> str:
    """Return the name of a figure of samples drawn in so many steps; 0: the config's."""
    return f"{name}@{steps}" if steps else name


def _title(name: str) -> str:
    name, _, steps = name.partition("@")
    return _TITLES[name] + (f", {steps} steps" if steps else "")


def digest(config: ConfigDict) -> str:
    """Return the first 16 hexadecimal digits of the SHA-256 of a config as JSON."""
    text = json.dumps(config.to_dict(), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _commit() -> str:
    """Return the commit of a checkout, with + if files differ from it; "" elsewhere."""
    folder = Path(diffit_jax.__file__).resolve().parents[1]

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def _slug(row: str) -> str:
    return re.sub(r"[^\w.]+", "_", row).strip("_")


def _place(workdir: epath.Path, row: str, seed: int) -> epath.Path:
    return workdir / RESULTS / f"{_slug(row)}-{seed}.json"


def _held(workdir: epath.Path, ablation: Ablation, row: str, seed: int) -> dict[str, Any] | None:
    """Return the result that is there, if any."""
    path = _place(workdir, row, seed)
    if not path.exists():
        return None
    found = files.read_json(path)
    _check_result(found, ablation, str(path))
    return found


def _write(path: epath.Path, result: Mapping[str, Any]) -> None:
    files.write_json(files.make_directory(path.parent, "workdir") / path.name, result)
    log.info("wrote %s", path)


def _check_result(result: Mapping[str, Any], ablation: Ablation, where: str) -> None:
    """Raise `UserError` for a result that is none of this ablation's."""
    row, seed = result.get("row"), result.get("seed")
    if not isinstance(row, str) or row not in ablation.rows or not isinstance(seed, int):
        raise UserError(
            f"{where} holds a result of row {row!r}, which this ablation does not have: name its "
            "own results, or another --workdir"
        )
    if result.get("config_sha256") != digest(ablation.config_of(row, seed)):
        raise UserError(
            f"{where} holds a result of another config of row {row!r}, seed {seed}: name another "
            "--workdir, or the ablation that made it"
        )


def gather(
    ablation: Ablation, workdir: epath.PathLike, merged: Iterable[epath.PathLike] = ()
) -> list[dict[str, Any]]:
    """Gather results of a work directory, and of files of lines that others wrote.

    Returns:
      The results by row and seed, in the ablation's order.

    Raises:
      UserError: a file that cannot be read, a result of another config, or two that differ.
    """
    folder = files.resolve(workdir, "workdir") / RESULTS
    own = sorted(folder.glob("*.json")) if folder.exists() else []
    lines = [(str(path), path.read_text()) for path in own]
    for path in merged:
        path = files.resolve(path, "--merge")
        try:
            text = path.read_text()
        except OSError as error:
            raise UserError(f"--merge {path} cannot be read ({error.strerror or error})") from error
        lines += [(f"{path}, line {n}", line) for n, line in enumerate(text.splitlines(), 1)]
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for where, line in lines:
        try:
            result = json.loads(line)
            place, figures = (result["row"], result["seed"]), dict(result["figures"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{where} is no result of an ablation: leave it out") from error
        _check_result(result, ablation, where)
        if found.setdefault(place, result)["figures"] != figures:
            raise UserError(
                f"{where} has other figures of row {place[0]!r}, seed {place[1]} than another "
                "result: leave out either"
            )
    order = {row: number for number, row in enumerate(ablation.rows)}
    return [found[place] for place in sorted(found, key=lambda place: (order[place[0]], place[1]))]


def table(ablation: Ablation, results: Sequence[Mapping[str, Any]]) -> str:
    """Format results as a table in Markdown: means and their standard errors over seeds."""
    figures = _figures_in(ablation, results)
    paper = ["paper"] if ablation.paper else []
    heads = ["", *map(_title, figures), "seeds", *paper]
    lines = [heads, ["---"] * len(heads)]
    for row in ablation.rows:
        of_row = [result["figures"] for result in results if result["row"] == row]
        cells = [_mean_and_error([one[name] for one in of_row if name in one]) for name in figures]
        theirs = [f"{ablation.paper[row]:g}" if row in ablation.paper else ""] if paper else []
        lines.append([row, *cells, str(len(of_row)), *theirs])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _figures_in(ablation: Ablation, results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the figures that a table shows and some result has."""
    of_results = {name for result in results for name in result["figures"]}
    drawn = [
        _of_steps(name, n) for name in _FIGURES[ablation.metric] for n in ablation.steps or (0,)
    ]
    return [name for name in (*drawn, _LOSS) if name in of_results]


def _mean_and_error(values: Sequence[float]) -> str:
    """Return "mean ± standard error", as many digits as the error has two of."""
    if not values:
        return ""
    mean, error = np.mean(values), standard_error(values)
    if not error:
        return f"{mean:.4g}"
    digits = max(0, 1 - math.floor(math.log10(error)))
    return f"{mean:.{digits}f} ± {error:.{digits}f}"


def standard_error(values: Sequence[float]) -> float:
    """Return the standard error of the mean of values, a scalar; 0 of a single one."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0


def write_table(
    ablation: Ablation, results: Sequence[Mapping[str, Any]], workdir: epath.PathLike
) -> epath.Path:
    """Write `results.jsonl`, `table.md` and, where matplotlib is installed, `table.png`.

    Returns:
      Path of the table in Markdown.
    """
    workdir = files.make_directory(files.resolve(workdir, "workdir"), "workdir")
    lines = "".join(f"{json.dumps(result, sort_keys=True)}\n" for result in results)
    files.write_bytes(workdir / "results.jsonl", lines.encode())
    path = workdir / "table.md"
    text = f"# {ablation.title}\n\n{table(ablation, results)}"
    files.write_bytes(path, text.encode())
    try:
        files.write_bytes(workdir / "table.png", _picture(ablation, results))
    except ImportError:
        log.info("no picture of the table: pip install matplotlib")
    return path


def _picture(ablation: Ablation, results: Sequence[Mapping[str, Any]]) -> bytes:
    """Draw every result as a dot, and means with standard errors, a panel for each figure."""
    from matplotlib.figure import Figure

    names = _figures_in(ablation, results)
    across = min(max(len(names), 1), 4)
    down = -(-max(len(names), 1) // across)
    height = down * (1.0 + 0.35 * len(ablation.rows)) + 0.2
    figure = Figure(figsize=(3.6 * across + 1.5, height), layout="constrained")
    panels = figure.subplots(down, across, sharey=True, squeeze=False).ravel()
    rows = list(ablation.rows)
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    for axes, name in zip(panels, names, strict=False):
        for place, row in enumerate(rows):
            values = [one["figures"][name] for one in results if one["row"] == row]
            if not values:
                continue
            axes.plot(values, [place] * len(values), "o", color="0.7", markersize=4)
            error = standard_error(values)
            axes.errorbar(np.mean(values), place, xerr=error, fmt="o", color="C0", capsize=3)
        axes.set_xlabel(_title(name))
        axes.grid(alpha=0.3)
    panels[0].set_yticks(range(len(rows)), rows)
    panels[0].set_ylim(len(rows) - 0.5, -0.5)
    figure.suptitle(ablation.title)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    return content.getvalue()
