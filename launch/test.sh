#!/usr/bin/env bash
# Runs the tests on a fresh machine: makes .venv if there is none, installs the package with what the tests need, tests.
#   bash launch/test.sh [pytest arguments]
# PYTHON chooses the interpreter of a new .venv (3.11 or later).
set -euo pipefail
cd "$(dirname "$0")/.."

if [ ! -x .venv/bin/python ]; then
  "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "launch/test.sh: ${PYTHON:-python3} is older than Python 3.11; set PYTHON to a newer one" >&2
    exit 1
  }
  "${PYTHON:-python3}" -m venv .venv
fi
.venv/bin/python -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "launch/test.sh: .venv has no pip, or a Python older than 3.11; remove .venv, and set PYTHON to a newer one" >&2
  exit 1
}
.venv/bin/python -m pip install --quiet --disable-pip-version-check -e '.[test]'

export JAX_PLATFORMS=cpu
.venv/bin/ruff check .
.venv/bin/ruff format --check .
# Two processes: one file's tests stay together, so that what a module's fixtures compile is compiled once.
exec .venv/bin/python -m pytest -n "${TEST_WORKERS:-2}" --dist loadfile "$@"
