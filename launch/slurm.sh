#!/usr/bin/env bash
# Trains on GPU nodes of a SLURM cluster, one process per GPU, and queues itself again until the last step is done:
#   sbatch --nodes=4 launch/slurm.sh --config=configs/FILE.py:STAGE --workdir=/shared/DIRECTORY [--config.key=value ...]
# The #SBATCH lines are for nodes of 8 GPUs and 96 cores; options of sbatch's command line win over them.
#SBATCH --job-name=unialign
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --output=unialign-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=TERM@300
# 300 s before the time is over all processes are told; they finish the step, save and end. A job is also
# queued again when a node fails or is taken away (--requeue). --gpus-per-task must not be set: JAX picks each process's
# GPU by its number on the node, and has to see them all. All cores of a node are shared out among its processes:
# https://docs.jax.dev/en/latest/gpu_performance_tips.html#multi-process
set -euo pipefail

if [[ -z "${SLURM_JOB_ID:-}" ]]; then
  echo "launch/slurm.sh: run it with sbatch: sbatch --nodes=4 launch/slurm.sh --config=... --workdir=..." >&2
  exit 2
fi
cd "${SLURM_SUBMIT_DIR:?}"
workdir=""
for argument in "$@"; do
  if [[ "$argument" == --workdir=* ]]; then workdir=${argument#--workdir=}; fi
done
if [[ -z "$workdir" ]]; then
  echo "launch/slurm.sh: give --workdir=DIRECTORY, one that all nodes reach" >&2
  exit 2
fi
python=python
if [[ -x .venv/bin/python ]]; then python=.venv/bin/python; fi

flags=$("$python" -m unialign_jax.accelerator_flags "${ACCELERATOR:-h100}")
eval "$flags"
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$workdir/compilation_cache}"

cancelled=""
trap 'cancelled=1' TERM # scancel tells this script too; the signal before the end of the time does not
# srun gives the highest code of all processes, and --kill-on-bad-exit ends those that are a moment later than the
# first: 75 would not come through. So each process that was told to stop leaves a mark, and ends well. SLURM signals
# the process that it has started, and some set-ups also those below it: this shell passes the signal on.
preempted=$PWD/.unialign-$SLURM_JOB_ID.preempted
rm -f "$preempted"
# shellcheck disable=SC2016  # expanded by each process's shell
task='told="" child=""
trap "told=1; kill -TERM \$child 2>/dev/null" TERM
"${@:2}" & child=$!
[[ -z "$told" ]] || kill -TERM "$child" # told before there was a program
told=1
while [[ "$told" ]]; do # a signal ends this waiting, not the program
  told=""; wait "$child"; now=$?
  [[ "$now" == 127 ]] || code=$now # 127: it had ended, and was waited for, when the signal came
done
[[ "$code" == 75 ]] || exit "$code"
touch "$1"'
code=0
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}" # srun does not take it over from sbatch since SLURM 22.05
# One process that fails ends all others, which would wait for it.
srun --kill-on-bad-exit=1 bash -c "$task" task "$preempted" "$python" launch/train.py "$@" --preempted_exit_code=75 ||
  code=$?
if [[ -e "$preempted" ]]; then
  rm -f "$preempted"
  if [[ "$code" == 0 && -z "$cancelled" ]]; then scontrol requeue "$SLURM_JOB_ID"; fi
fi
exit "$code"
