"""Makes a TFDS dataset in ArrayRecord files of any source. Interrupted, the same command goes on.

    python launch/build.py --source=rows.jsonl --target=DIR [--format=rows|conversations|tfds|webdataset] [--task=...]

It is then trained on with --config.data.sources.NAME.path=DIR --config.data.sources.NAME.format=tfds.
"""

from absl import flags

from unialign_jax import cli

_SOURCE = flags.DEFINE_string("source", None, "File or directory, or the name of a TFDS dataset.", required=True)
_TARGET = flags.DEFINE_string("target", None, "Directory of the dataset.", required=True)
_FORMAT = flags.DEFINE_enum(
    "format", "rows", ["rows", "conversations", "tfds", "webdataset"], "What the source is, see docs/data.md."
)
_TASK = flags.DEFINE_string("task", None, "What all rows are for; without it, each row tells.")
_SPLIT = flags.DEFINE_string("split", "train", "Of a TFDS dataset.")
_FIELDS = cli.define_pairs("fields", "Of a TFDS dataset: FIELD=FEATURE, ..., see docs/data.md.")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Where TFDS datasets given by name are kept.")
_NAME = flags.DEFINE_string("name", "samples", "What TFDS calls the dataset: lower case and underscores.")
_ROWS = flags.DEFINE_integer("rows_per_shard", 2000, "Rows that go into one file.", lower_bound=1)
_PROCESSES = flags.DEFINE_integer(
    "processes", None, "That work at it; by default one for each CPU that may be used.", lower_bound=1
)
_SHARE = flags.DEFINE_float("refused_share", 0.01, "Highest share of rows that may be unusable.", 0, 1)


def main() -> None:
    # Late: a wrong flag is said without loading TFDS.
    from unialign_jax import storage
    from unialign_jax.data.build import build
    from unialign_jax.data.sources import SourceConfig, open_source
    from unialign_jax.data.workers import usable_cpus

    config = SourceConfig(
        *(_SOURCE.value, _FORMAT.value, _TASK.value), split=_SPLIT.value, fields=_FIELDS(), data_dir=_DATA_DIR.value
    )
    source = open_source(config)
    target = storage.absolute(_TARGET.value)
    report = build(
        source,
        target,
        name=_NAME.value,
        rows_per_shard=_ROWS.value,
        processes=_PROCESSES.value or usable_cpus(),
        refused_share=_SHARE.value,
    )
    print(report)
    print(f"{report.read - report.refused.total()} samples in {target}")


if __name__ == "__main__":
    cli.run(main)
