"""Packaging of unialign_jax. The version ranges are those the tests were run on; see README."""

import pathlib

from setuptools import find_packages, setup

# The TPU compiler, for the ahead-of-time verdict: no TPU is needed to use it.
TPU = ["jax[tpu]>=0.10.2,<0.12"]
# What etils and fsspec read and write gs:// with; it brings the client library that Orbax needs there.
GCS = ["gcsfs>=2025.12"]
# torch is pinned, for the tests compare numbers with it. Its CPU wheels, from https://download.pytorch.org/whl/cpu and
# installed first, spare the gigabytes of CUDA libraries that PyPI's bring.
TEST = [
    *TPU,
    *GCS,
    "diffusers>=0.35",
    "pytest>=8",
    "pytest-xdist>=3.6",
    "ruff>=0.12",
    "safetensors>=0.5",
    "torch==2.13.0",
    "transformers>=4.55",
]

setup(
    name="unialign_jax",
    version="0.1.0",
    description="Unified image-text diffusion transformers (UniAlignment) in JAX, for TPU pods and GPUs.",
    long_description=pathlib.Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    package_data={"unialign_jax": ["checkpoints_shipped/**/*"]},
    packages=find_packages(include=["unialign_jax", "unialign_jax.*"]),
    install_requires=[
        "jax>=0.10.2,<0.12",
        "flax>=0.12.8,<0.13",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8,<0.13",
        "grain>=0.2.18",
        "tensorflow-datasets>=4.9.10",
        "array-record>=0.8.3",
        "ml_collections>=1.1",
        "clu>=0.0.12",
        "tensorboardX>=2.6",  # what clu's summary writer runs on here: TensorBoard files without TensorFlow
        "absl-py>=2.1",
        "etils[epath,epy]>=1.9",
        "importlib_resources",  # undeclared need of tensorflow-datasets
        "flatbuffers",  # undeclared need of jax.export
        "numpy>=2.0",
        "pillow>=11",
        "scipy>=1.13",
        "tokenizers>=0.21",
        "tqdm>=4.67",
    ],
    extras_require={
        "test": TEST,
        "tpu": [*TPU, *GCS],
        "gpu": ["jax[cuda13]>=0.10.2,<0.12"],
        "gcs": GCS,
        # To read a .pth mask-token vector, and to run what was converted beside the public libraries (--check).
        "convert": ["diffusers>=0.35", "torch>=2.8", "transformers>=4.55"],
    },
)
