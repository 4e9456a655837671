"""Conversion holds a few tensors, not a network: measured from outside, on a checkpoint far larger than the bound."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

MB = 2**20
# Runs in a process of its own. VmHWM is the peak of all resident memory, mapped file pages included; writing 5 to
# clear_refs starts it afresh. Converting next to nothing first brings in the libraries and their threads.
PROGRAM = """
import ctypes, json, pathlib, sys
from unialign_jax import convert

def growth(work):
    status = lambda key: int(pathlib.Path("/proc/self/status").read_text().split(key + ":")[1].split()[0]) * 1024
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    work()
    return status("VmHWM") - before

convert.store.CHUNK_BYTES = 16 * 2**20  # 64 MB hide whether leaves of 144 MB are whole in memory
small, large, work = sys.argv[1:]
convert.to_jax(small, work + "/small_jax", progress=False)
convert.to_torch(work + "/small_jax", work + "/small_torch", progress=False)
imported = growth(lambda: convert.to_jax(large, work + "/jax", progress=False))
ctypes.CDLL(None).malloc_trim(0)  # what the import leaves behind is not the export's to use
exported = growth(lambda: convert.to_torch(work + "/jax", work + "/torch", shard_size=100_000_000, progress=False))
print(json.dumps([imported, exported]))
"""


@pytest.fixture
def large(pipeline, tmp_path, edit_json):
    """The recorded pipeline with a text encoder of 64 blocks: 620 MB, whose largest tensor has 2.3 MB."""
    folder = pipeline.rename(tmp_path / "large") / "text_encoder"
    layers, mlp, width = 64, 12288, 48
    edit_json(folder / "config.json", num_layers=layers, d_ff=mlp)
    tensors = load_file(folder / "model.safetensors")
    block = {name: t for name, t in tensors.items() if ".block.1." in name}
    random = torch.randn(mlp, width)
    for i in range(layers):
        for name, tensor in block.items():
            if "DenseReluDense" in name:
                tensor = (random + i).T if ".wo." in name else random + i
            tensors[name.replace(".block.1.", f".block.{i}.")] = tensor.clone(memory_format=torch.contiguous_format)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder.parent


def test_peak_memory_is_bounded(large, golden, tmp_path):
    file = large / "text_encoder/model.safetensors"
    size = file.stat().st_size
    assert size > 400 * MB
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(golden), str(large), str(tmp_path)],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    imported, exported = json.loads(run.stdout.splitlines()[-1])
    print(f"converting {size / MB:.0f} MB took {imported / MB:.0f} MB one way and {exported / MB:.0f} MB the other")
    # A batch of pieces, what TensorStore holds of the one before until the disk has it, and the libraries' buffers;
    # less than one stacked leaf, of 144 MB.
    assert 0 < imported < 100 * MB
    assert exported < 60 * MB
    written = {}
    for shard in (tmp_path / "torch/text_encoder").glob("*.safetensors"):
        written.update(load_file(shard))
    stored = load_file(file)
    assert written.keys() == stored.keys() and all(torch.equal(written[name], stored[name]) for name in stored)
