"""The launch scripts: what they would run, what they refuse, and how they restart; no cloud and no cluster needed."""

import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time

import pytest
import yaml

from unialign_jax import accelerator_flags

ROOT = pathlib.Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
TPU = ["--name=run1", "--zone=us-east5-b"]
TRAIN = ["--config=configs/sd3_medium.py:edit", "--workdir=gs://bucket/a run"]


def bash(script: str, *arguments: str, cwd: pathlib.Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    path = LAUNCH / script if cwd == ROOT else cwd / "launch" / script
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "LIBTPU", "XLA", "JAX"))}
    return subprocess.run(
        ["bash", str(path), *arguments], cwd=cwd, env=clean | environment, capture_output=True, text=True, timeout=60
    )


def dry_run(command: str, *arguments: str) -> list[list[str]]:
    """The commands that tpu_vm.sh would run, as the words that a shell makes of the lines it prints."""
    result = bash("tpu_vm.sh", command, "--dry_run", *arguments)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    return [words(line) for line in result.stdout.splitlines()]


def words(line: str) -> list[str]:
    output = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True, check=True).stdout
    return output.split("\0")[:-1]


@pytest.mark.parametrize("script", ["tpu_vm.sh", "slurm.sh", "quickstart.sh", "test.sh"])
def test_scripts_parse_and_stop_at_errors(script):
    assert subprocess.run(["bash", "-n", str(LAUNCH / script)]).returncode == 0
    assert "\nset -euo pipefail\n" in (LAUNCH / script).read_text()


@pytest.mark.parametrize(
    ("type_", "runtime"),
    [
        ("v4-128", "tpu-ubuntu2204-base"),
        ("v5litepod-256", "v2-alpha-tpuv5-lite"),
        ("v5p-256", "v2-alpha-tpuv5"),
        ("v6e-256", "v2-alpha-tpuv6e"),
    ],
)
def test_create_asks_for_one_slice_with_the_generations_software(type_, runtime):
    (command,) = dry_run("create", *TPU, f"--type={type_}", "--project=p1")
    assert command[:6] == ["gcloud", "compute", "tpus", "queued-resources", "create", "run1"]
    expected = {"--zone=us-east5-b", "--project=p1", f"--accelerator-type={type_}", f"--runtime-version={runtime}"}
    assert expected | {"--node-id=run1"} <= set(command)
    assert not any(word.startswith(("--spot", "--reserved", "--node-count")) for word in command)


def test_create_can_ask_for_several_spot_or_reserved_slices():
    (command,) = dry_run("create", *TPU, "--type=v5litepod-256", "--slices=2", "--spot", "--runtime=other")
    assert {"--node-count=2", "--node-prefix=run1", "--spot", "--runtime-version=other"} <= set(command)
    assert not any(word.startswith(("--node-id", "--project", "--reserved")) for word in command)
    (command,) = dry_run("create", *TPU, "--type=v6e-16", "--reserved")
    assert "--reserved" in command and "--spot" not in command


def test_a_reservation_of_a_name_is_taken_through_gcloud_alpha():
    (command,) = dry_run("create", *TPU, "--type=v6e-16", "--reservation=ours", "--", "--provisioning-model=bound")
    assert command[:3] == ["gcloud", "alpha", "compute"]
    assert "--provisioning-model=bound" in command and "--reservation=ours" in command and "--reserved" not in command
    (command,) = dry_run("wait", *TPU)
    assert command[:2] == ["gcloud", "compute"]


def test_every_command_names_the_tpu_and_says_what_it_does():
    (describe,) = dry_run("wait", *TPU)
    assert describe[4:6] == ["describe", "run1"] and "--format=value(state.state)" in describe
    pack, copy, install = dry_run("install", *TPU)
    assert pack[:2] == ["tar", "-czf"] and {"--exclude=__pycache__", str(ROOT)} <= set(pack)
    assert all((ROOT / name).exists() for name in pack[pack.index(str(ROOT)) + 1 :])
    assert "unialign_jax" in pack and "converted" not in pack and "." not in pack  # no data, no weights
    assert copy[4:9] == ["scp", pack[2], "run1:unialign_jax.tar.gz", "--node=all", "--worker=all"]
    assert install[4:8] == ["ssh", "run1", "--node=all", "--worker=all"] and '-e ".[tpu]"' in install[8]
    (tail,) = dry_run("tail", *TPU, "--slice=1", "--worker=3")
    assert {"--node=1", "--worker=3", "--command=tail -n 100 -F ~/unialign_jax/run.log"} <= set(tail)
    (delete,) = dry_run("delete", *TPU)
    assert delete[4:] == ["delete", "run1", "--force", "--zone=us-east5-b"]  # no --quiet: gcloud asks first
    (stop,) = dry_run("stop", *TPU)
    assert stop[4:8] == ["ssh", "run1", "--node=all", "--worker=all"] and "kill -TERM" in stop[8]
    state, workers = dry_run("status", *TPU)
    assert state[4:6] == ["describe", "run1"] and "tail -n 1 run.log" in workers[8]
    for remote in (install[8], stop[8], workers[8]):
        assert subprocess.run(["bash", "-n", "-c", remote.removeprefix("--command=")]).returncode == 0


def test_start_passes_the_programs_arguments_through_both_shells():
    (command,) = dry_run("start", *TPU, "--type=v6e-256", "--slices=2", "--", *TRAIN, "--config.seed=3")
    assert {"--node=all", "--worker=all"} <= set(command)
    (remote,) = [word.removeprefix("--command=") for word in command if word.startswith("--command=")]
    (line,) = [line for line in remote.splitlines() if line.startswith("nohup")]
    words = shlex.split(line.removesuffix(" &"))
    assert words[:5] == ["nohup", "setsid", "bash", "launch/tpu_vm.sh", "work"]
    assert words[5:9] == ["--generation=v6e", "--slices=2", "--restarts=20", "--"]
    assert words[9:12] == [*TRAIN, "--config.seed=3"]
    assert subprocess.run(["bash", "-n", "-c", remote]).returncode == 0


def test_a_worker_that_runs_is_not_started_again(tmp_path):
    """The command of `start`, run here beside a stand-in for the worker's supervisor."""

    def start(*arguments):
        (command,) = dry_run("start", *TPU, "--type=v6e-16", "--", *TRAIN, *arguments)
        (remote,) = [word.removeprefix("--command=") for word in command if word.startswith("--command=")]
        return subprocess.run(
            ["bash", "-c", remote], env=os.environ | {"HOME": str(tmp_path)}, capture_output=True, text=True
        )

    launch = tmp_path / "unialign_jax/launch"
    launch.mkdir(parents=True)
    (launch / "tpu_vm.sh").write_text("echo started\nexec -a tpu_vm.sh sleep 60\n")
    try:
        assert start("--config.seed=3").returncode == 0
        pid = int((tmp_path / "unialign_jax/run.pid").read_text())
        again = start("--config.seed=3")
        assert again.returncode == 0 and again.stdout == "already running\n"
        other = start("--config.seed=4")
        assert other.returncode == 1 and "with other arguments; stop it first" in other.stderr
        assert "--config.seed=3" in other.stderr and (tmp_path / "unialign_jax/run.pid").read_text() == f"{pid}\n"
    finally:
        os.killpg(pid, signal.SIGKILL)


def test_run_has_every_worker_run_a_program_with_the_generations_flags():
    program = ["launch/sample.py", "--task=generate", "--prompt=a red bicycle"]
    (command,) = dry_run("run", *TPU, "--type=v5litepod-256", "--", *program)
    assert command[4:8] == ["ssh", "run1", "--node=0", "--worker=all"]
    # All slices at once: gcloud would wait for the first 64 workers, and they for the others.
    both = dry_run("run", *TPU, "--type=v5litepod-256", "--slices=2", "--", *program)
    assert sorted(other[6] for other in both) == ["--node=0", "--node=1"]
    remote = command[8].removeprefix("--command=")
    assert "accelerator_flags v5e 1" in remote and shlex.split(remote.splitlines()[-1]) == [
        ".venv/bin/python",
        *program,
    ]
    assert subprocess.run(["bash", "-n", "-c", remote]).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "usage:"),
        (["run", *TPU, "--type=v6e-16"], "run needs a program"),
        (
            ["run", *TPU, "--type=v5p-1024", "--", "launch/sample.py"],
            "128 workers, of which gcloud starts 64 at a time",
        ),
        (["fly", *TPU], "unknown command fly"),
        (["create", "--zone=z", "--type=v6e-16"], "create needs --name"),
        (["delete", "--name=n"], "delete needs --zone"),
        (["create", *TPU], "create needs --type"),
        (["create", *TPU, "--type=v99-4"], "--type=v99-4 is unknown"),
        (["create", *TPU, "--type=tpu7x-64"], "launch/gke.yaml"),
        (["create", *TPU, "--type=v6e-16", "--spot", "--reserved"], "exclude each other"),
        (["create", *TPU, "--type=v6e-16", "--reserved", "--reservation=ours"], "exclude each other"),
        (["create", *TPU, "--type=v6e-16", "--slices=two"], "--slices=two: expected a whole number"),
        (["create", *TPU, "--type=v6e-16", "--slices=08"], "--slices=08: expected a whole number"),
        (["create", *TPU, "--type=v6e-16", "--slices=0"], "--slices=0"),
        (["create", *TPU, "--typo=v6e-16"], "unknown option --typo=v6e-16"),
        (["start", *TPU, "--type=v6e-16"], "start needs train.py's arguments"),
        (["start", *TPU, "--type=v6e-16", "--", TRAIN[0], "--workdir=runs/x"], "--workdir=gs://"),
        (["start", *TPU, "--type=v6e-16", "--", "launch/sample.py", "--output=out"], "expected --output=gs://"),
        (["start", *TPU, "--type=v6e-16", "--", "launch/sample.py"], "needs --output=gs://"),
        (["start", *TPU, "--type=v6e-16", "--", "launch/precompute.py", "--target=out"], "expected --target=gs://"),
    ],
)
def test_tpu_vm_refuses_what_it_cannot_do(arguments, message):
    result = bash("tpu_vm.sh", *arguments, PATH=os.environ["PATH"])
    assert result.returncode == 2 and message in result.stderr and result.stdout == ""


def stand_in(path: pathlib.Path, body: str) -> None:
    """An executable that takes a real program's place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)


def test_wait_ends_when_the_tpu_is_there_and_when_it_never_will_be(tmp_path):
    stand_in(tmp_path / "gcloud", 'echo "$@" >> "$LOG"; echo "$STATE"')
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "LOG": str(tmp_path / "log")}
    result = bash("tpu_vm.sh", "wait", *TPU, STATE="ACTIVE", **environment)
    assert result.returncode == 0 and result.stdout.endswith("run1 is ACTIVE\n")
    result = bash("tpu_vm.sh", "wait", *TPU, STATE="SUSPENDED", **environment)
    assert result.returncode == 2 and "won't become ACTIVE" in result.stderr
    assert (tmp_path / "log").read_text().count("queued-resources describe run1") == 2


def test_wait_outlasts_an_outage(tmp_path):
    stand_in(tmp_path / "gcloud", 'echo "$@" >> "$LOG"; [ $(wc -l < "$LOG") = "$FAILURES" ] && echo ACTIVE')
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "UNIALIGN_WAIT_SECONDS": "0"}
    result = bash("tpu_vm.sh", "wait", *TPU, LOG=str(tmp_path / "few"), FAILURES="9", **environment)
    assert result.returncode == 0 and result.stdout.endswith("run1 is ACTIVE\n")
    result = bash("tpu_vm.sh", "wait", *TPU, LOG=str(tmp_path / "many"), FAILURES="99", **environment)
    assert result.returncode == 2 and "10 times in a row" in result.stderr


@pytest.fixture
def checkout(tmp_path):
    """A checkout whose Python runs our modules but, in place of the trainer, `train` from `train.sh`.

    Each call of the trainer is a line of `calls`.
    """
    (tmp_path / "launch").mkdir()
    for script in ("tpu_vm.sh", "slurm.sh"):
        (tmp_path / "launch" / script).write_text((LAUNCH / script).read_text())
    stand_in(
        tmp_path / ".venv/bin/python",
        f'if [ "$1" = -m ]; then PYTHONPATH={shlex.quote(str(ROOT))} exec {shlex.quote(sys.executable)} "$@"; fi\n'
        'echo "$JAX_COMPILATION_CACHE_DIR|$LIBTPU_INIT_ARGS|$XLA_FLAGS|$*" >> calls; source ./train.sh',
    )
    return tmp_path


def calls(checkout: pathlib.Path) -> list[str]:
    return (checkout / "calls").read_text().splitlines()


WORK = ["work", "--generation=v5e", "--slices=1", "--restarts=3", "--", *TRAIN]


def test_a_worker_sets_the_flags_and_the_cache_and_starts_again_what_fails(checkout):
    # It fails, is preempted, then reaches its last step.
    (checkout / "train.sh").write_text("case $(wc -l < calls) in 1) exit 134 ;; 2) exit 75 ;; *) exit 0 ;; esac")
    result = bash("tpu_vm.sh", *WORK, cwd=checkout, UNIALIGN_RESTART_SECONDS="0", LIBTPU_INIT_ARGS="--mine=1")
    assert result.returncode == 0, result.stderr
    assert len(calls(checkout)) == 3 and len(set(calls(checkout))) == 1
    cache, flags, _, arguments = calls(checkout)[0].split("|")
    assert cache == "gs://bucket/a run/compilation_cache"
    assert flags == accelerator_flags.environment("v5e")["LIBTPU_INIT_ARGS"] + " --mine=1"
    assert arguments == f"launch/train.py {' '.join(TRAIN)} --preempted_exit_code=75"
    assert "launch/train.py ended with 134; starting again in 0 s, 2 restarts left" in result.stdout


def test_a_preemption_uses_up_no_restart(checkout):
    (checkout / "train.sh").write_text("[ $(wc -l < calls) = 9 ] || exit 75")
    result = bash("tpu_vm.sh", *WORK, cwd=checkout, UNIALIGN_RESTART_SECONDS="0")
    assert result.returncode == 0 and len(calls(checkout)) == 9


def test_a_worker_starts_another_program_again_too(checkout):
    (checkout / "train.sh").write_text("[ $(wc -l < calls) = 2 ] || exit 143")
    program = ["launch/sample.py", "--prompt=a red bicycle", "--output=gs://bucket/out"]
    result = bash("tpu_vm.sh", *WORK[:5], *program, cwd=checkout, UNIALIGN_RESTART_SECONDS="0")
    assert result.returncode == 0, result.stderr
    assert [call.split("|")[3] for call in calls(checkout)] == [" ".join(program)] * 2


def test_a_worker_gives_up_after_its_restarts(checkout):
    (checkout / "train.sh").write_text("exit 7")
    result = bash("tpu_vm.sh", *WORK, cwd=checkout, UNIALIGN_RESTART_SECONDS="0")
    assert result.returncode == 7 and len(calls(checkout)) == 4


def test_restarts_are_counted_anew_after_long_work(checkout):
    """Seven failures, each after some work, with three restarts; then the end."""
    (checkout / "train.sh").write_text("[ $(wc -l < calls) -gt 7 ] || exit 7")
    settings = {"UNIALIGN_RESTART_SECONDS": "0", "UNIALIGN_HEALTHY_SECONDS": "0"}
    result = bash("tpu_vm.sh", *WORK, cwd=checkout, **settings)
    assert result.returncode == 0 and len(calls(checkout)) == 8


def test_a_worker_does_not_start_again_what_that_can_not_mend(checkout):
    (checkout / "train.sh").write_text("exit 78")
    result = bash("tpu_vm.sh", *WORK, cwd=checkout, UNIALIGN_RESTART_SECONDS="0")
    assert result.returncode == 78 and len(calls(checkout)) == 1


def test_a_worker_that_is_stopped_lets_the_program_save_and_does_not_start_again(checkout):
    (checkout / "train.sh").write_text(
        "trap 'sleep 0.3; echo saved > saved; exit 75' TERM; touch ready; for i in {1..200}; do sleep 0.1; done"
    )
    worker = subprocess.Popen(["bash", str(checkout / "launch/tpu_vm.sh"), *WORK], cwd=checkout, stdout=subprocess.PIPE)
    try:
        for _ in range(1200):
            if (checkout / "ready").exists():
                break
            time.sleep(0.05)
        assert (checkout / "ready").exists()
        worker.send_signal(signal.SIGTERM)
        output, _ = worker.communicate(timeout=60)
    finally:
        worker.kill()
    assert (checkout / "saved").exists() and len(calls(checkout)) == 1
    assert worker.returncode == 75 and b"starting again" not in output


def test_slurm_needs_sbatch_and_a_directory(tmp_path):
    result = bash("slurm.sh", "--workdir=/x")
    assert result.returncode == 2 and "run it with sbatch" in result.stderr
    result = bash("slurm.sh", "--config=x", SLURM_JOB_ID="5", SLURM_SUBMIT_DIR=str(tmp_path))
    assert result.returncode == 2 and "--workdir=DIRECTORY" in result.stderr


@pytest.mark.parametrize(("code", "ends", "requeued"), [(0, 0, False), (75, 0, True), (1, 1, False)])
def test_slurm_queues_itself_again_only_when_the_program_was_told_to_stop(checkout, code, ends, requeued):
    # SLURM's signal goes to the shell around the program, which tells the program and waits for what it has to save.
    told = f"trap 'sleep 0.2; exit {code}' TERM; kill -TERM $PPID; for i in {{1..200}}; do sleep 0.1; done"
    (checkout / "train.sh").write_text(told)
    stand_in(checkout / "bin/srun", 'echo "srun $1" >> slurm_calls; shift; exec "$@"')
    stand_in(checkout / "bin/scontrol", 'echo "scontrol $*" >> slurm_calls')
    environment = {"PATH": f"{checkout}/bin:{os.environ['PATH']}", "SLURM_JOB_ID": "5"}
    result = bash(
        "slurm.sh", *TRAIN[:1], "--workdir=/shared/run", cwd=checkout, SLURM_SUBMIT_DIR=str(checkout), **environment
    )
    assert result.returncode == ends, result.stderr
    assert not list(checkout.glob(".unialign*"))
    slurm_calls = (checkout / "slurm_calls").read_text().splitlines()
    assert slurm_calls == ["srun --kill-on-bad-exit=1"] + ["scontrol requeue 5"] * requeued
    cache, _, flags, arguments = calls(checkout)[0].split("|")
    assert cache == "/shared/run/compilation_cache" and flags == accelerator_flags.environment("h100")["XLA_FLAGS"]
    assert arguments.endswith("--workdir=/shared/run --preempted_exit_code=75")


def test_slurm_asks_for_one_process_per_gpu_a_signal_before_the_end_and_a_requeue():
    options = dict(
        line.removeprefix("#SBATCH --").split("=", 1) if "=" in line else (line.removeprefix("#SBATCH --"), "")
        for line in (LAUNCH / "slurm.sh").read_text().splitlines()
        if line.startswith("#SBATCH ")
    )
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    assert (
        options["signal"].startswith("TERM@") and "requeue" in options
    )  # no B: - the processes get it, not the script
    assert "gpus-per-task" not in options


def test_gke_gives_every_host_of_a_slice_one_process_and_time_to_save():
    (document,) = yaml.safe_load_all((LAUNCH / "gke.yaml").read_text())
    assert (document["apiVersion"], document["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert document["spec"]["failurePolicy"]["maxRestarts"] > 0
    (slices,) = document["spec"]["replicatedJobs"]
    job = slices["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert container["resources"]["requests"]["google.com/tpu"] == chips
    x, y = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    assert job["completions"] == job["parallelism"] == x * y // chips
    assert job["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"
    assert pod["terminationGracePeriodSeconds"] >= 120
    (script,) = container["args"]
    assert container["command"] == ["bash", "-c"]
    assert subprocess.run(["bash", "-n", "-c", script]).returncode == 0
    assert f"accelerator_flags v6e {slices['replicas']}" in script and "tpu-v6e-slice" in str(pod["nodeSelector"])
    assert "--preempted_exit_code=75" in script
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    assert environment["WORKDIR"].startswith("gs://")
    assert environment["JAX_COMPILATION_CACHE_DIR"] == "$(WORKDIR)/compilation_cache"


def test_gkes_table_of_slices_adds_up():
    rows = [line.split()[1:] for line in (LAUNCH / "gke.yaml").read_text().splitlines() if line.startswith("#   ")][1:]
    assert [row[0] for row in rows] == [g for g in accelerator_flags.GENERATIONS if g != "h100"]
    for _, _, chips, topology, hosts in rows:
        product = 1
        for side in topology.split("x"):
            product *= int(side)
        assert product == int(chips) == 4 * int(hosts)
