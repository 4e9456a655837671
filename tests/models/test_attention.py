"""Every backend against one float64 oracle, forward and backward, on one device and on meshes of virtual ones."""

import functools
import json
import logging
import os
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, SingleDeviceSharding

from unialign_jax.models import attention, attention_kernels
from unialign_jax.models.attention import attend, join_tokens, split_tokens
from unialign_jax.models.attention_kernels import KEPT, block_sides, splash
from unialign_jax.training import verdict


def oracle(query, key, value, segments, cotangent):
    """(output, dQ, dK, dV) of softmax(Q K^T / sqrt(D)) V within segments, by the textbook formulas in float64."""
    arrays = (query, key, value, cotangent)
    query, key, value, cotangent = (np.moveaxis(np.asarray(x, np.float64), 1, 2) for x in arrays)
    scale = query.shape[-1] ** -0.5
    logits = query @ np.swapaxes(key, -1, -2) * scale
    if segments is not None:
        logits[np.broadcast_to(segments[:, None, :, None] != segments[:, None, None, :], logits.shape)] = -np.inf
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    by_weight = cotangent @ np.swapaxes(value, -1, -2)
    by_logit = weights * (by_weight - (weights * by_weight).sum(-1, keepdims=True)) * scale
    transposed = np.swapaxes(weights, -1, -2)
    results = (weights @ value, by_logit @ key, np.swapaxes(by_logit, -1, -2) @ query, transposed @ cotangent)
    return [np.moveaxis(x, 2, 1) for x in results]


def draw(batch, length, heads, head_size, segmented, dtype=jnp.float32):
    """Random (query, key, value, cotangent), and segment ids as absent references give them: 1, then 0, then 1."""
    rng = np.random.default_rng(length)
    arrays = [jnp.asarray(rng.normal(size=(batch, length, heads, head_size)), dtype) for _ in range(4)]
    if not segmented:
        return arrays, None
    first, last = np.sort(rng.integers(0, length + 1, (2, batch, 1)), axis=0)
    place = np.arange(length)
    return arrays, np.where((place >= first) & (place < last), 0, 1).astype(np.int32)


def run(arrays, segments, backend):
    """(output, dQ, dK, dV) of `attend`."""

    @jax.jit
    def both(query, key, value, cotangent):
        output, pull = jax.vjp(lambda *qkv: attend(*qkv, segments, backend=backend), query, key, value)
        return output, *pull(cotangent)

    return both(*arrays)


def worst(results, expected):
    """Largest error over all results, relative to each one's largest entry (at least 0.1: some gradients vanish)."""
    errors = []
    for result, wanted in zip(results, expected, strict=True):
        result, wanted = np.asarray(result, np.float64), np.asarray(wanted, np.float64)
        errors.append(np.abs(result - wanted).max() / max(np.abs(wanted).max(), 0.1))
    return np.max(errors)  # which no NaN passes, unlike Python's


@pytest.mark.parametrize(
    ("backend", "batch", "length", "heads", "head_size", "segmented"),
    [
        ("xla", 2, 77, 3, 16, True),
        ("xla", 1, 130, 1, 64, False),
        ("cpu", 2, 77, 3, 16, True),
        ("cpu", 1, 130, 1, 64, False),
        ("splash", 1, 1, 2, 64, False),
        ("splash", 2, 128, 2, 64, False),  # nothing to pad, no mask in the kernel
        ("splash", 2, 130, 1, 80, True),  # a head size between the kernel's
        ("splash:128", 2, 300, 2, 16, True),  # three blocks, of which some have no key of the segment
        ("splash", 1, 1290, 1, 64, False),  # several blocks of the derived size
        ("splash", 1, 2816, 1, 64, False),  # long blocks, and nothing to pad
        ("splash", 1, 2800, 1, 64, True),
        ("splash", 1, 4095, 1, 64, True),
    ],
)
def test_matches_the_oracle(backend, batch, length, heads, head_size, segmented):
    arrays, segments = draw(batch, length, heads, head_size, segmented)
    results = run(arrays, segments, backend)
    assert all(result.dtype == jnp.float32 for result in results)
    assert worst(results, oracle(*arrays[:3], segments, arrays[3])) < 4e-6


def test_splash_in_bfloat16():
    arrays, segments = draw(2, 300, 2, 64, True, jnp.bfloat16)
    results = run(arrays, segments, "splash:128")
    assert all(result.dtype == jnp.bfloat16 for result in results)
    assert worst(results, oracle(*arrays[:3], segments, arrays[3])) < 5e-3


@pytest.mark.parametrize(("length", "segmented"), [(77, True), (77, False), (80, True)])
def test_cudnn_inputs(monkeypatch, length, segmented):
    """What cuDNN would be given, computed by the XLA implementation of the same function."""
    real, asked = jax.nn.dot_product_attention, []

    def instead(*args, implementation, **kwargs):
        asked.append((implementation, args[0].shape[1]))
        return real(*args, implementation="xla", **kwargs)

    monkeypatch.setattr(jax.nn, "dot_product_attention", instead)
    arrays, segments = draw(2, length, 2, 16, segmented, jnp.bfloat16)
    results = run(arrays, segments, "cudnn")
    assert asked == [("cudnn", length + length % 2)]  # cuDNN's backward pass takes even lengths only
    assert worst(results, oracle(*arrays[:3], segments, arrays[3])) < 1.5e-2


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="on an NVIDIA GPU, JAX_PLATFORMS=cuda runs it")
@pytest.mark.parametrize("segmented", [True, False])
@pytest.mark.parametrize(("length", "head_size"), [(1, 64), (77, 64), (130, 80), (300, 128), (1291, 64), (4095, 64)])
def test_cudnn_on_a_gpu(length, head_size, segmented):
    arrays, segments = draw(2, length, 2, head_size, segmented, jnp.bfloat16)
    results = run(arrays, segments, "cudnn")
    assert all(result.dtype == jnp.bfloat16 for result in results)
    assert worst(results, oracle(*arrays[:3], segments, arrays[3])) < 8e-3


def described_mesh(platform, kind, **axes):
    """A mesh of devices that are only described, so that programs can be traced and lowered for them anywhere."""
    return AbstractMesh(
        tuple(axes.values()),
        tuple(axes),
        axis_types=(AxisType.Auto,) * len(axes),
        abstract_device=AbstractDevice(device_kind=kind, num_cores=1, platform=platform),
    )


TPU = functools.partial(described_mesh, "tpu", "TPU v5 lite")
GPU = functools.partial(described_mesh, "gpu", "NVIDIA H100 80GB HBM3")


def lowered(mesh, platform, backend, shape, segmented=False, dtype=jnp.bfloat16):
    """Text of the forward and backward program for a platform that need not be there."""
    x = jax.ShapeDtypeStruct(shape, dtype)
    segments = jax.ShapeDtypeStruct(shape[:2], jnp.int32) if segmented else None

    def both(query, key, value, cotangent, segments):
        output, pull = jax.vjp(lambda *qkv: attend(*qkv, segments, backend=backend), query, key, value)
        return output, *pull(cotangent)

    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(both).trace(x, x, x, x, segments).lower(lowering_platforms=(platform,)).as_text()


def test_auto_takes_the_kernel_of_the_platform(monkeypatch, caplog):
    attention._warn_once.cache_clear()  # what other tests have been told
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    shape = (1, 200, 2, 64)
    assert lowered(TPU(data=1), "tpu", "auto", shape).count("tpu_custom_call") == 2
    cuda = lowered(GPU(data=1), "cuda", "auto", shape)
    assert "@__cudnn$fmhaSoftmax(" in cuda and "@__cudnn$fmhaSoftmaxBackward(" in cuda
    assert not caplog.records
    assert "custom_call" not in lowered(TPU(data=1), "tpu", "auto", (1, 128, 2, 64))  # short: no kernel helps
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert "tpu_custom_call" not in lowered(TPU(data=1), "tpu", "auto", shape, dtype=jnp.float32)
            assert "__cudnn" not in lowered(GPU(data=1), "cuda", "auto", (1, 200, 2, 20))
    assert len(caplog.records) == 2
    assert "float32" in caplog.text and "head size 20" in caplog.text
    on_this_cpu = jax.jit(functools.partial(attend, backend="auto")).lower(*(jnp.zeros(shape),) * 3)
    assert "custom_call" not in on_this_cpu.as_text() and "stablehlo.while" in on_this_cpu.as_text()


@pytest.mark.parametrize("capability", ["7.5", "gfx90a", ""])
def test_auto_leaves_cudnn_to_gpus_that_have_it(monkeypatch, caplog, capability):
    attention._warn_once.cache_clear()
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    gpu = types.SimpleNamespace(platform="gpu", compute_capability=capability, device_kind="a GPU")
    monkeypatch.setattr(attention_kernels.jax, "local_devices", lambda: [gpu])
    assert "__cudnn" not in lowered(GPU(data=1), "cuda", "auto", (1, 200, 2, 64))
    assert "is older than NVIDIA's Ampere" in caplog.text
    gpu.compute_capability = "8.0"
    assert "__cudnn" in lowered(GPU(data=1), "cuda", "auto", (1, 200, 2, 64))


@pytest.mark.parametrize(
    ("mesh", "platform", "backend", "calls"),
    [(TPU, "tpu", "splash", "tpu_custom_call"), (GPU, "cuda", "cudnn", "__cudnn$fmhaScaleBiasSoftmax")],
)
def test_collectives_of_a_split_sequence(monkeypatch, mesh, platform, backend, calls):
    """Keys, values and segments are gathered, gradients of keys and values scattered back, and nothing else moves."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    text = lowered(mesh(data=2, fsdp=2, sequence=2, tensor=2), platform, backend, (8, 256, 4, 64), segmented=True)
    assert text.count(calls) >= 2
    assert text.count('"stablehlo.all_gather"') == 3
    assert text.count('"stablehlo.reduce_scatter"') == 2
    assert not any(f"stablehlo.{other}" in text for other in ("all_reduce", "all_to_all", "collective_permute"))


def test_joined_tokens_stay_on_their_devices():
    parts = [jnp.arange(4)[None], 10 + jnp.arange(6)[None]]
    for sequence, expected in (
        (1, [0, 1, 2, 3, 10, 11, 12, 13, 14, 15]),
        (2, [0, 1, 10, 11, 12, 2, 3, 13, 14, 15]),
        (4, [0, 1, 2, 3, 10, 11, 12, 13, 14, 15]),  # which does not divide six
    ):
        with jax.sharding.use_abstract_mesh(TPU(data=2, sequence=sequence)):
            joint = join_tokens(parts)
            np.testing.assert_array_equal(joint, [expected])
            for part, again in zip(parts, split_tokens(joint, [4, 6]), strict=True):
                np.testing.assert_array_equal(again, part)


def test_residuals_can_be_kept_by_name(capsys):
    """A rematerialization policy can keep what the backward kernel needs of the forward one, and nothing else."""
    x = jnp.zeros((1, 100, 2, 64))
    jax.ad_checkpoint.print_saved_residuals(jax.checkpoint(lambda q: attend(q, q, q, backend="splash"), policy=KEPT), x)
    kept = [line.split()[0] for line in capsys.readouterr().out.splitlines() if "from the argument" not in line]
    # The rest is the kernel's table of blocks, a few bytes.
    assert sorted(name for name in kept if name != "i8[1,1,1]") == ["f32[1,2,128,64]", "f32[1,2,128]"]


@pytest.mark.parametrize(("policy", "forward"), [(KEPT, 1), (jax.checkpoint_policies.nothing_saveable, 2)])
@pytest.mark.parametrize("devices", [1, 2])
def test_residuals_of_cudnn_can_be_kept(monkeypatch, policy, forward, devices):
    """In the loop over blocks: the policy decides whether the backward pass runs the forward kernel again."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)

    def loss(x):
        block = jax.checkpoint(lambda x, _: (attend(x, x, x, backend="cudnn"), None), policy=policy, prevent_cse=False)
        return jax.lax.scan(block, x, length=3)[0].astype(jnp.float32).sum()

    with jax.sharding.use_abstract_mesh(GPU(data=devices)):
        traced = jax.jit(jax.grad(loss)).trace(jax.ShapeDtypeStruct((2, 200, 2, 64), jnp.bfloat16))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@__cudnn$fmhaSoftmax(") == forward
    assert text.count("@__cudnn$fmhaSoftmaxBackward(") == 1


def test_block_sizes():
    sides = {1: 128, 264: 384, 1152: 1152, 1280: 640, 2304: 1152, 2432: 640}
    assert {length: block_sides(length, length, 64, 2) for length in sides} == {n: (s, s) for n, s in sides.items()}
    # Square blocks would pad these.
    assert block_sides(3328, 3328, 64, 2) == (256, 1664)
    assert block_sides(4352, 4352, 64, 2) == (256, 2176)
    assert block_sides(1088, 4352, 64, 2) == (1152, 896)  # a share of the queries that 256 do not divide
    assert block_sides(4352, 4352, 64, 4) == block_sides(4352, 4352, 256, 2) == (512, 512)
    for length in range(1, 9000, 61):
        for side in block_sides(length, length, 64, 2):
            assert side % 128 == 0 and side <= 2176
            assert -length % side < 128 + 0.1 * length, length


@pytest.mark.parametrize("length", [1152, 2304, 4352, 4608])
def test_blocks_with_segments_fit_the_smallest_vector_memory(length):
    """The lengths whose blocks are largest, forward and backward, by v5e's compiler; an editing row has 2304 tokens."""
    verdict.prepare("v5e:2x2")
    one = SingleDeviceSharding(verdict.describe("v5e:2x2")[0])
    x = jax.ShapeDtypeStruct((1, length, 2, 64), jnp.bfloat16, sharding=one)
    ids = jax.ShapeDtypeStruct((1, length), jnp.int32, sharding=one)

    def total(query, key, value, segments):
        return jnp.sum(splash(query, key, value, segments, segments).astype(jnp.float32))

    compiled = jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(x, x, x, ids).compile()
    assert "segmented" in compiled.as_text()


_FITS = """
import sys
import jax, jax.numpy as jnp
from unialign_jax.models.attention_kernels import splash
from unialign_jax.training import verdict
topology = sys.argv[1]
verdict.prepare(topology)
one = jax.sharding.SingleDeviceSharding(verdict.describe(topology)[0])
def total(query, key, value, segments):
    return jnp.sum(splash(query, key, value, segments, segments).astype(jnp.float32))
for length, head_size, segmented in ((2304, 64, False), (2304, 128, False), (2304, 64, True), (4352, 64, True)):
    x = jax.ShapeDtypeStruct((1, length, 2, head_size), jnp.bfloat16, sharding=one)
    ids = jax.ShapeDtypeStruct((1, length), jnp.int32, sharding=one) if segmented else None
    jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(x, x, x, ids).compile()
"""


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v6e:2x2", "tpu7x:2x2x1"])
def test_blocks_fit_the_vector_memory_that_the_flags_leave_them(topology):
    """The compiler takes its flags once in a process."""
    done = subprocess.run([sys.executable, "-c", _FITS, topology], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(
    ("backend", "dtype", "head_size", "named"),
    [
        ("flash", jnp.float32, 16, ["'flash'", "splash", "xla"]),
        ("xla:128", jnp.float32, 16, ["'xla:128'"]),
        ("splash:100", jnp.float32, 16, ["'splash:100'", "128"]),
        ("splash", jnp.float32, 320, ["320", "256"]),
        ("cudnn", jnp.float32, 16, ["float32", "bfloat16"]),
        ("cudnn", jnp.bfloat16, 20, ["head size 20"]),
    ],
)
def test_refusals(backend, dtype, head_size, named):
    x = jnp.zeros((1, 8, 2, head_size), dtype)
    with pytest.raises(ValueError) as error:
        attend(x, x, x, backend=backend)
    assert all(word in str(error.value) for word in named), error.value


def test_mesh_that_does_not_fit(caplog):
    with jax.sharding.use_abstract_mesh(TPU(data=2, tensor=4)):
        x = jax.ShapeDtypeStruct((2, 8, 6, 16), jnp.bfloat16)
        for backend in ("splash", "cudnn"):
            with pytest.raises(ValueError, match="6 attention heads .*'tensor' axis of 4"):
                jax.eval_shape(functools.partial(attend, backend=backend), x, x, x)
        assert jax.eval_shape(functools.partial(attend, backend="xla"), x, x, x).shape == x.shape
        x = jax.ShapeDtypeStruct((3, 300, 8, 16), jnp.bfloat16)
        assert jax.eval_shape(functools.partial(attend, backend="splash"), x, x, x).shape == x.shape
    assert "batch of 3 on each of the 2 devices" in caplog.text


SHARDED = [
    ({"data": 8}, "splash:128", False),
    ({"data": 4, "sequence": 2}, "splash:128", True),
    ({"fsdp": 2, "sequence": 2, "tensor": 2}, "splash:128", True),
    ({"data": 2, "fsdp": 2, "tensor": 2}, "splash:128", False),
    ({"fsdp": 2, "sequence": 4}, "splash", False),  # the padding alone needs segments
]


def sharded_errors():
    """Prints the largest error of every case in `SHARDED` against the same backend on one device."""
    arrays = {segmented: draw(8, 301, 2, 16, segmented) for segmented in (False, True)}
    expected = {segmented: run(*arrays[segmented], "splash:128") for segmented in arrays}
    errors = []
    for axes, backend, segmented in SHARDED:
        mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))
        with jax.set_mesh(mesh):
            errors.append(worst(run(*arrays[segmented], backend), expected[segmented]))
    print(json.dumps(errors))


@pytest.mark.slow
def test_sharded_equals_unsharded():
    code = f"import runpy; runpy.run_path({__file__!r})['sharded_errors']()"
    # Sharded programs on few cores deadlock unless there are more threads than devices.
    virtual = {"NPROC": "16", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | virtual, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout)
    assert len(errors) == len(SHARDED)
    assert np.max(errors) < 2e-6, errors
