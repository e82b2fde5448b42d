"""Released weights in and out: round trips, names and shapes at full size, damaged files,
resolution transfer, memory."""

import json
import os
import pickle
import subprocess
import sys
import zipfile

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.golden import GOLDEN, WEIGHTS, evaluate, golden_tensors
from support.memory import MEASURE

from diffit_jax.errors import UserError
from diffit_jax.interop import official, tensors
from diffit_jax.interop.official import resize_bias_table, resize_position_embedding
from diffit_jax.models.diffit.latent import LatentDiffiT, named_size


def without_buffers(tensors):
    return {
        name: tensor for name, tensor in tensors.items() if "relative_position_index" not in name
    }


def test_every_size_is_inferred():
    module, variables = official.load(WEIGHTS["b"])
    sizes = dict(
        input_size=64,
        input_channels=4,
        patch_size=2,
        hidden_size=48,
        depth=1,
        num_heads=3,
        mlp_ratio=4,
        num_classes=10,
    )
    assert (
        {name: getattr(module, name) for name in sizes} == sizes
        and module.learn_sigma
        and not module.slim_tmsa
    )
    assert all(
        isinstance(leaf, jax.Array) and leaf.dtype == jnp.float32
        for leaf in jax.tree.leaves(variables)
    )
    assert official.read_input_size(WEIGHTS["a"]) == 32


@pytest.mark.parametrize("name", ["a", "b"])
def test_round_trip_is_bit_identical(name, tmp_path):
    module, variables = official.load(WEIGHTS[name])
    path = tmp_path / "out.safetensors"
    official.save(path, module, variables, index_buffers=name == "a")
    original, written = load_file(WEIGHTS[name]), load_file(path)
    assert original.keys() == written.keys()
    for key, tensor in original.items():
        assert written[key].dtype == tensor.dtype
        np.testing.assert_array_equal(written[key], tensor, err_msg=key)
    again, variables_again = official.load(path)
    assert again == module
    jax.tree.map(np.testing.assert_array_equal, variables_again, variables)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.safetensors"]


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_files(dtype, tmp_path):
    tensors = {
        name: tensor.astype(dtype)
        for name, tensor in without_buffers(golden_tensors("diffit_a.safetensors")).items()
    }
    save_file(tensors, tmp_path / "half.safetensors")
    module, variables = official.load(tmp_path / "half.safetensors")
    official.save(tmp_path / "full.safetensors", module, variables)
    for name, tensor in load_file(tmp_path / "full.safetensors").items():
        np.testing.assert_array_equal(tensor, tensors[name].astype(np.float32))


def test_the_files_position_embedding_is_used(tmp_path):
    tensors = golden_tensors("diffit_a.safetensors")
    tensors["pos_embed"] = (
        np.random.default_rng(0).normal(size=tensors["pos_embed"].shape).astype(np.float32)
    )
    save_file(tensors, tmp_path / "w.safetensors")
    _, variables = official.load(tmp_path / "w.safetensors")
    np.testing.assert_array_equal(variables["constants"]["pos_embed"], tensors["pos_embed"][0])


def test_slim_is_written_with_zeros(tmp_path):
    from diffit_jax.interop.parametrisation import to_slim

    module, variables = official.load(WEIGHTS["b"])
    official.save(tmp_path / "w.safetensors", module.clone(slim_tmsa=True), to_slim(variables))
    written, original = (
        load_file(tmp_path / "w.safetensors"),
        golden_tensors("diffit_b_noindex.safetensors"),
    )
    kernel = written["blocks.0.attn.qkv_temb.weight"]
    assert not kernel[48:96].any()
    np.testing.assert_array_equal(kernel[:48], original["blocks.0.attn.qkv_temb.weight"][:48])
    again, variables_again = official.load(tmp_path / "w.safetensors")
    batch = np.ones((1, 64, 64, 4), np.float32), np.array([7]), {"label": np.array([3])}
    np.testing.assert_array_equal(
        evaluate(again, variables_again, *batch), evaluate(module, variables, *batch)
    )


@pytest.mark.parametrize("input_size", [32, 64])
def test_full_size_names_shapes_and_dtypes(input_size):
    expected = json.loads((GOLDEN / "full_size_keys.json").read_text())[str(input_size)]
    module = LatentDiffiT(input_size, **named_size("XL/2"))
    entries = official.entries_of(module, index_buffers=True)
    dtypes = {"F32": "float32", "I64": "int64"}
    assert {
        name: [list(shape), dtypes[dtype]] for name, dtype, shape in entries
    } == expected and len(entries) == 346


# --- Files that cannot be


def change(tmp_path, edit):
    tensors = golden_tensors("diffit_a.safetensors")
    edit(tensors)
    path = tmp_path / "w.safetensors"
    save_file(tensors, path)
    return path


def set_shape(name, shape):
    return lambda tensors: tensors.update({name: np.zeros(shape, np.float32)})


@pytest.mark.parametrize(
    ("edit", "messages"),
    [
        (lambda t: t.pop("blocks.1.mlp.fc1.bias"), ["(missing blocks.1.mlp.fc1.bias)"]),
        (
            lambda t: (t.pop("pos_embed"), t.pop("final_layer.linear.weight")),
            ["missing final_layer.linear.weight; missing pos_embed"],
        ),
        (set_shape("blocks.0.attn.gate", 3), ["(extra blocks.0.attn.gate)"]),
        (set_shape("blocks.7.attn.qkv.bias", 192), ["(extra blocks.7.attn.qkv.bias)"]),
        (set_shape("blocks.200000.foo", 1), ["(extra blocks.200000.foo)"]),
        (
            lambda t: [t.update({f"my{n}": t.pop(n)}) for n in list(t)],
            ["missing blocks.0.attn.proj.bias", "extra myblocks.0.attn.proj.bias", "and 45 more"],
        ),
        (
            set_shape("x_embedder.proj.weight", (64, 4, 4, 4)),
            ["misshapen x_embedder.proj.weight (64, 4, 4, 4)"],
        ),
        (
            set_shape("x_embedder.proj.weight", (64, 4, 0, 0)),
            ["misshapen x_embedder.proj.weight (64, 4, 0, 0)"],
        ),
        (
            lambda t: [
                set_shape(f"blocks.{i}.attn.relative_position_bias_table", (961, 5))(t)
                for i in (0, 1)
            ],
            ["misshapen blocks.0.attn.relative_position_bias_table (961, 5)"],
        ),
        (
            lambda t: [
                set_shape(n, (0,))(t)
                for n in t
                if n.endswith(("proj.bias", "fc2.bias", "mlp.2.bias"))
            ],
            ["misshapen blocks.0.attn.proj.bias (0,)"],
        ),
        (
            set_shape("blocks.1.attn.proj.weight", (64, 32)),
            ["(misshapen blocks.1.attn.proj.weight (64, 32) instead of (64, 64))"],
        ),
        (
            set_shape("blocks.0.attn.proj.bias", 32),
            ["(misshapen blocks.0.attn.proj.bias (32,) instead of (64,))"],
        ),
        (
            set_shape("pos_embed", (1, 255, 64)),
            ["(misshapen pos_embed (1, 255, 64) instead of (1, 256, 64))"],
        ),
        (
            set_shape("x_embedder.proj.weight", (64, 16)),
            ["misshapen x_embedder.proj.weight (64, 16), which must have 4 axes"],
        ),
        (
            set_shape("blocks.1.attn.relative_position_bias_table", (960, 4)),
            ["relative_position_bias_table (960, 4) instead of (961, 4)"],
        ),
        (
            lambda t: t.update(pos_embed=np.zeros((1, 256, 64), np.int32)),
            ["pos_embed of type I32 instead of F32, F16, BF16"],
        ),
        (lambda t: t.clear(), ["missing blocks.0.attn.proj.bias", "and 11 more"]),
    ],
)
def test_foreign_tensors_are_named(edit, messages, tmp_path):
    path = change(tmp_path, edit)
    with pytest.raises(UserError) as error:
        official.load(path)
    text = str(error.value)
    assert "\n" not in text and "w.safetensors are not those of a latent DiffiT" in text
    for message in messages:
        assert message in text, text
    assert text.count("missing ") + text.count("extra ") + text.count("misshapen ") <= 10


def truncate(path, size):
    content = WEIGHTS["a"].read_bytes()
    path.write_bytes(content[: size if size > 0 else len(content) + size])


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: truncate(path, -1), "truncated or no safetensors file"),
        (lambda path: truncate(path, 100), "truncated or no safetensors file"),
        (
            lambda path: truncate(path, 0) or path.write_bytes(b""),
            "truncated or no safetensors file",
        ),
        (
            lambda path: path.write_bytes(b"hello, this is no weight file"),
            "truncated or no safetensors file",
        ),
        (lambda path: path.mkdir(), "cannot be read"),
        (lambda path: None, "cannot be read"),
    ],
    ids=["last byte missing", "header only", "empty", "text", "directory", "absent"],
)
def test_damaged_files(write, message, tmp_path):
    path = tmp_path / "w.safetensors"
    write(path)
    with pytest.raises(UserError, match=message) as error:
        official.load(path)
    assert "\n" not in str(error.value)


class Bomb:
    def __reduce__(self):
        return os.mkdir, (os.environ["BOMB"],)


def test_a_pickle_is_refused_and_never_unpickled(tmp_path, monkeypatch):
    monkeypatch.setenv("BOMB", str(tmp_path / "exploded"))
    (tmp_path / "old.pt").write_bytes(pickle.dumps({"weight": Bomb()}))
    with zipfile.ZipFile(tmp_path / "new.safetensors", "w") as archive:  # as torch.save writes
        archive.writestr("archive/data.pkl", pickle.dumps(Bomb()))
    for name in ("old.pt", "new.safetensors"):
        with pytest.raises(UserError, match="are a pickle, which could run code and is never read"):
            official.load(tmp_path / name)
    assert not (tmp_path / "exploded").exists()


def test_a_header_that_begins_like_a_pickle_is_none(tmp_path):
    """The first byte is the low byte of the header's length: 0x80 in one file of 32."""
    path = tmp_path / "w.safetensors"
    for padding in range(0, 300, 8):
        save_file(
            golden_tensors("diffit_b_noindex.safetensors"), path, metadata={"note": "x" * padding}
        )
        if path.read_bytes()[0] == 0x80:
            break
    assert path.read_bytes()[0] == 0x80
    assert official.load(path)[0].depth == 1


def test_only_what_changes_no_parameters_can_be_set():
    assert official.load(WEIGHTS["b"], dtype="bfloat16", remat="full")[0].remat == "full"
    with pytest.raises(TypeError, match="not slim_tmsa"):
        official.load(WEIGHTS["b"], slim_tmsa=True)


def test_what_cannot_be_saved(tmp_path):
    module, variables = official.load(WEIGHTS["b"])
    with pytest.raises(UserError, match="has no unconditional model"):
        official.save(tmp_path / "w", module.clone(num_classes=0), variables)
    with pytest.raises(UserError, match="'adaln' and 'positional'"):
        official.save(tmp_path / "w", module.clone(time_in="adaln"), variables)
    with pytest.raises(UserError, match="cannot be written"):
        official.save("/dev/null/w", module, variables)
    with pytest.raises(UserError, match="must lie on a local or mounted disk"):
        official.load("gs://bucket/w.safetensors")


def test_a_failed_save_leaves_nothing(tmp_path):
    module, variables = official.load(WEIGHTS["b"])
    broken = variables | {
        "params": variables["params"] | {"final": {"kernel": np.zeros(3), "bias": np.zeros(3)}}
    }
    with pytest.raises(ValueError):
        official.save(tmp_path / "w.safetensors", module, broken)
    assert not list(tmp_path.iterdir())


# --- Another resolution


def test_same_grid_is_the_identity():
    table = np.random.default_rng(0).normal(size=(49, 3)).astype(np.float32)
    np.testing.assert_allclose(resize_position_embedding(table, 7, 7), table, atol=1e-6)
    np.testing.assert_allclose(resize_bias_table(table, 4, 4), table, atol=1e-6)


def test_position_embedding_follows_the_positions():
    """Slow sines of the position: between the old tokens they are what they are at that place, but
    for the border."""
    rows, columns = np.divmod(np.arange(16 * 16), 16)
    functions = lambda r, c: np.stack(
        [np.sin(0.4 * c), np.cos(0.3 * r), np.sin(0.2 * r) * np.cos(0.2 * c)], axis=1
    )
    resized = resize_position_embedding(functions(rows, columns), 16, 32).reshape(32, 32, 3)
    fine_rows, fine_columns = (np.divmod(np.arange(32 * 32), 32)[i] / 2 - 0.25 for i in (0, 1))
    expected = functions(fine_rows, fine_columns).reshape(32, 32, 3)
    inside = slice(8, -8)
    np.testing.assert_allclose(resized[inside, inside], expected[inside, inside], atol=2e-3)


def test_bias_follows_the_offsets():
    """A smooth function of the offset, taken at half the offset on the grid of twice the size."""
    function = lambda r, c: np.exp(-(r**2 + 0.5 * c**2 - 0.3 * r * c) / 40)[:, None]
    offsets = lambda grid: (
        np.divmod(np.arange((2 * grid - 1) ** 2), 2 * grid - 1)[i] - grid + 1.0 for i in (0, 1)
    )
    resized = resize_bias_table(function(*offsets(16)), 16, 32)
    row, column = offsets(32)
    inside = (np.abs(row) <= 26) & (np.abs(column) <= 26)
    np.testing.assert_allclose(resized[inside], function(row / 2, column / 2)[inside], atol=2e-3)
    # No offset stays where it is, in the middle; the order of rows and columns is kept.
    np.testing.assert_allclose(resized[63 * 31 + 31], 1, atol=1e-6)


def test_load_at_another_resolution():
    module, variables = official.load(WEIGHTS["a"])
    finer, resized = official.load(WEIGHTS["a"], input_size=64)
    assert finer == module.clone(input_size=64)
    assert resized["constants"]["pos_embed"].shape == (1024, 64)
    assert resized["params"]["blocks"]["attention"]["relative_position_bias"].shape == (2, 63**2, 4)
    for key in ("patch_embed", "final", "time"):
        jax.tree.map(
            np.testing.assert_array_equal, resized["params"][key], variables["params"][key]
        )
    out = evaluate(finer, resized, np.ones((1, 64, 64, 4), np.float32), np.array([5]), {})
    assert out.shape == (1, 64, 64, 8) and np.isfinite(out).all()
    with pytest.raises(UserError, match="input_size 33 is not divisible by patch_size 2"):
        official.load(WEIGHTS["a"], input_size=33)


# --- Memory


def test_loading_holds_little_more_than_the_parameters(tmp_path):
    """Peak anonymous memory at most the parameters plus two stacked arrays, on a model of 200
    MB."""
    module = LatentDiffiT(input_size=8, hidden_size=512, depth=13, num_heads=8, num_classes=10)
    rng = np.random.default_rng(0)
    leaves = {
        leaf.path: rng.standard_normal(leaf.shape, np.float32)
        for leaf in official.leaves_of(module)
    }
    official.save(tmp_path / "w.safetensors", module, tensors.nested(leaves))
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "w.safetensors")],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )
    assert result.returncode == 0, result.stderr
    peak, total, largest = map(int, result.stdout.split())
    assert total > 200e6 and peak <= total + 2 * largest


def test_progress_shows(capfd, monkeypatch):
    from diffit_jax.runtime import console

    clock = iter(range(0, 10_000, 3))
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    official.load(WEIGHTS["b"])
    assert "load diffit_b_noindex.safetensors 1/21 tensors" in capfd.readouterr().err
