"""Reading compiled programs: loops, matrix products and memory traffic against sums done by hand."""

import jax
import jax.numpy as jnp
import pytest

from unialign_jax.training.hlo import Module, kernels

# As TPU programs are written: products are convolutions, and S(1) is vector memory.
TPU_PROGRAM = """HloModule made_up, is_scheduled=true

%condition (state: (s32[], f32[8,128], bf16[6,256,512])) -> pred[] {
  %bound = s32[]{:T(128)} constant(13)
  %state.1 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}, bf16[6,256,512]{2,1,0}) parameter(0)
  %counter.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  ROOT %less = pred[]{:T(512)} compare(%counter.1, %bound), direction=LT
}

%sliced (stack: bf16[6,256,512], at: s32[], x: bf16[4,256]) -> bf16[4,512] {
  %stack = bf16[6,256,512]{2,1,0:T(8,128)(2,1)} parameter(0)
  %at = s32[]{:T(128)} parameter(1)
  %x = bf16[4,256]{1,0:T(8,128)(2,1)} parameter(2)
  %nought = s32[]{:T(128)} constant(0)
  %part = bf16[1,256,512]{2,1,0} dynamic-slice(%stack, %at, %nought, %nought), dynamic_slice_sizes={1,256,512}
  %weight = bf16[256,512]{1,0} bitcast(%part)
  ROOT %product = bf16[4,512]{1,0} convolution(%x, %weight), dim_labels=bf_io->bf
}

%body (state: (s32[], f32[8,128], bf16[6,256,512])) -> (s32[], f32[8,128], bf16[6,256,512]) {
  %state.2 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}, bf16[6,256,512]{2,1,0}) parameter(0)
  %counter.2 = s32[]{:T(128)} get-tuple-element(%state.2), index=0
  %values = f32[8,128]{1,0:T(8,128)} get-tuple-element(%state.2), index=1
  %weights = bf16[6,256,512]{2,1,0} get-tuple-element(%state.2), index=2
  %two = s32[]{:T(128)} constant(2)
  %inputs = bf16[4,256]{1,0:T(8,128)(2,1)S(1)} custom-call(), custom_call_target="AllocateBuffer"
  %fused = bf16[4,512]{1,0:T(8,128)(2,1)} fusion(%weights, %counter.2, %inputs), kind=kOutput, calls=%sliced
  %next = s32[]{:T(128)} add(%counter.2, %two)
  ROOT %out = (s32[]{:T(128)}, f32[8,128]{1,0}, bf16[6,256,512]{2,1,0}) tuple(%next, %values, %weights)
}

%beside (x: f32[8]) -> f32[8] {
  ROOT %x.1 = f32[8]{0} parameter(0)
}, execution_thread="sparsecore"

ENTRY %main (values: f32[8,128], weights: bf16[6,256,512]) -> f32[8,128] {
  %values.1 = f32[8,128]{1,0:T(8,128)} parameter(0)
  %weights.1 = bf16[6,256,512]{2,1,0:T(8,128)(2,1)} parameter(1)
  %start = s32[]{:T(128)} constant(1)
  %queries = bf16[2,3,64,640]{3,2,1,0:T(8,128)(2,1)} constant({...})
  %first = (s32[]{:T(128)}, f32[8,128]{1,0}, bf16[6,256,512]{2,1,0}) tuple(%start, %values.1, %weights.1)
  %loop = (s32[], f32[8,128]{1,0}, bf16[6,256,512]{2,1,0}) while(%first), condition=%condition, body=%body
  %splash_mha_fwd_residuals.7 = bf16[2,3,640,64]{3,2,1,0} custom-call(%queries, %queries, %queries), \
custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 640}"
}}, metadata={op_name="jit(step)/attention"}
  %left = bf16[5,7,16]{2,1,0} constant({...})
  %right = bf16[5,16,32]{2,1,0} constant({...})
  %batched = bf16[5,7,32]{2,1,0} convolution(%left, %right), window={size=5 pad=4_4 rhs_reversal=1}, \
dim_labels=0bf_0io->0bf
  ROOT %result = f32[8,128]{1,0:T(8,128)} get-tuple-element(%loop), index=1
}
"""


def steps_by_name(module):
    return {step.instruction.name: step for step in module.steps()}


def test_loops_count_as_often_as_they_turn():
    steps = steps_by_name(Module(TPU_PROGRAM))
    assert steps["fused"].times == 6  # 1, 3, ... 11
    assert steps["splash_mha_fwd_residuals.7"].times == 1


def test_a_slice_counts_and_not_the_stack_and_vector_memory_is_free():
    module = Module(TPU_PROGRAM)
    fused = steps_by_name(module)["fused"]
    assert module.flops(fused) == 2 * 4 * 256 * 512
    assert module.traffic(fused) == 256 * 512 * 2 + 4 + 4 * 512 * 2  # weight, counter, result; inputs are in S(1)


STACKED = """%retile (old: bf16[6,256,512]) -> bf16[6,256,512] {
  %old = bf16[6,256,512]{2,1,0:T(16,128)(2,1)} parameter(0)
  ROOT %copied = bf16[6,256,512]{2,1,0:T(8,128)(2,1)} copy(%old)
}

%write (stack: bf16[6,256,512], x: bf16[256,512], at: s32[]) -> (bf16[6,256,512], bf16[256,512]) {
  %stack = bf16[6,256,512]{2,1,0:T(16,128)(2,1)} parameter(0)
  %tiled = bf16[6,256,512]{2,1,0:T(8,128)(2,1)} fusion(%stack), kind=kLoop, calls=%retile
  %x = bf16[256,512]{1,0} parameter(1)
  %negated = bf16[256,512]{1,0} negate(%x)
  %layer = bf16[1,256,512]{2,1,0} bitcast(%negated)
  %at = s32[] parameter(2)
  %nought = s32[] constant(0)
  %written = bf16[6,256,512]{2,1,0} dynamic-update-slice(%tiled, %layer, %at, %nought, %nought)
  %back = bf16[6,256,512]{2,1,0:T(16,128)(2,1)} copy(%written)
  ROOT %both = (bf16[6,256,512]{2,1,0}, bf16[256,512]{1,0}) tuple(%back, %negated)
}

ENTRY %main (all: bf16[6,256,512], x: bf16[256,512], at: s32[]) -> (bf16[6,256,512], bf16[256,512]) {
  %all = bf16[6,256,512]{2,1,0:T(16,128)(2,1)} parameter(0)
  %x.1 = bf16[256,512]{1,0} parameter(1)
  %at.1 = s32[] parameter(2)
  ROOT %made = (bf16[6,256,512]{2,1,0}, bf16[256,512]{1,0}) fusion(%all, %x.1, %at.1), kind=kLoop, calls=%write
}
"""


def test_a_layer_written_in_place_counts_and_not_the_stack_though_tiles_are_rearranged_on_the_way():
    module = Module(STACKED)
    (made,) = module.steps()
    assert module.traffic(made) == 3 * 256 * 512 * 2 + 4  # x, its negative, and that in the stack; the counter


def test_kernels_are_found_and_their_products_filled_up_to_the_matrix_unit():
    module = Module(TPU_PROGRAM)
    assert kernels(module) == {"splash_mha_fwd_residuals": 1}
    kernel = steps_by_name(module)["splash_mha_fwd_residuals.7"]
    assert module.flops(kernel) == 2 * 2 * 2 * 3 * 640 * 640 * 64
    assert module.flops(kernel, unit=256) == 4 * module.flops(kernel)
    one_sample = Module(TPU_PROGRAM.replace("bf16[2,3,64,640]{3,2,1,0", "bf16[3,64,640]{2,1,0"))
    assert one_sample.flops(steps_by_name(one_sample)["splash_mha_fwd_residuals.7"]) == module.flops(kernel) // 2
    assert kernel.instruction.op_name == "jit(step)/attention"


def test_batch_axes_written_as_padded_windows_count_their_diagonal():
    module = Module(TPU_PROGRAM)
    pairs = sum(0 <= position + tap - 4 < 5 for position in range(5) for tap in range(5))
    assert module.flops(steps_by_name(module)["batched"]) == 2 * 7 * 32 * 16 * pairs


@pytest.mark.parametrize("turns", [1, 7])
def test_counts_of_a_compiled_scan(turns):
    def run(x, weights):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    shapes = jax.ShapeDtypeStruct((24, 48), jnp.float32), jax.ShapeDtypeStruct((turns, 48, 48), jnp.float32)
    module = Module(jax.jit(run).lower(*shapes).compile().as_text())
    assert sum(module.flops(step) * step.times for step in module.steps()) == turns * 2 * 24 * 48 * 48


def test_what_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        Module("hello")
