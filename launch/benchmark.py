"""Measures one part of the package on this machine.

    python launch/benchmark.py --suite=loop --json=loop.json

Prints the results as JSON; rows of longer suites also as they are measured, on standard error.

Suites:
"""

import json

from absl import flags

from unialign_jax import cli
from unialign_jax.benchmarks import suites

__doc__ += "\n".join(f"    {name}: {what}" for name, (_, what) in suites.SUITES.items())

_SUITE = flags.DEFINE_enum("suite", None, list(suites.SUITES), "What to measure.")
_JSON = flags.DEFINE_string("json", None, "File for the results, local or gs://; they are printed in any case.")
flags.mark_flags_as_required(["suite"])


def main() -> None:
    print(json.dumps(suites.run(_SUITE.value, _JSON.value), indent=2))


if __name__ == "__main__":
    cli.run(main)
