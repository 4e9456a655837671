#!/usr/bin/env bash
# Trains on Cloud TPU VMs: one slice, or several that train together. Run it where gcloud is installed and logged in.
# docs/pods.md walks through it.
if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
  echo "launch/tpu_vm.sh: this is bash $BASH_VERSION; 4.4 or later is needed (on macOS: brew install bash)" >&2
  exit 2
fi
set -euo pipefail

usage() {
  cat <<'EOF'
usage: bash launch/tpu_vm.sh COMMAND --name=NAME --zone=ZONE [options] [-- ARGUMENTS]

commands, in the order of a run:
  create    ask for the TPU through queued resources     (--type; --slices, --spot, --reserved or --reservation,
                                                         --runtime; -- gcloud's flags: --network=… ...)
  wait      until it is there
  install   copy this checkout to all workers and install it
  start     train on all workers, in the background       (-- --config=... --workdir=gs://...)
            or do something else that goes on where it was (-- launch/sample.py ... --output=gs://... or
                                                            -- launch/precompute.py ... --target=gs://...)
            again: only on workers where nothing runs, such as those of a host that was rebooted
  run       another program on all workers, until it ends  (-- launch/sample.py --checkpoint=gs://... ...)
  status    the request's state, and each worker's last line of log
  tail      follow a worker's log                         (--slice, --worker)
  stop      save and stop, on all workers
  delete    give the TPU back; asks first

options:
  --name=NAME       of the queued resource
  --zone=ZONE       such as us-east5-b
  --project=ID      default: gcloud's
  --type=TYPE       accelerator type, such as v5litepod-256, v5p-256, v6e-256
  --slices=N        slices that train together; default 1. `start` and `run` need it again
  --internal_ip     reach the workers by their internal addresses, from a machine in their network
  --spot            cheaper, may be taken away at any time
  --reserved        from any reservation that the project has
  --reservation=R   from the one of this name, through gcloud alpha, which alone can. One in calendar mode needs behind --
                    --provisioning-model=reservation-bound too
  --runtime=NAME    software of the VM; default: the one for JAX of --type's generation
  --restarts=N      how often a worker's program is started again after failures that follow each other, of which none
                    comes after half an hour of work; default 20
  --slice=I         for tail; default 0
  --worker=I        for tail; default 0
  --dry_run         print every command instead of running it
EOF
}

fail() {
  echo "launch/tpu_vm.sh: $*" >&2
  exit 2
}

# Runs a command, or prints it as it could be typed.
act() {
  local word line=""
  if [[ -z "$dry_run" ]]; then
    "$@"
    return
  fi
  for word in "$@"; do
    if [[ "$word" =~ ^[A-Za-z0-9_./:=,@%+~-]+$ ]]; then line+="$word "; else line+="${word@Q} "; fi
  done
  echo "${line% }"
}

tpus() { # ARGUMENTS...: gcloud's command for queued resources, with zone and project
  act gcloud ${track:+"$track"} compute tpus queued-resources "$@" "--zone=$zone" ${project:+"--project=$project"}
}

on_all_workers() { # COMMAND
  tpus ssh "$name" --node=all --worker=all ${internal_ip:+--internal-ip} "--command=$1"
}

hosts_of() { # ACCELERATOR_TYPE: hosts of one slice; v4 and v5p count cores in their names. All have four chips.
  local count=${1##*-}
  case "$1" in
    v4-* | v5p-*) echo $((count / 8)) ;;
    *) echo $((count / 4)) ;;
  esac
}

generation_of() { # ACCELERATOR_TYPE
  case "$1" in
    v4-*) echo v4 ;;
    v5litepod-*) echo v5e ;;
    v5p-*) echo v5p ;;
    v6e-*) echo v6e ;;
    tpu7x*) fail "--type=$1: queued resources have no TPU7x; use GKE (launch/gke.yaml)" ;;
    *) fail "--type=$1 is unknown; expected v4-*, v5litepod-*, v5p-* or v6e-*" ;;
  esac
}

runtime_of() { # GENERATION; https://docs.cloud.google.com/tpu/docs/runtimes
  case "$1" in
    v4) echo tpu-ubuntu2204-base ;;
    v5e) echo v2-alpha-tpuv5-lite ;;
    v5p) echo v2-alpha-tpuv5 ;;
    v6e) echo v2-alpha-tpuv6e ;;
  esac
}

create() {
  [[ -n "$type" ]] || fail "create needs --type, such as --type=v6e-256"
  ((${#spot} + ${#reserved} + (${#reservation} > 0) < 2)) || fail "--spot, --reserved and --reservation exclude each other"
  local generation nodes track="${reservation:+alpha}" # https://docs.cloud.google.com/tpu/docs/consume-reservation
  generation=$(generation_of "$type")
  if ((slices > 1)); then nodes=("--node-count=$slices" "--node-prefix=$name"); else nodes=("--node-id=$name"); fi
  # The scope lets the workers read and write Cloud Storage as far as their service account may.
  tpus create "$name" "--accelerator-type=$type" "--runtime-version=${runtime:-$(runtime_of "$generation")}" \
    "${nodes[@]}" --scopes=https://www.googleapis.com/auth/cloud-platform \
    ${spot:+--spot} ${reserved:+--reserved} ${reservation:+"--reservation=$reservation"} "${program[@]}"
}

wait_until_active() {
  local state="" before="" failed=0
  while [[ "$state" != ACTIVE ]]; do
    if [[ -n "$dry_run" ]]; then
      tpus describe "$name" "--format=value(state.state)"
      return
    fi
    if ! state=$(tpus describe "$name" "--format=value(state.state)"); then
      # Hours of waiting outlast an outage or two.
      ((++failed < 10)) || fail "$name can't be described, 10 times in a row"
      sleep "${UNIALIGN_WAIT_SECONDS:-30}"
      continue
    fi
    failed=0
    [[ "$state" == "$before" ]] || echo "$(date '+%F %T') $name is $state"
    before=$state
    case "$state" in
      ACTIVE) ;;
      FAILED | SUSPENDING | SUSPENDED | DELETING)
        fail "$name is $state and won't become ACTIVE; delete it and create it again"
        ;;
      *) sleep "${UNIALIGN_WAIT_SECONDS:-30}" ;;
    esac
  done
}

# The workers' Ubuntu has an older Python than the package needs: uv brings one.
readonly INSTALL='set -e; mkdir -p ~/unialign_jax; tar -xzf ~/unialign_jax.tar.gz -C ~/unialign_jax; cd ~/unialign_jax
python3 -m pip install --quiet --user uv
[ -x .venv/bin/python ] || python3 -m uv venv --quiet --python=3.11 .venv
python3 -m uv pip install --quiet --python=.venv/bin/python -e ".[tpu]"
# Without, libtpu of v5e and later starts and ends slowly.
sudo sh -c "echo always > /sys/kernel/mm/transparent_hugepage/enabled" || echo "huge pages stay off" >&2
.venv/bin/python -c "import jax; print(\"jax\", jax.__version__)"'

install() {
  local archive
  archive=$(mktemp -t unialign_jax.XXXXXX)
  # shellcheck disable=SC2064  # the name is known now
  trap "rm -f '$archive'" EXIT
  act tar -czf "$archive" --exclude=__pycache__ -C "$root" setup.py pyproject.toml README.md configs launch unialign_jax
  tpus scp "$archive" "$name:unialign_jax.tar.gz" --node=all --worker=all ${internal_ip:+--internal-ip}
  on_all_workers "$INSTALL"
}

start() {
  [[ -n "$type" ]] || fail "start needs --type, the one that the TPU was created with"
  local generation command argument has_config="" has_workdir="" has_output=""
  generation=$(generation_of "$type")
  for argument in "${program[@]}"; do
    case "$argument" in
      --config=*) has_config=1 ;;
      --workdir=gs://*) has_workdir=1 ;;
      --output=gs://* | --target=gs://*) has_output=1 ;;
      --workdir=* | --output=* | --target=*) fail "$argument: all workers must reach it; expected ${argument%%=*}=gs://BUCKET/DIRECTORY" ;;
    esac
  done
  if [[ "${program[0]:-}" == *.py ]]; then
    [[ -n "$has_output" ]] || fail "start needs --output=gs://BUCKET/DIRECTORY (launch/precompute.py: --target) among the arguments of ${program[0]}"
  else
    [[ -n "$has_config" && -n "$has_workdir" ]] ||
      fail "start needs train.py's arguments after --: -- --config=configs/FILE.py:STAGE --workdir=gs://BUCKET/DIRECTORY"
  fi
  arguments=$(printf %q "$(printf '%q ' "${program[@]}")")
  # A session of its own outlives ssh. Workers that go on beside others with new arguments would train a mixture.
  command="cd ~/unialign_jax || exit 1
if [ -e run.pid ] && grep -qs tpu_vm.sh \"/proc/\$(cat run.pid)/cmdline\"; then
[ \"\$(cat run.args)\" = $arguments ] && echo \"already running\" && exit 0
echo \"already running, with other arguments; stop it first: \$(cat run.args)\" >&2; exit 1; fi
printf '%s' $arguments > run.args
nohup setsid bash launch/tpu_vm.sh work"
  command+=$(printf ' %q' "--generation=$generation" "--slices=$slices" "--restarts=$restarts" -- "${program[@]}")
  command+=" >> run.log 2>&1 < /dev/null &
echo \$! > run.pid"
  on_all_workers "$command"
}

# Not in the background: what a dropped connection ends, the same command goes on with.
run_program() {
  [[ -n "$type" ]] || fail "run needs --type, the one that the TPU was created with"
  [[ "${program[0]:-}" == *.py ]] || fail "run needs a program after --: -- launch/sample.py --checkpoint=gs://… …"
  local generation command
  generation=$(generation_of "$type")
  command='cd ~/unialign_jax && eval "$(.venv/bin/python -m unialign_jax.accelerator_flags '"$generation $slices"')" &&
.venv/bin/python'
  command+=$(printf ' %q' "${program[@]}")
  # gcloud begins with the next 64 workers when the last are done, but all must meet: one gcloud for each slice.
  (($(hosts_of "$type") <= 64)) ||
    fail "run: a slice of $type has $(hosts_of "$type") workers, of which gcloud starts 64 at a time; use start, or GKE"
  local node pids=() code=0
  for ((node = 0; node < slices; node++)); do
    tpus ssh "$name" "--node=$node" --worker=all ${internal_ip:+--internal-ip} "--command=$command" &
    pids+=($!)
  done
  for node in "${pids[@]}"; do wait "$node" || code=$?; done
  return "$code"
}

# Runs on every worker: trains, and starts again what fails; the trainer resumes from its newest checkpoint. Or does the
# same with another program that goes on where it was.
work() {
  cd "$root"
  local flags argument command stopping="" child="" code left=$restarts pause=${UNIALIGN_RESTART_SECONDS:-30}
  flags=$(.venv/bin/python -m unialign_jax.accelerator_flags "$generation" "$slices")
  eval "$flags"
  for argument in "${program[@]}"; do
    # Compiled steps are kept beside the run: a restarted worker reads them instead of compiling again.
    if [[ "$argument" == --workdir=* ]]; then
      export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-${argument#--workdir=}/compilation_cache}"
    fi
  done
  # The trainer ends with 75 when it was told to stop before its last step: all workers then start again.
  command=(launch/train.py "${program[@]}" --preempted_exit_code=75)
  [[ "${program[0]}" != *.py ]] || command=("${program[@]}")
  trap 'stopping=1; kill -TERM "$child" 2>/dev/null || true' TERM # the program saves and ends
  local begun
  while :; do
    begun=$SECONDS
    .venv/bin/python "${command[@]}" &
    child=$! code=0
    wait "$child" || code=$?
    while kill -0 "$child" 2>/dev/null; do # a signal ends `wait`, not the program
      code=0
      wait "$child" || code=$?
    done
    # 78: what starting again can't mend, such as a loss that is not finite.
    [[ "$code" != 0 && "$code" != 78 && -z "$stopping" ]] || break
    # What has worked for long fails for a new reason.
    ((SECONDS - begun < ${UNIALIGN_HEALTHY_SECONDS:-1800})) || left=$restarts
    if [[ "$code" != 75 ]]; then # what was saved in order has failed at nothing
      ((left > 0)) || break
      left=$((left - 1))
    fi
    echo "$(date '+%F %T') ${command[0]} ended with $code; starting again in $pause s, $left restarts left"
    sleep "$pause"
    [[ -z "$stopping" ]] || break
  done
  echo "$(date '+%F %T') ended with $code"
  exit "$code"
}

stop() {
  # What doesn't end by itself in ten minutes is left for a person to look at.
  # shellcheck disable=SC2016  # expanded on the workers
  on_all_workers 'cd ~/unialign_jax && [ -e run.pid ] || exit 0
grep -qs tpu_vm.sh "/proc/$(cat run.pid)/cmdline" || { rm run.pid; exit 0; } # of before a reboot
kill -TERM "$(cat run.pid)" 2>/dev/null
for _ in $(seq 600); do kill -0 "$(cat run.pid)" 2>/dev/null || { rm run.pid; exit 0; }; sleep 1; done
echo "still running after 600 s; see ~/unialign_jax/run.log" >&2; exit 1'
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
name="" zone="" project="" type="" slices=1 spot="" reserved="" reservation="" track="" runtime="" restarts=20 slice=0 worker=0 dry_run="" internal_ip=""
generation="" program=()
[[ $# -gt 0 ]] || { usage >&2; exit 2; }
command=$1
shift
while [[ $# -gt 0 ]]; do
  case "$1" in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --slices=*) slices=${1#*=} ;;
    --runtime=*) runtime=${1#*=} ;;
    --restarts=*) restarts=${1#*=} ;;
    --slice=*) slice=${1#*=} ;;
    --worker=*) worker=${1#*=} ;;
    --generation=*) generation=${1#*=} ;;
    --reservation=*) reservation=${1#*=} ;;
    --spot) spot=1 ;;
    --reserved) reserved=1 ;;
    --internal_ip) internal_ip=1 ;;
    --dry_run) dry_run=1 ;;
    --help | -h)
      usage
      exit 0
      ;;
    --)
      shift
      program=("$@")
      break
      ;;
    *) fail "unknown option $1; --help lists them" ;;
  esac
  shift
done
for count in "--slices=$slices" "--restarts=$restarts" "--slice=$slice" "--worker=$worker"; do
  [[ "${count#*=}" =~ ^(0|[1-9][0-9]*)$ ]] || fail "$count: expected a whole number"
done
((slices > 0)) || fail "--slices=0: expected 1 or more"

case "$command" in
  create | wait | install | start | run | status | tail | stop | delete)
    [[ -n "$name" ]] || fail "$command needs --name"
    [[ -n "$zone" ]] || fail "$command needs --zone"
    ;;
esac
case "$command" in
  create) create ;;
  wait) wait_until_active ;;
  install) install ;;
  start) start ;;
  run) run_program ;;
  status)
    tpus describe "$name" "--format=value(state.state)"
    # shellcheck disable=SC2016  # expanded on the workers
    on_all_workers 'cd ~/unialign_jax 2>/dev/null || { echo "$(hostname): not installed"; exit 0; }
if [ -e run.pid ] && grep -qs tpu_vm.sh "/proc/$(cat run.pid)/cmdline"; then state=running; else state="not running"; fi
echo "$(hostname): $state: $(tail -n 1 run.log 2>/dev/null)"'
    ;;
  tail) tpus ssh "$name" "--node=$slice" "--worker=$worker" ${internal_ip:+--internal-ip} "--command=tail -n 100 -F ~/unialign_jax/run.log" ;;
  stop) stop ;;
  delete) tpus delete "$name" --force ;;
  work) work ;;
  help | --help | -h) usage ;;
  *) fail "unknown command $command; --help lists them" ;;
esac
