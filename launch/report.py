r"""Puts a recipe's run and scores of its models on one HTML page.

    python launch/report.py --workdir=runs/scenes --stages=pretrain,unify,personalize \
        --scores="this run=runs/scores" --output=runs/report

Writes OUTPUT/report.html and OUTPUT/metrics.json.
"""

from absl import flags

from unialign_jax import cli

_WORKDIR = flags.DEFINE_string("workdir", None, "Working directory of the run: a sub-directory for each stage.")
_STAGES = flags.DEFINE_list("stages", ["pretrain", "unify", "personalize"], "The run's stages, in order.")
_SCORES = flags.DEFINE_multi_string(
    "scores", [], "LABEL=DIR: what launch/evaluate.py has written, and what to call its model; may be repeated."
)
_TITLE = flags.DEFINE_string("title", "Training on scenes", "Title of the page.")
_CHECK = flags.DEFINE_string(
    "check", None, "Label of one of --scores: end with an error if the run has not kept what the quickstart promises."
)
_OUTPUT = flags.DEFINE_string("output", None, "Directory for the page; created if absent.")
flags.mark_flags_as_required(["workdir", "output"])


def main() -> None:
    evaluations = {}
    for text in _SCORES.value:
        label, found, directory = text.partition("=")
        if not (label and found and directory):
            raise ValueError(f"--scores={text}: expected LABEL=DIR")
        if label in evaluations:
            raise ValueError(f"--scores={text}: a second {label!r}; give each directory a label of its own")
        evaluations[label] = directory
    if _CHECK.value is not None and _CHECK.value not in evaluations:
        raise ValueError(f"--check={_CHECK.value}: expected the label of one of --scores")
    from unialign_jax import storage
    from unialign_jax.evaluation import report

    output = storage.absolute(_OUTPUT.value)
    metrics = report.write(
        output,
        title=_TITLE.value,
        workdir=storage.absolute(_WORKDIR.value),
        stages=_STAGES.value,
        evaluations={label: storage.absolute(directory) for label, directory in evaluations.items()},
    )
    for name, change in metrics["losses"].items():
        print(f"{name}: {change['first']:.4g} -> {change['last']:.4g} ({change['ratio']:.0%})")
    for halved, what in ((True, "at least halved"), (False, "not halved")):
        if terms := [term for term, found in metrics["halved"].items() if found == halved]:
            print(f"{what}: {', '.join(terms)}")
    print(f"{output}/report.html, {output}/metrics.json")
    if _CHECK.value is not None:
        report.check(metrics, _CHECK.value)


if __name__ == "__main__":
    cli.run(main)
