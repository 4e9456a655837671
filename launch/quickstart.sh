#!/usr/bin/env bash
# From nothing to all six tasks on a machine with two cores and no accelerator, in under 20 minutes: installs, draws
# scenes, trains the three stages of a small recipe, scores the result and the checkpoint that comes with the package on
# held-out scenes, converts to PyTorch, and writes a page about all of it. It ends with an error if one of the five terms
# of the loss did not at least halve, or less than half of the new model's captions of one thing are exact.
#   bash launch/quickstart.sh
# Everything is written to runs/quickstart, in place of what is there; see report.html in it.
set -euo pipefail
cd "$(dirname "$0")/.."

start=$(date +%s)
say() { # what is done now, and minutes left from here on two cores
  local spent=$(($(date +%s) - start))
  printf '\n[quickstart %d:%02d] %s (about %s left)\n' $((spent / 60)) $((spent % 60)) "$1" "$2"
}
out=runs/quickstart
python=.venv/bin/python
stages=pretrain,unify,personalize
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}" # large pages: a step's buffers are fresh memory

if [ ! -x "$python" ]; then
  "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "launch/quickstart.sh: ${PYTHON:-python3} is older than Python 3.11; set PYTHON to a newer one" >&2
    exit 1
  }
  say "installing into .venv" "20 minutes"
  "${PYTHON:-python3}" -m venv .venv
fi
"$python" -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "launch/quickstart.sh: .venv has no pip, or a Python older than 3.11; remove .venv, and set PYTHON to a newer one" >&2
  exit 1
}
"$python" -m pip install --quiet --disable-pip-version-check -e .
rm -rf "$out"
mkdir -p "$out"

say "drawing 7 000 scenes for each task, eight tenths of one coloured shape, the rest of two or three" "18 minutes"
one=(--things=1 --things=1 --things=1 --things=1)
"$python" -m unialign_jax.data.scenes --target="$out/corpus" --count=7000 "${one[@]}" "${one[@]}" --things=2 --things=3

say "training a 1.2 M parameter model from scratch, three stages: $stages" "17 minutes"
"$python" launch/train.py --config=configs/scenes_tiny.py:quick --workdir="$out" --config.data.root="$out/corpus"

score() { # label, checkpoint, numbers of things
  "$python" launch/evaluate.py --checkpoint="$2" --benchmark=scenes --things="$3" --count=48 --batch=48 \
    --output="$out/scores/$1"
}
say "six tasks with the model just trained, on held-out scenes of one thing" "4 minutes"
score fresh "$out/personalize" 1
say "six tasks with the shipped checkpoint, on held-out scenes of one and two things" "2 minutes"
score shipped scenes 1-2

say "the fresh model for PyTorch users" "half a minute"
"$python" launch/convert.py --to=torch --source="$out/personalize" --target="$out/pytorch"
"$python" launch/report.py --workdir="$out" --stages="$stages" --title="Quickstart" --output="$out" \
  --scores="this run, minutes of training=$out/scores/fresh" --scores="shipped checkpoint=$out/scores/shipped" \
  --check="this run, minutes of training"
say "done: $out/report.html, $out/metrics.json; curves: tensorboard --logdir $out" "nothing"
