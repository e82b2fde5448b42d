"""Networks of the chain from latents to a figure, in sizes for tests."""

import io
import json
import pickle
import sys
import types
import zipfile
from collections import OrderedDict
from unittest import mock

import jax
import numpy as np
from safetensors.numpy import save_file
from support.golden import GOLDEN

from diffit_jax.interop import inception as interop
from diffit_jax.interop import tensors
from diffit_jax.models.inception import SIDE, Inception

# Of the FID network's width: every unit has a whole number of channels. A narrower one has so few
# outputs that a CPU of many threads divides sums among them, and rounds in another way.
NARROW = 1 / 8
VAE = GOLDEN / "vae_small.safetensors"


def inception_tensors(width=1.0):
    """Random weights by the names of pytorch-fid's file. At full width they are those of
    `golden/inception.npz`: names in order, RandomState(401), a draw for each."""
    module = Inception(width)
    shapes = jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, SIDE, SIDE, 3), "f4"))
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
