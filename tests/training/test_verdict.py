"""The ahead-of-time verdict of a small config for a described v5e:4x4, and what is refused."""

import importlib.util
import math
import pathlib
import runpy

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from unialign_jax import parallel
from unialign_jax.training import roofline, scaling, verdict
from unialign_jax.training.chips import CHIPS, Slices
from unialign_jax.training.collectives import Collective
from unialign_jax.training.hlo import Module

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"


def small(**changes):
    """photos_tiny in bfloat16 with lengths and heads that the kernel need not pad: 144 + 112 tokens, heads of 64."""
    config = runpy.run_path(str(CONFIGS / "photos_tiny.py"))["get_config"]().lock()
    transformer = {"num_attention_heads": 2, "attention_head_dim": 64}
    config.update_from_flattened_dict(
        {
            "dtype": "bfloat16",
            "data.global_batch": 64,
            "data.text_length": 112,
            **{f"model.transformer.{name}": value for name, value in transformer.items()},
            **changes,
        }
    )
    return scaling.read_config(config)


def judged(strategy):
    """The verdict of training the transformer alone, encoders cached."""
    verdict.prepare("v5e:4x4")
    cached = ("latents", "instructions", "teacher")
    run = small(strategy=strategy, remat="dots+attention", trained=("transformer",), cached=cached)
    return verdict.judge(run, "v5e:4x4")


@pytest.fixture(scope="module")
def found():
    return judged("data=2+fsdp=8")


def test_small_config_fits_with_the_kernel_in_the_program(found):
    assert found["fits"] and found["attention"] == "splash"
    memory = found["hbm_gib"]
    parts = ("parameters", "optimizer", "ema", "frozen", "batch", "temporaries")
    assert memory["total"] == pytest.approx(sum(memory[part] for part in parts), abs=0.01)
    assert memory["total"] == pytest.approx(0.046, rel=0.1)  # recorded
    assert memory["usable"] == 15.75 and memory["free"] == pytest.approx(15.75 - memory["total"], abs=0.01)


def test_its_collectives_are_those_of_the_plan(found):
    received = {(entry["kind"], entry["axes"]): entry["bytes"] for entry in found["collectives"]}
    assert {entry["network"] for entry in found["collectives"]} == {"interconnect"}
    weights, gradients, copies = (
        received[key] for key in (("all-gather", "fsdp"), ("reduce-scatter", "fsdp"), ("all-reduce", "data"))
    )
    # Recorded with libtpu 0.0.42; another compiler may do a little differently.
    assert (weights, gradients, copies) == pytest.approx((11.52e6, 5.62e6, 0.807e6), rel=0.1)
    assert sum(entry["bytes"] for entry in found["activation_gathers"]) < 0.1 * weights


def test_the_program_does_what_is_needed_and_what_its_policy_repeats(found):
    work = found["flops"]
    expected = work["model"] + work["frozen"] + work["recomputed"]
    assert expected * 0.95 < work["program"] < expected * 1.1
    rates = found["overlapped"]
    assert rates["step_s"] == max(found["roofline"][name] for name in ("device", "interconnect", "dcn"))
    assert rates["mfu"] == pytest.approx((work["model"] + work["frozen"]) / (16 * 197e12 * rates["step_s"]))
    assert rates["mfu_transformer"] < rates["mfu"]
    assert (rates["step_s"], found["serial"]["step_s"]) == pytest.approx((207e-6, 337e-6), rel=0.1)  # recorded
    assert "splash" in scaling.summary(found) and "fits" in scaling.summary(found)


@pytest.mark.slow
def test_a_split_sequence_moves_keys_and_values_alone():
    """Over `sequence`, in the step with its blocks: no token changes its device where streams join and part."""
    found = judged("data=2+fsdp=4+sequence=2")
    received = {entry["kind"]: entry["bytes"] for entry in found["collectives"] if entry["axes"] == "sequence"}
    layers, rows, tokens, width = 5, 8, 256, 128
    half = layers * 2 * 2 * rows * tokens * width * 2 / 2  # keys and values of both passes, bfloat16; one half is here
    assert received["reduce-scatter"] == pytest.approx(half, rel=0.01)
    # Keys and values are gathered again for the backward pass; a tenth is around the blocks.
    assert received["all-gather"] == pytest.approx(2 * half, rel=0.1)
    assert not {"all-to-all", "collective-permute"} & set(received)


def test_a_weight_gathered_over_one_axis_and_split_over_another_is_no_activation():
    mesh = AbstractMesh((2, 4, 1, 2), parallel.AXES, axis_types=(AxisType.Auto,) * 4)
    kernel = jax.ShapeDtypeStruct((3, 64, 256), jnp.float32)
    kernel = parallel.placed(kernel, NamedSharding(mesh, PartitionSpec(None, "fsdp", "tensor")))
    gathers = [
        Collective("all-gather", "fsdp", (0, 2, 4, 6), (f"bf16{shape}",), 1, 1.0, name)
        for shape, name in (("[64, 128]", "weight"), ("[64, 64]", "tokens"))
    ]
    found = verdict._activation_gathers(gathers, {"parameters": {"kernel": kernel}, "frozen": {}})
    assert [entry["from"] for entry in found] == ["tokens"]


PROGRAM = """ENTRY %main (x: bf16[1024,512], w: bf16[512,2048]) -> bf16[1024,2048] {
  %x = bf16[1024,512]{1,0:T(8,128)(2,1)} parameter(0)
  %w = bf16[512,2048]{1,0:T(8,128)(2,1)} parameter(1)
  %fetched = (bf16[512,2048]{1,0:S(1)}, bf16[512,2048]{1,0}, u32[]{:S(2)}) copy-start(%w)
  %ready = bf16[512,2048]{1,0:S(1)} copy-done(%fetched)
  %y = bf16[1024,2048]{1,0:T(8,128)(2,1)} convolution(%x, %ready), dim_labels=bf_io->bf
  ROOT %z = bf16[1024,2048]{1,0:T(8,128)(2,1)} negate(%y)
}
"""


def test_roofline_by_hand():
    """One product limited by arithmetic, one negation limited by memory, a prefetch beside them, two transfers."""
    chip = CHIPS["v5e"]
    places = tuple((i // 8, (i % 4, i % 8 // 4)) for i in range(16))
    slices = Slices(chip, (4, 2), places)
    transfers = [
        Collective("all-gather", "fsdp", (0, 1, 2, 3), (), 3, 1e6, ""),
        Collective("all-reduce", "data", (0, 8), (), 1, 2e6, ""),
    ]
    times = roofline.estimate(Module(PROGRAM), transfers, slices)
    product = 2 * 1024 * 512 * 2048 / 197e12
    large, small, weight = 1024 * 2048 * 2 / 819e9, 1024 * 512 * 2 / 819e9, 512 * 2048 * 2 / 819e9
    assert times.compute == pytest.approx(product)
    assert times.hbm == pytest.approx(3 * large + small + weight)
    assert times.operations == pytest.approx(max(product, large + small) + 2 * large)
    assert times.interconnect == pytest.approx(3 * 1e6 / 50e9)  # a line of four has one link at its ends
    assert [place[3] for place in times.heaviest] == pytest.approx([max(product, large + small), 2 * large])
    assert times.dcn == pytest.approx(2e6 / 3.125e9)
    assert times.serial == pytest.approx(max(times.hbm, times.operations) + times.interconnect + times.dcn)


def test_links_of_a_group():
    chip = CHIPS["v5p"]
    devices = [(0, (x, y, z)) for x in range(2) for y in range(4) for z in range(8)]
    slices = Slices(chip, (2, 4, 8), tuple(devices))
    assert slices.bandwidth(range(8)) == 2 * chip.link_bandwidth  # a ring of eight
    assert slices.bandwidth(range(4)) == chip.link_bandwidth  # half of it: a line
    assert slices.bandwidth(range(32)) == 4 * chip.link_bandwidth
    assert slices.bandwidth(range(64)) == 5 * chip.link_bandwidth  # two in a row do not close
    assert slices.bandwidth((0, 4)) == 2 * chip.link_bandwidth / 4  # opposite in a ring, three other pairs between
    assert slices.bandwidth((0, 2)) == chip.link_bandwidth / 2  # a line, between which another one lies
    assert slices.bandwidth(range(0, 8, 2)) == 2 * chip.link_bandwidth / 2  # two groups of four round one ring
    twins = Slices(CHIPS["tpu7x"], (4,), tuple((0, (i // 2,)) for i in range(8)))
    assert twins.bandwidth((0, 1)) == math.inf
    assert twins.bandwidth(range(8)) == CHIPS["tpu7x"].link_bandwidth  # two links, shared by two devices


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("v9:4x4", "expected a generation and its chips, such as v5e:16x16; generations are v4, v5e"),
        ("v5e", "such as v5e:16x16"),
        ("v5e:3x5", "topology 'v5e:3x5': "),
    ],
)
def test_topologies_that_are_not_there(topology, message):
    with pytest.raises(ValueError, match=message):
        verdict.judge(small(), topology)


def test_by_default_the_source_with_the_largest_step_is_judged():
    config = runpy.run_path(str(CONFIGS / "sd3_medium.py"))["get_config"]
    runs = {stage: scaling.read_config(config(stage)) for stage in ("pretrain", "unify", "personalize")}
    largest = {stage: verdict.largest_source(run) for stage, run in runs.items()}
    assert largest == {"pretrain": "caption", "unify": "edit", "personalize": "compose"}


def test_what_does_not_fit_is_refused_before_any_compile():
    with pytest.raises(ValueError, match="strategy 'fsdp=64' takes 64 devices, but there are 16"):
        verdict.judge(small(strategy="fsdp=64"), "v5e:4x4")
    with pytest.raises(ValueError, match="no source 'edit'.* photos"):
        verdict.judge(small(), "v5e:4x4", source="edit")
    with pytest.raises(ValueError, match="no program 'dream'"):
        verdict.judge(small(), "v5e:4x4", program="dream")


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (
            "RESOURCE_EXHAUSTED: E1001: CompileTimeScopedVmemOom:\nRan out of memory in memory space vmem while "
            "allocating on stack for %splash_mha_fwd.1 = (f32[4,2304,128]{2,1,0}) custom-call(%a), attributes={\n"
            '"block_q": 2304\n}}. Scoped allocation with size 16.77M and limit 16.00M exceeded scoped vmem limit',
            "splash_mha_fwd.1 needs 16.77M of 16.00M of vector memory",
        ),
        (
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom:\nXLA:TPU compile permanent error. Ran out of memory in "
            "memory space hbm. Used 21.09G of 15.75G hbm. Exceeded hbm capacity by 5.34G.",
            "Used 21.09G of 15.75G hbm",
        ),
        ("RESOURCE_EXHAUSTED: something new\nat length", "RESOURCE_EXHAUSTED: something new"),
    ],
)
def test_what_is_too_much_is_said(message, said):
    assert verdict.out_of_memory(message).startswith(said)


def test_a_missing_compiler_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"libtpu.* not installed: pip install 'unialign_jax\[tpu\]'"):
        verdict.prepare("v5e:4x4")
