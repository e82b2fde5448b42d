"""Ablations: rows of a file, results that merge, and the table."""

import json
import math

import pytest
from support.configs import small_config
from support.processes import ROOT, write_config

from diffit_jax.errors import UserError
from diffit_jax.training import ablate
from diffit_jax.training.ablate import Ablation, gather, standard_error, table, write_table

FILES = sorted((ROOT / "configs" / "ablations").glob("*.py"))


def write(folder, **changes):
    """An ablation of a small config, written to a file; its path."""
    write_config(folder / "small.py", small_config(data__name="digits"))
    given = dict(
        title="Small",
        config="small.py",
        rows={"as it is": {}, "mlp (T6)": {"model.time_in": "mlp"}},
        overrides={"training.total_steps": 2},
        seeds=(0, 1),
        samples=360,
        steps=(2, 3),
        metric="frechet",
        paper={"mlp (T6)": 3.81},
    )
    given = {key: value for key, value in (given | changes).items() if value is not None}
    path = folder / "small_ablation.py"
    path.write_text(f"def get_ablation():\n    return {given!r}\n")
    return str(path)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_ablation_of_the_paper_can_be(path):
    ablation = Ablation.load(str(path))
    variants = {"table3": "ffhq64", "table5": "ve", "table7": "ffhq64", "table8": "ffhq64"}
    if path.stem in variants:
        other = Ablation.load(f"{path}:{variants[path.stem]}")
        assert other.rows.keys() == ablation.rows.keys() and other.paper != ablation.paper
    for row, overrides in ablation.rows.items():
        config = ablation.config_of(row, 2)
        assert config.seed == 2
        for key, value in overrides.items():
            found = config
            for part in key.split("."):
                found = found[part]
            assert found == value


@pytest.fixture(scope="module")
def one_result(tmp_path_factory):
    """An ablation of which one row and seed were run."""
    folder = tmp_path_factory.mktemp("ablation")
    ablation = Ablation.load(write(folder))
    (result,) = ablate.ablate(ablation, workdir=folder / "work", row="mlp (T6)", seed=1)
    return folder, ablation, result


def test_a_row_is_trained_sampled_and_measured(one_result, monkeypatch):
    folder, ablation, result = one_result
    assert result["row"] == "mlp (T6)" and result["seed"] == 1
    drawn = {f"{name}@{steps}" for name in ("frechet", "classifier_accuracy") for steps in (2, 3)}
    assert set(result["figures"]) == {*drawn, "held_out_loss"}
    assert result["figures"]["frechet@2"] != result["figures"]["frechet@3"]
    assert all(math.isfinite(value) for value in result["figures"].values())
    assert result["config_sha256"] == ablate.digest(ablation.config_of("mlp (T6)", 1))
    assert result["versions"].keys() >= {"jax", "flax", "numpy", "python"} and "commit" in result
    run = json.loads((folder / "work" / "runs" / "mlp_T6-1" / "config.json").read_text())
    assert run["seed"] == 1 and run["model"]["time_in"] == "mlp"
    monkeypatch.setattr(ablate, "train", None)  # what is there is not run again
    assert ablate.ablate(ablation, workdir=folder / "work", row="mlp (T6)", seed=1) == [result]


def test_results_of_many_machines_merge(one_result, tmp_path):
    folder, ablation, result = one_result

    def line(row, seed, distance):
        figures = result["figures"] | {"frechet@2": distance}
        digest = ablate.digest(ablation.config_of(row, seed))
        return result | {"row": row, "seed": seed, "figures": figures, "config_sha256": digest}

    own = result["figures"]["frechet@2"]
    others = [line("as it is", 0, 2.0), line("as it is", 1, 4.0), line("mlp (T6)", 0, own + 2)]
    theirs = tmp_path / "theirs.jsonl"
    theirs.write_text("".join(json.dumps(one) + "\n" for one in [*others, result]))
    found = gather(ablation, folder / "work", [theirs])
    assert [(one["row"], one["seed"]) for one in found] == [
        ("as it is", 0),
        ("as it is", 1),
        ("mlp (T6)", 0),
        ("mlp (T6)", 1),
    ]
    text = table(ablation, found)
    # Of 2 and 4: mean 3, standard deviation √2, error 1.
    assert "| as it is | 3.0 ± 1.0 |" in text and f"| {own + 1:.1f} ± 1.0 |" in text
    heads = text.splitlines()[0]
    assert heads.endswith("| seeds | paper |") and "| 2 | 3.81 |" in text
    assert "| Fréchet distance, pixels, 2 steps | Fréchet distance, pixels, 3 steps |" in heads
    path = write_table(ablation, found, tmp_path / "out")
    assert path.read_text() == f"# Small\n\n{text}" and (tmp_path / "out" / "table.png").exists()
    again = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    assert [json.loads(one) for one in again] == found

    for change, message in (
        ({"figures": {"frechet@2": 9.0}}, "has other figures of row 'mlp"),
        ({"config_sha256": "0"}, "a result of another config of row"),
        ({"row": "nobody"}, "which this ablation does not have"),
        ({"figures": 3}, "is no result of an ablation"),
    ):
        theirs.write_text(json.dumps(result | change))
        with pytest.raises(UserError, match=message):
            gather(ablation, folder / "work", [theirs])
    with pytest.raises(UserError, match="cannot be read"):
        gather(ablation, folder / "work", [tmp_path / "none.jsonl"])


def test_standard_error():
    assert standard_error([1.0, 2.0, 3.0]) == pytest.approx(1 / math.sqrt(3))
    assert standard_error([5.0]) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(rows={"a": {}, "b": {"model.time_in": "tmsa"}}), "rows 'a' and 'b' are the same"),
        (dict(rows={"a": {}}), "fewer than two rows"),
        (dict(rows={"a": {}, "b": {"model.time": 3}}), "row 'b': config key model.time is unknown"),
        (dict(rows={"a": {}, "b": {"model.window": 3}}), "row 'b': stage 0 is 8 pixels wide"),
        (dict(rows={"a b": {}, "a (b)": {"model.window": 2}}), "two rows have the same letters"),
        (dict(paper={"nobody": 1.0}), "paper has 'nobody', which is no row"),
        (dict(steps=(5, 0)), "steps has 0: each must be at least 1"),
        (dict(metric="fod"), "metric is 'fod': use frechet, fid"),
        (dict(seeds=()), "seeds"),
        (dict(title=None), "the key title is missing"),
        (dict(row={}), "the key row is unknown"),
        (dict(config="none.py"), "there is no file"),
    ],
)
def test_ablations_that_cannot_be(tmp_path, changes, message):
    path = write(tmp_path, **{"paper": {}, **changes})
    with pytest.raises(UserError) as caught:
        Ablation.load(path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_asked_of_an_ablation_has_to_be_in_it(tmp_path):
    ablation = Ablation.load(write(tmp_path))
    with pytest.raises(UserError, match="--row 'none' is unknown: rows are as it is, mlp"):
        ablate.ablate(ablation, workdir=tmp_path / "w", row="none")
    with pytest.raises(UserError, match="--seed 7 is not among the ablation's: 0, 1"):
        ablate.ablate(ablation, workdir=tmp_path / "w", seed=7)
    fid = Ablation.load(write(tmp_path, metric="fid"))
    with pytest.raises(UserError, match="name --reference and --inception"):
        ablate.ablate(fid, workdir=tmp_path / "w")
    with pytest.raises(UserError, match=r"--ablation .* has no function get_ablation"):
        Ablation.load(str(tmp_path / "small.py"))
    assert not (tmp_path / "w").exists()
