"""DINOv2 and what reaches it, against four implementations (tests/golden/repa)."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.golden import GOLDEN

from diffit_jax.errors import UserError
from diffit_jax.interop import dinov2 as interop
from diffit_jax.models.pretrained import dinov2, resizing

FOLDER = GOLDEN / "repa"
CASES = ["plain_168x280", "plain_224x224", "reg_168x280", "swiglu_98x98", "swiglu_224x224"]
TOKENS, LAYERS = 5e-5, 1e-4  # as the README there states them, from a port in float64


def encoded(name, data, positions, dtype=jnp.float32):
    module, variables = interop.load(FOLDER / name, positions=positions, dtype=dtype)
    pictures = resizing.normalised(jnp.asarray(data["images"], jnp.float32) / 255)
    found = jax.jit(lambda v, x: module.apply(v, x, layers=True))(variables, pictures)
    return module, variables, found


def all_tokens(found):
    parts = (found.class_BD[:, None], found.registers_BRD, found.patches_BLD)
    return np.concatenate(parts, axis=1)


def close(found, wanted, atol):
    np.testing.assert_allclose(found, wanted, rtol=0, atol=atol)


@pytest.mark.parametrize("case", CASES)
def test_tokens_are_those_of_the_released_code(case):
    data, name = np.load(FOLDER / f"dinov2_{case}.npz"), case.split("_")[0]
    module, variables, found = encoded(f"dinov2_{name}.safetensors", data, "official")
    rows, columns = (side // 14 for side in data["images"].shape[1:3])
    place = module._resampled(variables["params"]["pos_embed"], rows, columns)
    close(place, data["pos"], 2e-5)
    close(found.patches_BLD, data["patchtokens"], TOKENS)
    close(found.class_BD, data["clstoken"], TOKENS)
    close(found.registers_BRD, data["regtokens"], TOKENS)
    layers = np.asarray(found.layers_NBTD)
    close(layers[:, :, 1 + module.registers :], data["layers_patch"], LAYERS)
    close(layers[:, :, 0], data["layers_cls"], LAYERS)


@pytest.mark.parametrize("case", CASES)
def test_tokens_are_those_of_timm_repa_and_transformers(case):
    data, name = np.load(FOLDER / f"dinov2_{case}.npz"), case.split("_")[0]
    _, _, found = encoded(f"dinov2_{name}.safetensors", data, "antialiased")
    close(all_tokens(found), data["timm_forward_features"], TOKENS)
    if "repa_patchtokens" in data:
        close(found.patches_BLD, data["repa_patchtokens"], TOKENS)
        close(found.class_BD, data["repa_clstoken"], TOKENS)
    _, _, found = encoded(f"dinov2_{name}.safetensors", data, "hub")
    close(all_tokens(found), data["hf_last_hidden_state"], TOKENS)


def test_a_picture_that_patches_do_not_fill_is_padded_as_timm_does():
    data = np.load(FOLDER / "dinov2_plain_timm256.npz")
    _, _, found = encoded("dinov2_plain.pth", data, "antialiased")
    close(all_tokens(found), data["timm_forward_features"], TOKENS)


def leaves(path):
    module, variables = interop.load(path)
    return module, jax.tree.leaves(variables)


def same(one, other):
    assert one[0] == other[0]
    for a, b in zip(one[1], other[1], strict=True):
        np.testing.assert_array_equal(a, b)


def test_all_kinds_of_files_hold_the_same_network(tmp_path):
    same(leaves(FOLDER / "dinov2_plain.pth"), leaves(FOLDER / "dinov2_plain.safetensors"))
    for name in ("dinov2_reg", "dinov2_swiglu"):
        same(leaves(FOLDER / f"{name}_hf"), leaves(FOLDER / f"{name}.safetensors"))
    plain = load_file(FOLDER / "dinov2_plain.safetensors")

    def saved(name, arrays, heads):
        save_file(arrays, tmp_path / f"{name}.safetensors")
        (tmp_path / f"{name}.config.json").write_text(json.dumps({"num_heads": heads}))
        return leaves(tmp_path / f"{name}.safetensors")

    # As checkpoints of their training are: in chunks, below a level, with heads of its own.
    def in_chunks(name):
        first, _, rest = name.partition("blocks.")
        return f"teacher.backbone.{name if first else f'blocks.{int(rest[0]) // 2}.{rest}'}"

    chunks = {in_chunks(name): array for name, array in plain.items()}
    chunks["teacher.dino_head.mlp.0.weight"] = np.zeros((2, 2), np.float32)
    same(saved("chunks", chunks, 2), leaves(FOLDER / "dinov2_plain.safetensors"))

    # timm's: the registers' class token has its position in it, SwiGLU is named like an MLP.
    reg = load_file(FOLDER / "dinov2_reg.safetensors")
    timm = {k.replace("register_tokens", "reg_token"): v for k, v in reg.items()}
    timm["cls_token"] = reg["cls_token"] + reg["pos_embed"][:, :1]
    timm["pos_embed"] = reg["pos_embed"][:, 1:].copy()
    module = saved("timm", timm, 3)[0]
    theirs = leaves(FOLDER / "dinov2_reg.safetensors")
    assert module == theirs[0]
    data = np.load(FOLDER / "dinov2_reg_168x280.npz")
    _, variables = interop.load(tmp_path / "timm.safetensors", positions="antialiased")
    pictures = resizing.normalised(jnp.asarray(data["images"], jnp.float32) / 255)
    close(all_tokens(module.apply(variables, pictures)), data["timm_forward_features"], TOKENS)
    swiglu = load_file(FOLDER / "dinov2_swiglu.safetensors")
    renamed = {
        name.replace("mlp.w12", "mlp.fc1").replace("mlp.w3", "mlp.fc2"): array
        for name, array in swiglu.items()
    }
    same(saved("swiglu", renamed, 2), leaves(FOLDER / "dinov2_swiglu.safetensors"))


def test_released_tensors_are_those_of_the_file():
    for name in ("plain", "reg", "swiglu"):
        path = FOLDER / f"dinov2_{name}.safetensors"
        wanted = load_file(path)
        found = interop.released_tensors(*interop.load(path))
        assert found.keys() == wanted.keys() - {"mask_token"}
        for key, array in found.items():
            np.testing.assert_array_equal(array, wanted[key])


def test_published_networks_have_the_published_sizes():
    counts = {"s": 22e6, "b": 87e6, "l": 304e6, "g": 1.14e9}
    for name, count in counts.items():
        module = dinov2.ENCODERS[f"dinov2_vit{name}14"]
        shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 14, 14, 3)))
        assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == pytest.approx(count, rel=0.02)
    assert dinov2.ENCODERS["dinov2_vitg14_reg"].hidden == 4096


def test_bfloat16_is_a_choice():
    data = np.load(FOLDER / "dinov2_plain_224x224.npz")
    _, _, found = encoded("dinov2_plain.safetensors", data, "official", jnp.bfloat16)
    error = np.abs(found.patches_BLD - data["patchtokens"]).max()
    assert TOKENS < error < 0.2  # three blocks of numbers of 8 bits, about 5


def test_weights_that_cannot_be(tmp_path):
    plain = load_file(FOLDER / "dinov2_plain.safetensors")
    path = tmp_path / "w.safetensors"

    def refused(arrays, match, **settings):
        save_file(arrays, path)
        with pytest.raises(UserError, match=match):
            interop.load(path, **settings)

    refused({k: v for k, v in plain.items() if "fc1.bias" not in k}, r"missing blocks\.0\.mlp\.fc1")
    refused(plain | {"other": np.zeros(2, np.float32)}, "extra other")
    refused(plain | {"pos_embed": plain["pos_embed"][0]}, r"misshapen pos_embed \(1370, 32\)")
    refused(plain | {"pos_embed": np.zeros((1, 1370, 0), np.float32)}, "misshapen pos_embed")
    refused(plain | {"register_tokens": np.zeros(4, np.float32)}, "misshapen register_tokens")
    refused(
        plain | {"blocks.99999999.norm1.weight": np.zeros(2, np.float32)}, "extra blocks.99999999"
    )
    refused({"conv.weight": np.zeros((2, 2), np.float32)}, "are not those of DINOv2.*pos_embed")
    refused(plain | {"norm.bias": np.full(32, np.nan, np.float32)}, r"not finite.*norm\.bias")
    refused(plain | {"norm.bias": np.zeros(31, np.float32)}, r"misshapen norm\.bias")
    refused(plain, "are of another network.*width 32, 3 blocks", size="dinov2_vitb14")
    (tmp_path / "w.config.json").write_text('{"num_heads": 5}')
    refused(plain, "5 attention heads")
    (tmp_path / "w.config.json").write_text('{"num_heads": 2, "num_register_tokens": 4}')
    refused(plain, "have 0 register tokens, and their config says 4")
    (tmp_path / "w.config.json").write_text("{")
    refused(plain, "w.config.json cannot be read")


# --- What reaches the network.

RULES = {  # in the golden data → ours, bound there
    "dgm_eval": ("dgm_eval", 2e-6),
    "edm2_pil": ("dgm_eval", 2e-6),
    "dgm_eval_clean": ("dgm_eval_clean", 2e-5),
    "edm2_torch": ("edm2", 3e-4),
    "torch_fidelity": ("torch_fidelity", 6e-4),
    "repa_dinov2": ("repa", 6e-4),
    "repa_clip": ("repa_clip", 6e-4),
    "repa_mae": ("repa_mae", 5e-6),
    "fdr6_dinov2": ("fdr6", 4e-4),
}


@pytest.mark.parametrize("size", [256, 512])
def test_pictures_are_prepared_as_each_convention_has_it(size):
    data = np.load(FOLDER / f"preprocess_{size}.npz")
    for theirs, (rule, bound) in RULES.items():
        prepare = jax.jit(lambda x, rule=rule: resizing.prepared(x, rule))
        found = np.asarray(prepare(data["image"][None])[0]).transpose(2, 0, 1)
        assert list(found.shape) == data[f"{theirs}/shape"].tolist()
        middle = slice(found.shape[1] // 2 - 16, found.shape[1] // 2 + 16)
        for name, part in {
            "top_left": found[:, :20, :20],
            "bottom_right": found[:, -20:, -20:],
            "middle": found[:, middle, middle],
            "every11": found[:, ::11, ::11],
        }.items():
            close(part, data[f"{theirs}/{name}"], bound)
        wide = found.astype(np.float64)
        for power, name, relative in ((1, "sum", 2e-5), (2, "sum_of_squares", 1e-4)):
            summed = (wide**power).sum((1, 2))
            np.testing.assert_allclose(summed, data[f"{theirs}/{name}"], rtol=relative)


@pytest.mark.parametrize("shape", [(224, 224), (672, 672), (97, 301), (20, 500), (5, 3)])
def test_pillow_is_met_bit_for_bit(shape):
    """At 672 every third weight within a row is 0."""
    from PIL import Image

    picture = np.random.default_rng(1).integers(0, 256, (*shape, 3), np.uint8)
    wanted = Image.fromarray(picture).resize((224, 224), Image.Resampling.BICUBIC)
    found = resizing.pil_resized(picture[None], (224, 224))[0]
    np.testing.assert_array_equal(found, np.asarray(wanted))
