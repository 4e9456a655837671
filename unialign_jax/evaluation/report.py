"""A run and its scores as one HTML page that needs no other file, and the same figures as JSON.

OUTPUT/report.html    the losses' curves, score tables, inputs and outputs of every task
OUTPUT/metrics.json   first and last value of every loss, which of its five terms at least halved, every score
"""

import base64
import html
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from etils import epath
from PIL import Image

from unialign_jax.evaluation.evaluate import SHOWN
from unialign_jax.training.writers import read_scalars

Curve = list[tuple[int, float]]
_TERMS = ("image", "text", "contrastive", "image_align", "text_align")
_LAST = 0.1  # share of a curve's points whose mean is its last value: single points are noisy
_HALF = 0.5  # what the quickstart promises of every term of the loss, at most, and of captions of one thing, at least
_ZOOM = 3
_STYLE = """body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:62em;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:1em 0}td,th{padding:.2em .8em;border-bottom:1px solid #ddd;text-align:left}
img{image-rendering:pixelated}figure{display:inline-block;margin:.5em 1em .5em 0;vertical-align:top}
figcaption{font-size:13px;color:#555}polyline{fill:none;stroke:#1663a6;stroke-width:1.5}
line{stroke:#ccc;stroke-dasharray:3}text{font-size:10px;fill:#777}.good{color:#167a32}.bad{color:#a61b1b}"""


def curves(workdir: epath.PathLike, stages: Sequence[str]) -> tuple[dict[str, Curve], list[int]]:
    """The losses of a recipe's stages, one after another as if they were one run.

    Args:
      workdir: the run's.
      stages: names, in order; those not begun yet are left out.

    Returns:
      `(step, value)` of every term over all sources and, where a stage has several, of each one's, `source/term`; and
      the steps at which stages end.
    """
    joined: dict[str, Curve] = {}
    ends: list[int] = []
    for stage in stages:
        scalars = read_scalars(epath.Path(workdir) / stage)
        begin, end = ends[-1] if ends else 0, 0
        for tag, points in scalars.items():
            if tag.split("/")[-1] in _TERMS:
                joined.setdefault(tag, []).extend((begin + step, value) for step, value in points)
                end = max(end, points[-1][0])
        if end:
            ends.append(begin + end)
    return dict(sorted(joined.items(), key=lambda item: ("/" in item[0], item[0]))), ends


def changes(losses: Mapping[str, Curve]) -> dict[str, dict[str, float]]:
    """`first` and `last` value of each curve and their `ratio` (1 from 0); the last is the mean of its last tenth."""
    found = {}
    for tag, points in losses.items():
        tail = [value for _, value in points[-max(1, round(_LAST * len(points))) :]]
        first, last = points[0][1], sum(tail) / len(tail)
        found[tag] = {"first": first, "last": last, "ratio": last / first if first else 1.0}
    return found


def write(
    output: epath.PathLike,
    *,
    title: str,
    workdir: epath.PathLike,
    stages: Sequence[str],
    evaluations: Mapping[str, epath.PathLike],
) -> dict[str, Any]:
    """Writes the page and the figures.

    Args:
      output: directory, made if absent.
      title: of the page.
      workdir, stages: the run, see `curves`.
      evaluations: directories that `evaluate.evaluate_scenes` has written, by what the page shall call their model.

    Returns:
      What metrics.json holds.

    Raises:
      FileNotFoundError: the run has none of these stages, or one of the directories is not whole.
    """
    if not any((epath.Path(workdir) / stage).is_dir() for stage in stages):
        raise FileNotFoundError(f"{workdir}: expected a run, with any of {', '.join(stages)} in it")
    losses, ends = curves(workdir, stages)
    scores = {}
    for label, directory in evaluations.items():
        for name in ("scores.json", "outputs.jsonl"):
            file = epath.Path(directory) / name
            if not file.exists():
                raise FileNotFoundError(f"{file}: not found; write it with launch/evaluate.py --output={directory}")
        scores[label] = json.loads((epath.Path(directory) / "scores.json").read_text())
        if "tables" not in scores[label]:
            raise ValueError(f"{directory}/scores.json: expected what launch/evaluate.py writes, found no 'tables'")
    found = changes(losses)
    metrics = {
        "losses": found,
        "halved": {term: found[term]["ratio"] <= _HALF for term in _TERMS if term in found},
        "scores": {label: facts["tables"] for label, facts in scores.items()},
    }
    body = [f"<h1>{html.escape(title)}</h1>", *_losses(losses, ends, found), *_tables(scores)]
    for label, directory in evaluations.items():
        body += [f"<h2>What it makes: {html.escape(label)}</h2>", *_pictures(epath.Path(directory))]
    output = epath.Path(output)
    output.mkdir(parents=True, exist_ok=True)
    page = f'<!doctype html><meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
    (output / "report.html").write_text(page + "\n".join(body) + "\n")
    (output / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    return metrics


def check(metrics: Mapping[str, Any], label: str) -> None:
    """Refuses a run that has not kept what the quickstart promises.

    Args:
      metrics: what `write` returns.
      label: the evaluation of the run's model, on scenes of one thing.

    Raises:
      ValueError: one of the five terms of the loss did not at least halve, or less than half of the captions are exact.
    """
    broken = []
    for term in _TERMS:
        if term not in metrics["halved"]:
            broken.append(f"the loss {term} is not there")
        elif not metrics["halved"][term]:
            ratio = metrics["losses"][term]["ratio"]
            broken.append(f"the loss {term} ended at {ratio:.0%} of its first value, expected {_HALF:.0%} or less")
    rows = metrics["scores"][label].get("test, 1 things", ())
    shares = [row["estimate"]["value"] for row in rows if (row["task"], row["kind"]) == ("caption", "")]
    if not shares:
        broken.append("no captions of one thing were scored (launch/evaluate.py --things=1)")
    elif shares[0] < _HALF:
        broken.append(f"{shares[0]:.1%} of the captions of one thing are exact, expected {_HALF:.0%} or more")
    if broken:
        raise ValueError(
            f"{label}: the run did not keep what the quickstart promises: {'; '.join(broken)}. "
            "More steps help: QUICK_STEPS in configs/scenes_tiny.py"
        )


def _losses(losses: Mapping[str, Curve], ends: Sequence[int], found: Mapping[str, Any]) -> Iterable[str]:
    yield "<h2>Losses of the run just made</h2>"
    if not losses:
        yield "<p>None were written.</p>"
        return
    yield (
        f"<p>{ends[-1]} steps; dashed lines are the ends of stages. First the terms over all data, then those of each "
        "source, from the stage on that has it. Below each: first value → last value.</p>"
    )
    for tag, points in losses.items():
        change = found[tag]
        kind = "good" if change["ratio"] <= _HALF else "bad"
        fell = f"{change['first']:.3g} → {change['last']:.3g} <span class={kind}>({change['ratio']:.0%})</span>"
        yield f"<figure>{_plot(points, ends)}<figcaption>{html.escape(tag)}: {fell}</figcaption></figure>"


def _plot(points: Curve, ends: Sequence[int], width: int = 220, height: int = 90) -> str:
    top = max(value for _, value in points) or 1.0

    def x(step: int) -> float:
        return round(width * step / ends[-1], 1)

    line = " ".join(f"{x(step)},{round(height * (1 - value / top), 1)}" for step, value in points)
    marks = "".join(f'<line x1="{x(end)}" x2="{x(end)}" y1="0" y2="{height}"/>' for end in ends[:-1])
    return (
        f'<svg width="{width}" height="{height}" viewBox="0 -2 {width} {height + 4}">{marks}'
        f'<polyline points="{line}"/><text x="2" y="9">{top:.3g}</text></svg>'
    )


def _tables(scores: Mapping[str, Any]) -> Iterable[str]:
    """A table for each set of scenes, a column for each model."""
    yield "<h2>Scores on held-out scenes</h2><p>With 95 % intervals; every output is checked exactly.</p>"
    for name in dict.fromkeys(name for facts in scores.values() for name in facts["tables"]):
        lines: dict[tuple[str, str], dict[str, str]] = {}
        for label, facts in scores.items():
            for score in facts["tables"].get(name, ()):
                if not score["kind"]:
                    value, low, high, samples = (score["estimate"][k] for k in ("value", "low", "high", "samples"))
                    lines.setdefault((score["task"], score["measure"]), {})[label] = (
                        f"<b>{value:.1%}</b> ({low:.1%} to {high:.1%}, n = {samples})"
                    )
        yield f"<h3>{html.escape(name)}</h3><table><tr><th>task<th>measure"
        yield "".join(f"<th>{html.escape(label)}" for label in scores) + "</tr>"
        for (task, measure), values in lines.items():
            yield f"<tr><td>{task}<td>{measure}" + "".join(f"<td>{values.get(label, '')}" for label in scores) + "</tr>"
        yield "</table>"


def _pictures(directory: epath.Path) -> Iterable[str]:
    """The first examples of every task: what was asked, made and true, in pictures and in words."""
    rows = [json.loads(line) for line in (directory / "outputs.jsonl").read_text().splitlines()]
    for table in dict.fromkeys(row["table"] for row in rows):
        folder = directory / table.replace(", ", "-").removesuffix(" things")
        for task in dict.fromkeys(row["task"] for row in rows if row["table"] == table):
            shown = [row for row in rows if (row["table"], row["task"]) == (table, task)][:SHOWN]
            with Image.open(io.BytesIO((folder / f"{task}.png").read_bytes())) as file:
                picture = file.convert("RGB")
            height = (picture.height + 1) // len(shown)  # of a row, and the line below it
            tops = range(0, picture.height, height)
            images = [_image(picture.crop((0, top, picture.width, top + height - 1))) for top in tops]
            texts = "made" in shown[0]
            drawn = "made | truth" if task == "generate" else "inputs | made | truth"
            yield f"<h3>{task}, {html.escape(table)}</h3><table><tr><th>{'image' if texts else drawn}<th>asked"
            yield "<th>made<th>truth</tr>" if texts else "<th>score</tr>"
            for image, row in zip(images, shown, strict=True):
                yield f"<tr><td>{image}<td>{html.escape(row['asked'])}"
                if texts:
                    kind = "good" if all(row["scores"].values()) else "bad"
                    yield f'<td class="{kind}">{html.escape(row["made"])}<td>{html.escape(row["truth"])}</tr>'
                else:
                    scores = ", ".join(f"{measure} {score:.2g}" for measure, score in row["scores"].items())
                    yield f"<td>{scores}</tr>"
            yield "</table>"


def _image(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img width="{_ZOOM * picture.width}" src="data:image/png;base64,{data}">'
