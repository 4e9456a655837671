"""Command: writes scenes as published JSONL rows and PNG files, see `corpus.write_corpus`.

python -m unialign_jax.data.scenes --target=DIR --count=N
"""

from absl import flags

from unialign_jax import cli, storage
from unialign_jax.data.samples import TASKS
from unialign_jax.data.scenes import SETS, usable_counts, write_corpus


def main() -> None:
    counts = [int(count) for count in _THINGS.value]
    for task in _TASKS.value:  # before anything is written
        usable_counts(task, _SUBSET.value, counts)
    write_corpus(
        storage.absolute(_TARGET.value),
        _COUNT.value,
        _SIZE.value,
        _SEED.value,
        subset=_SUBSET.value,
        counts=counts,
        chosen=_TASKS.value,
    )
    print(f"{_COUNT.value} scenes a task: {', '.join(f'{_TARGET.value}/{task}.jsonl' for task in _TASKS.value)}")


if __name__ == "__main__":
    _TARGET = flags.DEFINE_string("target", None, "Directory to write to.", required=True)
    _COUNT = flags.DEFINE_integer("count", 1000, "Number of examples of each task.", lower_bound=1)
    _SIZE = flags.DEFINE_integer("size", 32, "Side of the images in pixels.", lower_bound=8)
    _SEED = flags.DEFINE_integer("seed", 0, "Seed of the scenes.", lower_bound=0)
    _SUBSET = flags.DEFINE_enum("subset", "train", SETS, "What the scenes are for; all but train are held out.")
    _THINGS = flags.DEFINE_multi_enum("things", ["1", "2", "3", "4"], list("1234"), "Numbers of things to draw from.")
    _TASKS = flags.DEFINE_multi_enum("task", list(TASKS), TASKS, "Tasks to write; all by default.")
    cli.run(main)
