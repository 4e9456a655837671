#!/usr/bin/env bash
# From nothing to a trained model on a machine with two cores: installs, draws a corpus, trains, samples, converts.
#   bash launch/quickstart.sh [ROWS.jsonl]
# ROWS.jsonl are your own captioned images (see README); without it a small corpus of coloured shapes is drawn.
# STEPS sets the length of the training (default 300). Everything is written to runs/quickstart.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf '\n[quickstart %s] %s\n' "$(date +%H:%M:%S)" "$1"; }
out=runs/quickstart
python=.venv/bin/python
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"

if [ ! -x "$python" ]; then
  say "installing into .venv (about two minutes)"
  "${PYTHON:-python3}" -m venv .venv
fi
"$python" -m pip install --quiet --disable-pip-version-check -e .
rm -rf "$out"
mkdir -p "$out"

rows="${1:-$out/corpus/generate.jsonl}"
small=()
if [ $# -eq 0 ]; then
  # The drawn captions know few words: a vocabulary to match.
  small=(--config.tokenizer.learn_vocab_size=160 --config.model.transformer.vocab_size=160
    --config.model.transformer.mask_token_id=159 --config.model.text_encoder.vocab_size=160
    --config.model.teacher.vocab_size=160)
  say "drawing 512 scenes of coloured shapes with captions"
  "$python" -m unialign_jax.data.scenes --target="$out/corpus" --count=512 --size=48 --task=generate
fi

say "training a 4 M parameter model from scratch (the console line says how long; about 10 minutes on two cores)"
"$python" launch/train.py --config=configs/photos_tiny.py --workdir="$out" --config.steps="${STEPS:-300}" \
  --config.data.sources.photos.path="$rows" --config.log.samples_every=0 "${small[@]}"

checkpoint="$out/photos"
first() { "$python" -c 'import json, pathlib, sys
rows = pathlib.Path(sys.argv[1]); row = json.loads(rows.read_text().splitlines()[0])
print(row["conversations"][0]["value"] if sys.argv[2] == "caption" else rows.parent / row["image"][0])' "$rows" "$1"; }
say "an image for the first caption: $(first caption)"
"$python" launch/sample.py --checkpoint="$checkpoint" --task=generate --prompt="$(first caption)" --count=4 \
  --dtype=float32 --guidance=3 --output="$out/generated"
say "a caption for the first image: $(first image)"
"$python" launch/sample.py --checkpoint="$checkpoint" --task=caption --image="$(first image)" \
  --dtype=float32 --output="$out/captioned"
say "the model for PyTorch users"
"$python" launch/convert.py --to=torch --source="$checkpoint" --target="$out/pytorch"
say "done: $out/generated, $out/captioned, $out/pytorch; curves: tensorboard --logdir $out"
