"""Says, without a TPU, whether a config fits a TPU topology and how fast it can be there. Needs the extra `tpu`.

    python launch/compile.py --config=configs/sd3_medium.py --topology=v5e:16x16 --json=verdict.json \\
        --config.data.global_batch=2048

The global batch is over all chips. --program=sample judges the image sampler instead of the train step. docs/scaling.md
holds the verdicts of the published size, and says how to read them; this makes it, from the JSON files that are
already beside it and by compiling those that are not (minutes each):

    python launch/compile.py --table=docs/scaling.md
"""

from absl import flags
from ml_collections import config_flags

from unialign_jax import cli

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, and after a colon the stage.", lock_config=True)
_TOPOLOGY = flags.DEFINE_string("topology", None, "Generation and chips of one slice, such as v5e:16x16.")
_SLICES = flags.DEFINE_integer("slices", 1, "Slices that train together.", lower_bound=1)
_PROGRAM = flags.DEFINE_enum("program", "train", ["train", "sample"], "Which program to compile.")
_SOURCE = flags.DEFINE_string(
    "source", None, "Name of the data source whose batches enter; by default that with the most reference images."
)
_JSON = flags.DEFINE_string("json", None, "File for the verdict.")
_HLO = flags.DEFINE_string("hlo", None, "File for the compiled program's text, to see why the verdict is what it is.")
_TABLE = flags.DEFINE_string("table", None, "Makes the table of docs/scaling.md in this file; needs no other option.")


def main() -> None:
    # Late: a wrong flag is said without loading JAX.
    from unialign_jax.training import scaling, verdict

    if _TABLE.value is not None:
        scaling.make_table(_TABLE.value)
        return
    for name, given in (("--config", _CONFIG.value), ("--topology", _TOPOLOGY.value)):
        if given is None:
            raise ValueError(f"{name} is missing; or give --table alone")
    verdict.prepare(_TOPOLOGY.value, _SLICES.value)
    found = verdict.judge(
        scaling.read_config(_CONFIG.value),
        _TOPOLOGY.value,
        slices=_SLICES.value,
        program=_PROGRAM.value,
        source=_SOURCE.value,
        hlo_file=_HLO.value,
    )
    if _JSON.value is not None:
        scaling.write(found, _JSON.value)
    print(scaling.summary(found))


if __name__ == "__main__":
    cli.run(main)
