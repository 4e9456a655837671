"""The compiler and runtime flags for each accelerator, in one place, each with the page that documents it.

The flags are environment variables that must be set before the accelerator's library loads. Shell scripts write

    eval "$(python -m unialign_jax.accelerator_flags v6e)"

and then start the program. Flags that a user has set already stay, and win. Anything that is the compiler's default
today is left out. A verdict of the ahead-of-time compiler is about the program that runs only if it was made with the
same flags.
"""

import dataclasses
import shlex
import sys

_OPENXLA = "https://openxla.org/xla/flags_guidance"
_MAXTEXT = "https://github.com/AI-Hypercomputer/maxtext/blob/main/"
_JAX_GPU = "https://docs.jax.dev/en/latest/gpu_performance_tips.html"
_NVIDIA = "https://docs.nvidia.com/jax-toolbox/performance-profiling/gpu-performance"

GENERATIONS = ("v4", "v5e", "v5p", "v6e", "tpu7x", "h100")
_TPUS = ("v4", "v5e", "v5p", "v6e", "tpu7x")


@dataclasses.dataclass(frozen=True)
class Flag:
    """One setting: `text` is added to the environment variable `variable` on these generations."""

    variable: str
    text: str
    generations: tuple[str, ...]
    why: str
    source: str
    several_slices_only: bool = False


FLAGS = (
    # All-gathers are asynchronous by default. Fusing them with computation ("continuation fusion") is too on v5e; the
    # compiler refuses it on every other generation, though published scripts still ask for it there.
    Flag(
        "LIBTPU_INIT_ARGS",
        "--xla_tpu_enable_async_collective_fusion_fuse_all_reduce=true",
        ("v5e",),
        "all-reduces run beside computation, as all-gathers do",
        _OPENXLA,
    ),
    Flag(
        "LIBTPU_INIT_ARGS",
        "--xla_tpu_megacore_fusion_allow_ags=false",
        ("v5p",),
        "all-gathers stay apart from matrix products, so that they can overlap with others",
        _MAXTEXT + "src/maxtext/configs/tpu/v5p/llama2_70b.sh",
    ),
    # Published scripts give 96 MiB, for the large tiles of wide models. This one is narrow; its attention kernel needs
    # 12.7 MiB.
    Flag(
        "LIBTPU_INIT_ARGS",
        "--xla_tpu_scoped_vmem_limit_kib=13312",
        ("v6e", "tpu7x"),
        "single operations get 13 MiB of vector memory; the rest holds activations, which then need no main memory",
        _MAXTEXT + "docs/guides/optimization/benchmark_and_performance.md",
    ),
    Flag(
        "LIBTPU_INIT_ARGS",
        "--xla_tpu_enable_data_parallel_all_reduce_opt=true",
        _TPUS,
        "the gradients' all-reduce over the data-centre network overlaps with the backward pass",
        _OPENXLA,
        several_slices_only=True,
    ),
    Flag(
        "LIBTPU_INIT_ARGS",
        "--xla_tpu_data_parallel_opt_different_sized_ops=true",
        _TPUS,
        "the same for gradients that differ in size; takes some more memory",
        _OPENXLA,
        several_slices_only=True,
    ),
    Flag(
        "XLA_FLAGS",
        "--xla_gpu_enable_latency_hiding_scheduler=true",
        ("h100",),
        "communication is moved to where it overlaps with computation",
        _JAX_GPU,
    ),
    # One layer's weights at least: a joint block of SD3-medium has 36 x 1536^2 = 85 M of them, 340 MB in float32.
    *(
        Flag(
            "XLA_FLAGS",
            f"--xla_gpu_{collective}_combine_threshold_bytes=536870912",
            ("h100",),
            "a layer's weights travel as one large message",
            _JAX_GPU,
        )
        for collective in ("all_gather", "reduce_scatter", "all_reduce")
    ),
    *(
        Flag(
            "XLA_FLAGS",
            f"--xla_gpu_enable_pipelined_{collective}=true",
            ("h100",),
            "in the loop over layers, one layer's weights travel while the one before computes",
            _OPENXLA,
        )
        for collective in ("all_gather", "reduce_scatter", "all_reduce")
    ),
    Flag(
        "XLA_PYTHON_CLIENT_MEM_FRACTION",
        "0.9",
        ("h100",),
        "a tenth of the memory is left to CUDA's libraries; JAX's default leaves a quarter",
        _NVIDIA,
    ),
)


def environment(generation: str, slices: int = 1) -> dict[str, str]:
    """The environment variables for training on a generation of accelerators.

    Args:
      generation: one of `GENERATIONS`.
      slices: how many TPU slices train together.

    Raises:
      ValueError: no such generation, or no slices.
    """
    if generation not in GENERATIONS:
        raise ValueError(f"no accelerator generation {generation!r}; there are {', '.join(GENERATIONS)}")
    if slices < 1:
        raise ValueError(f"{slices} slices; expected 1 or more")
    variables: dict[str, str] = {}
    for flag in FLAGS:
        if generation in flag.generations and (slices > 1 or not flag.several_slices_only):
            variables[flag.variable] = f"{variables.get(flag.variable, '')} {flag.text}".strip()
    return variables


def exports(variables: dict[str, str]) -> str:
    """Lines for a shell to evaluate. Flags already in the environment are put last, where they win."""
    lines = []
    for name, value in variables.items():
        if value.startswith("--"):
            lines.append(f'export {name}={shlex.quote(value)}"${{{name}:+ ${name}}}"')
        else:
            lines.append(f'export {name}="${{{name}:-{value}}}"')
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """`GENERATION [SLICES]`: prints what a shell is to evaluate; 2 with a line on standard error otherwise."""
    try:
        generation, slices = (*arguments, "1")[:2] if len(arguments) in (1, 2) else ("", "")
        if not slices.isdigit():
            raise ValueError(
                "usage: python -m unialign_jax.accelerator_flags GENERATION [SLICES], of " + ", ".join(GENERATIONS)
            )
        print(exports(environment(generation, int(slices))))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
