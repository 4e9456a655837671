"""Verdicts written down: as JSON, as a line, and as the table of `docs/scaling.md`, which one command makes."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterable
from typing import Any

import ml_collections
from etils import epath

from unialign_jax import storage
from unialign_jax.training import run_config

CONFIG = "configs/sd3_medium.py"
# Encoders cached: what the published size is meant to train with.
CACHED = '("latents", "instructions", "teacher")'
MARKER = "<!-- Everything below is made by launch/compile.py --table -->"


@dataclasses.dataclass(frozen=True)
class Case:
    """One line of the table: a program on a topology, with the batch per chip that suits it."""

    topology: str
    chips: int
    batch: int
    remat: str = "dots+attention"
    slices: int = 1
    program: str = "train"
    stage: str = "unify"
    source: str = "generate"
    side: int = 512
    strategy: str = "data+fsdp=64"

    @property
    def name(self) -> str:
        """Of its JSON file: everything that the verdict depends on."""
        parts = (
            *(self.program, self.stage, self.source, self.side, self.topology.replace(":", "-")),
            *(f"x{self.slices}", self.strategy.replace("=", ""), self.remat, f"b{self.batch}"),
        )
        return "_".join(str(part) for part in parts)

    def command(self, file: epath.Path) -> list[str]:
        """The command that judges it."""
        return [
            *(sys.executable, "launch/compile.py", f"--config={CONFIG}:{self.stage}", f"--topology={self.topology}"),
            *(f"--slices={self.slices}", f"--program={self.program}", f"--source={self.source}", f"--json={file}"),
            f"--config.data.global_batch={self.batch * self.chips * self.slices}",
            *(f"--config.data.height={self.side}", f"--config.data.width={self.side}"),
            *(f"--config.strategy={self.strategy}", f"--config.remat={self.remat}", f"--config.cached={CACHED}"),
        ]


# (topology, its chips, slices)
TOPOLOGIES = (
    ("v5e:16x16", 256, 1),
    ("v5p:4x4x8", 128, 1),
    ("v6e:16x16", 256, 1),
    ("tpu7x:4x4x4", 64, 1),
    ("v5e:16x16", 256, 2),
)


def _cases(*batches: int, **kind: Any) -> tuple[Case, ...]:
    """One case for each of `TOPOLOGIES`, with its batch per chip."""
    return tuple(
        Case(topology, chips, batch, slices=slices, **kind)
        for (topology, chips, slices), batch in zip(TOPOLOGIES, batches, strict=True)
    )


CASES = (
    *_cases(4, 8, 4, 8, 4),
    # The same work per chip, split alike, on 256 chips and on 16.
    Case("v5e:16x16", 256, 4, strategy="data+fsdp=16"),
    Case("v5e:4x4", 16, 4, strategy="data+fsdp=16"),
    *_cases(3, 8, 3, 6, 3, source="edit"),
    *_cases(2, 4, 2, 4, 2, stage="personalize", source="compose"),
    *_cases(1, 2, 1, 2, 1, side=1024),
    # A sampler recomputes nothing: the policy is in its file's name alone.
    *_cases(8, 16, 8, 32, 8, program="sample"),
)


def read_config(config: ml_collections.ConfigDict) -> run_config.RunConfig:
    """A config whose data need not be there: paths that are not set stay so.

    Raises:
      ValueError: it has several stages.
    """
    if "stages" in config:
        raise ValueError(f"name one stage, as in --config=FILE.py:{next(iter(config.stages))}; a program is of one")
    for source in config.data.sources.values():
        if source.path is None:
            source.path = "(not read)"
    return run_config.read(config)


def write(verdict: dict[str, Any], path: epath.PathLike) -> None:
    """Writes a verdict as JSON; directories are made."""
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    storage.write_whole(path, (json.dumps(verdict, indent=1) + "\n").encode())


def summary(verdict: dict[str, Any]) -> str:
    """A verdict in a few lines."""
    where = f"{verdict['topology']}" + (f" x {verdict['slices']} slices" if verdict["slices"] > 1 else "")
    head = (
        f"{verdict['program']} of {verdict['stage']}/{verdict['source']} on {where}, {verdict['strategy']}, "
        f"{verdict['batch_per_chip']:g} samples per chip: "
    )
    if "hbm_gib" not in verdict:
        return head + f"does not fit: {verdict['compiler']}"
    memory = verdict["hbm_gib"]
    lines = [head + ("fits" if verdict["fits"] else "does not fit")]
    lines.append("memory, GiB per device: " + ", ".join(f"{name} {value:.2f}" for name, value in memory.items()))
    lines.append(f"attention kernel: {verdict['attention']}")
    for entry in verdict["collectives"]:
        lines.append(
            f"{entry['kind']} over {entry['axes']} ({entry['network']}): {entry['count']} per step, "
            f"{entry['bytes'] / 1e9:.3f} GB received per device"
        )
    for entry in verdict["activation_gathers"][:5]:
        lines.append(f"gathers {entry['bytes'] / 1e6:.2f} MB that are no parameters: {entry['from']}")
    times = verdict["roofline"]
    lines.append(
        f"ms per step: compute {times['compute'] * 1e3:.1f}, memory {times['hbm'] * 1e3:.1f}, one after the other "
        f"{times['device'] * 1e3:.1f}, interconnect {times['interconnect'] * 1e3:.1f}, between slices "
        f"{times['dcn'] * 1e3:.1f}"
    )
    work = verdict["flops"]
    lines.append(
        f"TFLOP per step and chip: model {work['model'] / verdict['chips'] / 1e12:.2f}, "
        f"frozen {work['frozen'] / verdict['chips'] / 1e12:.2f}, "
        f"recomputed {work['recomputed'] / verdict['chips'] / 1e12:.2f}, "
        f"in the program {work['program'] / verdict['chips'] / 1e12:.2f}"
    )
    for name in ("overlapped", "serial"):
        rates = verdict[name]
        lines.append(
            f"{name}: {rates['step_s'] * 1e3:.1f} ms, {rates['images_per_s_per_chip']:.2f} images/s/chip, "
            f"MFU {rates['mfu']:.1%}, of the transformer alone {rates['mfu_transformer']:.1%}"
        )
    return "\n".join(lines)


def make_table(path: epath.PathLike) -> None:
    """Renews the table in a Markdown file, judging the cases whose JSON is not beside it (`scaling/`) yet.

    One process for each, since libtpu takes its flags once. The table is written before the first and after each, with
    the cases that are judged by then, so that an interrupted run leaves one, and the next goes on.

    Raises:
      ValueError: cases that could not be judged, after all others; or the file has no marker that says where the table
        begins.
    """
    path = epath.Path(path)
    files = {case: path.parent / path.stem / f"{case.name}.json" for case in CASES}
    _write_table(path, files.values())
    failed = []
    for case, file in files.items():
        if file.exists():
            continue
        print(f"compiling {case.name}", flush=True)
        done = subprocess.run(case.command(file), check=False, capture_output=True, text=True)
        if done.returncode:
            failed.append(f"{case.name}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
        _write_table(path, files.values())
    if failed:
        raise ValueError("; ".join(failed))


def _write_table(path: epath.Path, files: Iterable[epath.Path]) -> None:
    text = path.read_text()
    if MARKER not in text:
        raise ValueError(f"{path}: expected the line {MARKER!r}, below which the table goes")
    rows = [_row(json.loads(file.read_text())) for file in files if file.exists()]
    table = "\n".join([_HEAD, *rows])
    storage.write_whole(path, f"{text[: text.index(MARKER)]}{MARKER}\n\n{table}\n".encode())


_COLUMNS = (
    *("program", "image", "topology", "strategy", "recomputed", "batch per chip", "fits", "GiB per device: total"),
    *("of parameters", "optimizer", "EMA", "frozen", "temporaries", "kernel", "collectives, GB per step and device"),
    *("ms: compute", "HBM", "interconnect", "DCN", "step ms", "images/s/chip", "MFU", "of the transformer"),
)
_HEAD = "| " + " | ".join(_COLUMNS) + " |\n|" + " --- |" * len(_COLUMNS)


def _row(verdict: dict[str, Any]) -> str:
    where = f"{verdict['slices']} x " * (verdict["slices"] > 1) + verdict["topology"]
    cells = [
        *(f"{verdict['program']} {verdict['source']}", verdict["image"][0], where, verdict["strategy"]),
        *(verdict["remat"] if verdict["program"] == "train" else "-", f"{verdict['batch_per_chip']:g}"),
        "yes" if verdict["fits"] else "no",
    ]
    if "hbm_gib" not in verdict:
        return "| " + " | ".join(map(str, cells)) + f" | {verdict['compiler']} |" + " |" * (len(_COLUMNS) - 8)
    memory, times = verdict["hbm_gib"], verdict["roofline"]
    parts = ("total", "parameters", "optimizer", "ema", "frozen", "temporaries")
    cells += [f"{memory[part]:.2f}" if part in memory else "-" for part in parts]
    cells.append(verdict["attention"])
    cells.append(
        ", ".join(
            f"{entry['count']} {entry['kind']} over {entry['axes']} {entry['bytes'] / 1e9:.2f}"
            + " (DCN)" * (entry["network"] == "dcn")
            for entry in verdict["collectives"]
            if entry["bytes"] >= 5e6
        )
    )
    cells += [f"{times[name] * 1e3:.0f}" for name in ("compute", "hbm", "interconnect", "dcn")]
    pairs = [(verdict["overlapped"], verdict["serial"])]
    cells += [f"{a['step_s'] * 1e3:.0f} / {b['step_s'] * 1e3:.0f}" for a, b in pairs]
    cells += [f"{a['images_per_s_per_chip']:.1f} / {b['images_per_s_per_chip']:.1f}" for a, b in pairs]
    cells += [f"{a[name]:.1%} / {b[name]:.1%}" for name in ("mfu", "mfu_transformer") for a, b in pairs]
    return "| " + " | ".join(map(str, cells)) + " |"
