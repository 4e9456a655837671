"""Training, from top to bottom: program, tokenizers, data, state, resume, and the loop over steps.

Every process of a run executes all of it; process 0 alone writes the logs. A run of a stage lives in `WORKDIR/STAGE`:
`checkpoints/`, `tokenizer/` and TensorBoard's event files.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import logging
from etils import epath

from unialign_jax import agreement, distributed, lineage, parallel, pretrained, storage
from unialign_jax.batch import Batch
from unialign_jax.checkpoints import Checkpoints
from unialign_jax.data.pipeline import Batches, make_batches, merge_states
from unialign_jax.data.sources import Source
from unialign_jax.data.tokenizer import Tokenizer
from unialign_jax.networks import Networks, Params
from unialign_jax.saved_step import DamagedCheckpoint
from unialign_jax.state import TrainState, create_state
from unialign_jax.training import caching, run_config, saved_config, tokenizers, writers
from unialign_jax.training.metrics import DelayedMetrics, Stopwatch, progress_line
from unialign_jax.training.profiling import StepProfiler
from unialign_jax.training.program import Program
from unialign_jax.training.run_config import RunConfig
from unialign_jax.training.samples import sample_grid

_FLUSHING = 60  # seconds after which what was written can be looked at
# Seconds for the process that compiles most slowly.
_COMPILING = 3600


def train(
    config: ml_collections.ConfigDict,
    workdir: epath.PathLike,
    *,
    start: epath.PathLike | None = None,
    profile_steps: tuple[int, int] | None = None,
    preemption: distributed.Preemption | None = None,
    make_batches: Callable[..., Batches] = make_batches,
) -> TrainState:
    """Trains one stage to its last step, or until SIGTERM or Ctrl-C; resumes where `workdir` holds checkpoints of it.

    Args:
      config: see `run_config.RunConfig`; `configs/` has examples.
      workdir: the stage's files go to a sub-directory named after it.
      start: what to start from where the config's `init` does not say.
      profile_steps: first and last step to record for XProf, see `profiling.StepProfiler`.
      preemption: of a caller that trains more than this stage.
      make_batches: makes the input pipeline; the loop's benchmark puts recorded batches in its place.

    Returns:
      The state after the last step, which is saved.

    Raises:
      ValueError: a config or data that can't be trained on, a mesh that the devices or the model do not fit, a resume
        that would not continue the same run, or a loss that is not finite. The message says what to do.
      FileNotFoundError: files that the config names do not exist.
    """
    run = run_config.read(config)
    saved_as = saved_config.as_json(config)
    saved_config.check_same(saved_as)
    program = Program(run, parallel.make_mesh(run.strategy))
    networks = program.networks
    directory = storage.absolute(workdir) / run.stage
    speaks = jax.process_index() == 0

    def say(text: str) -> None:
        if speaks:
            print(f"[{run.stage}] {text}", flush=True)

    with contextlib.ExitStack() as stack:
        preemption = preemption or stack.enter_context(distributed.Preemption())
        checkpoints = stack.enter_context(
            Checkpoints(
                directory / "checkpoints", max_to_keep=run.checkpoint.keep, keep_period=run.checkpoint.keep_period
            )
        )
        resume_step, saved, init = _beginning(run, checkpoints, saved_as, start, say)
        if run.tuning.lora.rank and init is None:
            raise run_config.ConfigError(
                f"lora.rank is {run.tuning.lora.rank}, but {run.stage} starts from random parameters, to which "
                "adapters add nothing; set init to what they are to adapt, or lora.rank to 0"
            )

        # Text becomes ids. The tokenizer is part of the run: samplers of its checkpoints read it from the directory.
        tokenizer = _make_tokenizer(run, init, directory / "tokenizer", resuming=resume_step is not None)
        teacher_tokenizer = tokenizers.of_teacher(run, networks, tokenizer, init)
        _check_vocabulary(networks, tokenizer)
        if run.tuning.lora.rank and init:
            pretrained.warn_of_drawn(init, lineage.drawn_of(epath.Path(init)))

        # The data: endless batches, each of one source. Every process makes the rows that its devices hold.
        batches = make_batches(
            run.data,
            tokenizer,
            None if "teacher" in run.cached else teacher_tokenizer,
            slots=program.rows(),
            caches=caching.caches_of(run, networks, tokenizer, teacher_tokenizer),
        )
        stack.callback(batches.close)
        held_batch = _first_batch(run, tokenizer, batches.sources) if run.log.samples_every else None
        null_text = caching.null_text(batches.caches, tokenizer, run.data.text_length)
        shared = {name: parallel.replicate(array, program.mesh) for name, array in null_text.items()}

        # The state: restored where there is one, else new. What is not trained is made anew or read again each time.
        # Either way every device makes or reads its own part.
        init_key, step_key = program.make_keys()
        start_from = functools.partial(
            pretrained.initial_params, networks, init_key, source=init, average=run.init_average
        )
        params = start_from({name: program.params[name] for name in program.frozen})
        frozen = run.tuning.frozen_of(params)
        # Networks that no step reads: here to see that the caches are theirs, and to decode sampled images.
        unread = start_from(program.unread) if program.unread else {}
        caching.check_weights(batches.caches, frozen | unread)
        codec = {name: unread[name] for name in unread if name == "autoencoder" and held_batch is not None}
        del unread
        if resume_step is None:
            params |= start_from({name: tree for name, tree in program.params.items() if name not in params})
            shardings = jax.tree.map(lambda leaf: leaf.sharding, program.state)

            def create(params: Params, key: jax.Array) -> TrainState:
                return create_state(run.tuning.trained_of(params, key), run.optimizer)

            state = jax.jit(create, out_shardings=shardings)(params, init_key)
        else:
            state, data_state, _ = checkpoints.restore(program.state, resume_step)
            batches.set_state(data_state)
            if newer := checkpoints.set_aside_after(resume_step):
                logging.warning("steps %s were moved to %s-set-aside", newer, checkpoints.directory)
        del params
        first = step = int(state.step)
        meta = {
            "stage": run.stage,
            "config": saved_as,
            "init": lineage.record_of(init, directory),
            "init_identity": lineage.identity_of(init) if resume_step is None else saved.get("init_identity"),
            "data": batches.get_state()["fingerprints"],
            "versions": saved_config.library_versions(),
        }
        writer = writers.make_writer(directory, start_step=first, active=speaks)
        stack.callback(writer.close)
        count = sum(x.size for x in jax.tree.leaves(state.params))
        mesh = ", ".join(f"{axis} {size}" for axis, size in program.mesh.shape.items() if size > 1) or "one device"
        say(
            f"{count / 1e6:.4g} M trained parameters on {mesh}, {'resuming after' if first else 'starting at'} step "
            f"{first}"
        )
        if init is not None:
            say(f"{'started' if first else 'starts'} from {init}")

        def draw(step: int, state: TrainState) -> None:
            """Writes the grid of samples and their captions."""
            with jax.set_mesh(program.mesh):
                params = run.tuning.merge(frozen | codec, state.params if state.ema is None else state.ema)
                images, text = sample_grid(networks, params, tokenizer, held_batch, run.log, run.protocol)
            writer.write_images(step, {"samples": images})
            writer.write_texts(step, {"captions": text})

        # The loop. The host never waits for the step it has just queued, only for one some steps before.
        compiled: dict[tuple[Batch, float, float], Any] = {}
        window, watch = DelayedMetrics(by_source=len(run.source_names) > 1), Stopwatch()
        profiler = StepProfiler(profile_steps if speaks else None, directory)
        stack.callback(lambda: (place := profiler.close()) and say(f"profile of the steps until the end: {place}"))
        if profile_steps is not None and not (first < profile_steps[1] and profile_steps[0] <= run.steps):
            say(f"no profile of steps {profile_steps[0]} to {profile_steps[1]}: this takes {first + 1} to {run.steps}")
        stopping, flushed = False, time.monotonic()
        while step < run.steps and not stopping:
            step += 1
            source, name = run.data.sources[batches.next_source], run.source_names[batches.next_source]
            size = batches.next_size
            with watch.waiting():
                arrays = next(batches)
            batch = program.place(arrays, shared)
            bucket = (program.batch(source, size), source.image_pass, source.text_pass)
            if bucket not in compiled:
                with watch.paused():
                    begin = time.perf_counter()
                    compiled[bucket] = program.lower(source, size, end_token_id=tokenizer.end_id).compile()
                    say(f"compiled the step for {name!r} in {time.perf_counter() - begin:.1f} s")
                    # Gloo, between CPUs, gives up if a process comes to the first collective 30 s after the others.
                    distributed.barrier("compiled", _COMPILING)
            profiler.before(step, window.drain)
            with jax.transfer_guard("disallow"), jax.profiler.StepTraceAnnotation("train", step_num=step):
                state, metrics = compiled[bucket](state, frozen, batch, step_key)
            window.push(step, name, metrics, run.data.global_batch, program.model_flops(source, size))

            if (profile := profiler.after(step, window.drain)) is not None:
                say(f"profile of steps {profile_steps[0]} to {step}: {profile}")
            stopping = preemption.reached()
            last = step == run.steps
            saving = last or stopping or step % run.checkpoint.every == 0
            if saving or step % run.log.every == 0:
                if saving:
                    # So that a state after a loss that is not finite is never saved, and that no average spans a save:
                    # a resumed run then writes the points that the uninterrupted one does.
                    window.drain()
                losses, work = window.averages()
                if work.steps:  # none yet, if this comes sooner than the values do
                    rates = watch.lap(work)
                    writer.write_scalars(step, losses | rates)
                    say(progress_line(step, run.steps, rates, losses))
            if saving or time.monotonic() - flushed > _FLUSHING:
                with watch.paused():
                    writer.flush()  # a resumed run does not write again what lies before the step it resumes at
                flushed = time.monotonic()
            if saving:
                with watch.paused():
                    checkpoints.save(step, state, merge_states(agreement.gather(batches.get_state())), meta)
            # Once at the beginning: if there is no room for it beside the state, one learns it then.
            drawing = held_batch is not None and (last or step == 1 or step % run.log.samples_every == 0)
            if drawing and not stopping:
                window.drain()
                with watch.paused():
                    draw(step, state)

        batches.set_state(merge_states(agreement.gather(batches.get_state())))  # with the reports of all processes
        for report in batches.reports:
            if report.refused:
                say(str(report))
        checkpoints.wait()
        if step < run.steps:
            say(f"told to stop: saved step {step}; the same command goes on from there")
        else:
            say(f"done at step {step}; checkpoints are in {checkpoints.directory}")
    return state


def _beginning(
    run: RunConfig,
    checkpoints: Checkpoints,
    config: dict[str, Any],
    start: epath.PathLike | None,
    say: Callable[[str], None],
) -> tuple[int | None, dict[str, Any] | None, str | None]:
    """The step to resume at and its record, None for a new run; and where the run started, None from nothing.

    What is not trained comes from that start each time, exactly from the step it was, however far that run has gone on.
    """
    directory, latest = checkpoints.directory.parent, checkpoints.latest_step()
    resume_step = latest if goes_on_from_latest(run, checkpoints, latest) else run.resume_step
    if resume_step is None:
        start = start if run.init is None else run.init
        if start is None and run.after is not None:
            raise run_config.ConfigError(
                f"stage {run.stage!r} goes on from {run.after!r}; say where that is, or set init"
            )
        return None, None, str(lineage.locate(start)) if start else None
    saved = checkpoints.meta(resume_step)
    changed = _check_config(saved, config, run)
    if resume_step != run.resume_step is not None:
        say(
            f"resume_step={run.resume_step} was gone back to before; this goes on from step {latest}, saved since. To "
            f"go back again, move the later steps out of {checkpoints.directory}"
        )
    if "init" in changed and run.init is not None:
        return resume_step, saved, lineage.moved_start(saved, run.init)
    lineage.check_start(saved, directory)
    init = lineage.start_of(saved, directory)
    if init is not None and not epath.Path(init).exists():
        logging.warning(
            "%s, from which this run started, is gone: if it is needed, set init to where it is now, with "
            "allow_changed=init",
            init,
        )
    return resume_step, saved, init


def goes_on_from_latest(run: RunConfig, checkpoints: Checkpoints, latest: int | None) -> bool:
    """Whether a run goes on from its latest step: `resume_step` is not set, or has had its effect.

    A run that is started again has the same command, `resume_step` included: having gone back once, it goes on from
    what it has saved since.

    Args:
      run: the current config.
      checkpoints: of the stage; all processes ask together.
      latest: their latest step, None where there is none.
    """
    if run.resume_step is None or latest is None:
        return run.resume_step is None
    try:
        return checkpoints.meta(latest)["config"].get("resume_step") == run.resume_step
    except DamagedCheckpoint:
        return False


def _make_tokenizer(run: RunConfig, init: str | None, directory: epath.Path, *, resuming: bool) -> Tokenizer:
    """The run's tokenizer, kept in `directory`."""
    if not resuming:
        agreement.primary(lambda: tokenizers.make(run, init).save(directory), FileNotFoundError)
    return Tokenizer.load(directory)


def _check_vocabulary(networks: Networks, tokenizer: Tokenizer) -> None:
    config = networks.transformer.config
    if config.mask_token_id != tokenizer.mask_id:
        raise run_config.ConfigError(
            f"model.transformer.mask_token_id is {config.mask_token_id}, but the tokenizer masks with id "
            f"{tokenizer.mask_id}; make them equal (in configs/photos_tiny.py they follow from "
            f"--config.tokenizer.learn_vocab_size={tokenizer.mask_id + 1})"
        )
    if not tokenizer.mask_id < config.vocab_size <= tokenizer.vocab_size:
        raise run_config.ConfigError(
            f"model.transformer.vocab_size is {config.vocab_size}, but the tokenizer has {tokenizer.vocab_size} ids; "
            "set it to the number of ids that captions can hold"
        )


def _first_batch(run: RunConfig, tokenizer: Tokenizer, sources: Sequence[Source]) -> dict[str, np.ndarray]:
    """The samples that grids are made for, with pixels: the run's first ones, the same after every resume."""
    count = min(run.log.sample_count, run.data.global_batch)
    data = dataclasses.replace(run.data, workers=0)  # started, processes would cost more than one batch
    with make_batches(data, tokenizer, slots=range(count), sources=sources) as batches:
        return next(batches)


def _check_config(saved: dict[str, Any], current: dict[str, Any], run: RunConfig) -> dict[str, tuple]:
    """What of a checkpoint's config has changed since, as allowed; raises `ConfigChanged` where it is not."""
    for name, versions in saved_config.differences(saved["versions"], saved_config.library_versions()).items():
        logging.warning("%s was %s and is now %s: draws and rounding may be others than before", name, *versions)
    changed = saved_config.check_unchanged(saved["config"], current, run.allow_changed)
    for key, (old, new) in changed.items():
        logging.warning("config key %s was %r and is now %r, as allowed", key, old, new)
    return changed
