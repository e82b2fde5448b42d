"""Networks of the chain from latents to a figure, in sizes for tests."""

import io
import json
import pickle
import sys
import types
import zipfile
from collections import OrderedDict
from unittest import mock

import numpy as np
from safetensors.numpy import save_file
from support.golden import GOLDEN

from diffit_jax import models
from diffit_jax.interop import inception as interop
from diffit_jax.interop import tensors
from diffit_jax.models.pretrained.inception import SIDE, Inception

# Of the FID network's width: every unit has a whole number of channels. A narrower one has so few
# outputs that a CPU of many threads divides sums among them, and rounds in another way.
NARROW = 1 / 8
VAE = GOLDEN / "vae_small.safetensors"


def inception_tensors(width=1.0):
    """Random weights by the names of pytorch-fid's file. At full width they are those of
    `golden/inception.npz`: names in order, RandomState(401), a draw for each."""
    module = Inception(width)
    shapes = models.variable_shapes(module, (SIDE, SIDE, 3))
    draws, made = np.random.RandomState(401), {}
    for name, (path, axes) in sorted(interop.names().items()):
        ours = tensors.at(shapes, path).shape
        shape = tuple(ours[place] for place in np.argsort(axes)) if axes else ours
        if name.endswith("running_var"):
            made[name] = draws.uniform(0.5, 1.5, shape)
            continue
        normal = draws.standard_normal(shape)
        if name.endswith("conv.weight"):
            normal *= np.sqrt(2 / np.prod(shape[1:]))
        elif name == "fc.weight":
            normal /= np.sqrt(shape[1])
        else:
            normal = 0.1 * normal + name.endswith("bn.weight")
        made[name] = normal
    return {name: array.astype(np.float32) for name, array in made.items()}


def save_pth(path, tensors):
    """Tensors by name as PyTorch would save a state dict, in its zip format."""
    stored = {}

    class Pickler(pickle.Pickler):
        def reducer_override(self, obj):
            if not isinstance(obj, np.ndarray):
                return NotImplemented
            strides = tuple(stride // obj.itemsize for stride in obj.strides)
            stored[str(len(stored))] = obj
            return rebuild, (Storage(), 0, obj.shape, strides, False, OrderedDict())

        def persistent_id(self, obj):
            if isinstance(obj, Storage):
                key, array = list(stored.items())[-1]
                return "storage", FloatStorage, key, "cpu", array.size

    class Storage:
        pass

    class FloatStorage:
        pass

    def rebuild():
        pass

    names = {
        "torch": ("FloatStorage", FloatStorage),
        "torch._utils": ("_rebuild_tensor_v2", rebuild),
    }
    modules = {}
    for module, (name, obj) in names.items():  # pickle asks whether they are where they say
        obj.__module__, obj.__qualname__, obj.__name__ = module, name, name
        modules[module] = types.ModuleType(module)
        setattr(modules[module], name, obj)
    content = io.BytesIO()
    with mock.patch.dict(sys.modules, modules):
        Pickler(content, 2).dump(OrderedDict(tensors))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", content.getvalue())
        for key, array in stored.items():
            archive.writestr(f"archive/data/{key}", array.tobytes())


def save_inception(path, width=NARROW):
    save_file(inception_tensors(width), path)
    return path


def save_vae(folder, **config):
    """The small autoencoder as a folder of diffusers'; `config`: what its config says else."""
    folder.mkdir(parents=True)
    said = json.loads((GOLDEN / "vae_small.config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(said))
    (folder / "diffusion_pytorch_model.safetensors").symlink_to(VAE)
    return folder


TINY_VAE = dict(
    block_out_channels=[8, 8],
    down_block_types=["DownEncoderBlock2D"] * 2,
    up_block_types=["UpDecoderBlock2D"] * 2,
    layers_per_block=1,
    norm_num_groups=4,
    mid_block_add_attention=False,
)


def save_tiny_vae(folder, **config):
    """An autoencoder of half the side with random weights, which compiles in a second."""
    rng, tensors = np.random.default_rng(0), {}

    def layer(name, outputs, inputs, side=3):
        shape = (outputs, inputs, side, side)
        tensors[f"{name}.weight"] = rng.normal(size=shape) / np.sqrt(inputs * side * side)
        tensors[f"{name}.bias"] = 0.1 * rng.normal(size=outputs)

    def block(name):
        for number in (1, 2):
            tensors[f"{name}.norm{number}.weight"] = 1 + 0.1 * rng.normal(size=8)
            tensors[f"{name}.norm{number}.bias"] = 0.1 * rng.normal(size=8)
            layer(f"{name}.conv{number}", 8, 8)

    for half, inputs, outputs in (("encoder", 3, 8), ("decoder", 4, 3)):
        layer(f"{half}.conv_in", 8, inputs)
        layer(f"{half}.conv_out", outputs, 8)
        tensors[f"{half}.conv_norm_out.weight"] = np.ones(8)
        tensors[f"{half}.conv_norm_out.bias"] = np.zeros(8)
        for number in (0, 1):
            block(f"{half}.mid_block.resnets.{number}")
    for stage in (0, 1):
        block(f"encoder.down_blocks.{stage}.resnets.0")
        for number in (0, 1):
            block(f"decoder.up_blocks.{stage}.resnets.{number}")
    layer("encoder.down_blocks.0.downsamplers.0.conv", 8, 8)
    layer("decoder.up_blocks.0.upsamplers.0.conv", 8, 8)
    layer("quant_conv", 8, 8, side=1)
    layer("post_quant_conv", 4, 4, side=1)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(TINY_VAE | config))
    arrays = {name: array.astype(np.float32) for name, array in tensors.items()}
    save_file(arrays, folder / "diffusion_pytorch_model.safetensors")
    return folder
