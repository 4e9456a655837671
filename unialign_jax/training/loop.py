"""Training, from top to bottom: tokenizers, networks, data, state, resume, and the loop over steps.

A run of a stage lives in `WORKDIR/STAGE`: `checkpoints/`, `tokenizer/` and TensorBoard's event files.
"""

import contextlib
import dataclasses
import functools
import time
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import logging
from etils import epath

from unialign_jax import pretrained, storage
from unialign_jax.batch import Batch
from unialign_jax.checkpoints import Checkpoints
from unialign_jax.data.pipeline import make_batches
from unialign_jax.data.samples import Refused
from unialign_jax.data.sources import SourceConfig, open_source
from unialign_jax.data.tokenizer import PlainTokenizer, Tokenizer
from unialign_jax.networks import Networks, Params, build_networks
from unialign_jax.state import TrainState, create_state
from unialign_jax.training import flops, run_config, saved_config, writers
from unialign_jax.training.metrics import DelayedMetrics, Stopwatch, progress_line
from unialign_jax.training.run_config import RunConfig
from unialign_jax.training.samples import sample_grid
from unialign_jax.training.step import make_train_step


def train(
    config: ml_collections.ConfigDict, workdir: epath.PathLike, *, start: epath.PathLike | None = None
) -> TrainState:
    """Trains one stage to its last step, resuming where `workdir` holds checkpoints of it.

    Args:
      config: see `run_config.RunConfig`; `configs/` has examples.
      workdir: the stage's files go to a sub-directory named after it.
      start: what to start from where the config's `init` does not say.

    Returns:
      The state after the last step.

    Raises:
      ValueError: a config or data that can't be trained on, a resume that would not continue the same run, or a loss
        that is not finite. The message says what to do.
      FileNotFoundError: files that the config names do not exist.
    """
    run = run_config.read(config)
    directory = storage.absolute(workdir) / run.stage
    speaks = jax.process_index() == 0
    device = jax.local_devices()[0]

    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(
            Checkpoints(
                directory / "checkpoints", max_to_keep=run.checkpoint.keep, keep_period=run.checkpoint.keep_period
            )
        )
        latest = checkpoints.latest_step()
        resume_step = latest if run.resume_step is None else run.resume_step
        # Exactly where it started, however far that run has gone on: what is not trained comes from there each time.
        if resume_step is None:
            start = start if run.init is None else run.init
            init = None if start is None else str(pretrained.locate(start))
        else:
            init = pretrained.start_of(checkpoints.meta(resume_step), directory)

        # Text becomes ids. The tokenizer is part of the run: samplers of its checkpoints read it from the directory.
        tokenizer = _make_tokenizer(run, init, directory / "tokenizer", resuming=resume_step is not None)
        teacher_tokenizer = None
        if run.model.get("teacher"):
            teacher_tokenizer = PlainTokenizer.load(run.teacher_tokenizer) if run.teacher_tokenizer else tokenizer
        null_ids = tokenizer.encode(" ", run.data.text_length)

        # The networks, and which of them are trained.
        networks = build_networks(run.model, dtype=run.dtype, remat=run.remat)
        _check_vocabulary(networks, tokenizer)
        objective = dataclasses.replace(run.objective, mask_token_id=tokenizer.mask_id, end_token_id=tokenizer.end_id)

        # The data: endless batches, each of one source.
        batches = make_batches(run.data, tokenizer, teacher_tokenizer)
        stack.callback(batches.close)
        held_batch = _first_batch(run, tokenizer, teacher_tokenizer) if run.log.samples_every else None

        # The state: restored where there is one, else new. What is not trained is made anew or read again each time.
        init_key, step_key = jax.random.split(jax.random.key(run.seed))
        saved_as = saved_config.as_json(config)

        def fresh_state(params: Params) -> TrainState:
            return create_state(run.tuning.trained_of(params, init_key), run.optimizer)

        abstract_params = jax.eval_shape(networks.init, init_key)
        start_from = functools.partial(
            pretrained.initial_params, networks, init_key, source=init, average=run.init_average
        )
        run.tuning.check(abstract_params)
        needed = abstract_params
        if resume_step is not None:
            needed = {name: abstract_params[name] for name in run.tuning.frozen_of(abstract_params)}
        params = start_from(needed)
        frozen = run.tuning.frozen_of(params)
        if resume_step is None:
            # Committed to its device, as restored arrays are: a resumed run then finds the same program in XLA's cache.
            state = jax.device_put(jax.jit(fresh_state)(params), device)
        else:
            state, data_state, _ = checkpoints.restore(
                jax.eval_shape(fresh_state, abstract_params),
                resume_step,
                accept=lambda meta: _accept(meta, saved_as, run),
            )
            batches.set_state(data_state)
            if newer := checkpoints.set_aside_after(resume_step):
                logging.warning("steps %s were moved to %s-set-aside", newer, checkpoints.directory)
        del params
        start = int(state.step)
        meta = {
            "stage": run.stage,
            "config": saved_as,
            "init": pretrained.record_of(init, directory),
            "data": batches.get_state()["fingerprints"],
            "versions": saved_config.library_versions(),
        }
        writer = writers.make_writer(directory, start_step=start, active=speaks)
        stack.callback(writer.close)

        def say(text: str) -> None:
            if speaks:
                print(f"[{run.stage}] {text}", flush=True)

        count = sum(x.size for x in jax.tree.leaves(state.params))
        say(f"{count / 1e6:.4g} M trained parameters, {'resuming after' if start else 'starting at'} step {start}")
        if init is not None:
            say(f"{'started' if start else 'starts'} from {init}")

        # The loop. The host never waits for the step it has just queued, only for one some steps before.
        def step_for(source: SourceConfig) -> Any:
            passes = {"image_pass": source.image_pass, "text_pass": source.text_pass}
            step = make_train_step(
                networks,
                dataclasses.replace(objective, **passes),
                run.optimizer,
                merge=run.tuning.merge,
                micro_batches=run.micro_batches,
            )
            return jax.jit(step, donate_argnums=0)

        compiled: dict[Any, Any] = {}
        window, watch = DelayedMetrics(), Stopwatch()
        for step in range(start + 1, run.steps + 1):
            source, settings = run.source_names[batches.next_source], run.data.sources[batches.next_source]
            with watch.waiting():
                arrays = next(batches)
            batch = jax.device_put(Batch(null_ids=null_ids, **arrays), device)
            shapes = tuple((name, array.shape) for name, array in sorted(arrays.items()))
            bucket = (shapes, settings.image_pass, settings.text_pass)
            if bucket not in compiled:
                with watch.paused():
                    begin = time.perf_counter()
                    compiled[bucket] = step_for(settings).lower(state, frozen, batch, step_key).compile()
                    say(f"compiled the step for {source!r} in {time.perf_counter() - begin:.1f} s")
            with jax.transfer_guard("disallow"):
                state, metrics = compiled[bucket](state, frozen, batch, step_key)
            window.push(step, source, metrics, run.data.global_batch, _step_flops(run, networks, settings, batch))

            last = step == run.steps
            if last or step % run.log.every == 0:
                if last:
                    window.drain()
                losses, work = window.averages()
                if work.steps:  # none yet, if this comes sooner than the values do
                    rates = watch.lap(work)
                    writer.write_scalars(step, losses | rates)
                    say(progress_line(step, run.steps, rates, losses))
            if last or step % run.checkpoint.every == 0:
                window.drain()  # so that a state after a loss that is not finite is never saved
                with watch.paused():
                    checkpoints.save(step, state, batches.get_state(), meta)
            if held_batch is not None and (last or step % run.log.samples_every == 0):
                window.drain()
                with watch.paused():
                    params = run.tuning.merge(frozen, state.params if state.ema is None else state.ema)
                    images, text = sample_grid(networks, params, tokenizer, held_batch, run.log)
                    writer.write_images(step, {"samples": images})
                    writer.write_texts(step, {"captions": text})

        for report in batches.reports:
            if report.refused:
                say(str(report))
        say(f"done at step {int(state.step)}; checkpoints are in {checkpoints.directory}")
    return state


def _make_tokenizer(run: RunConfig, init: str | None, directory: epath.Path, *, resuming: bool) -> Tokenizer:
    """The run's tokenizer, kept in `directory`: the one the parameters were trained with, else loaded or learned."""
    if resuming:
        return Tokenizer.load(directory)
    if run.tokenizer.path is not None:
        tokenizer = Tokenizer.load(run.tokenizer.path)
    elif init is not None:
        tokenizer = Tokenizer.load(pretrained.tokenizer_directory(epath.Path(init)))
    else:
        tokenizer = Tokenizer.learn(_texts(run), run.tokenizer.learn_vocab_size)
    tokenizer.save(directory)
    return tokenizer


def _texts(run: RunConfig):
    """All texts of the sources, for learning a tokenizer. Rows that can't be used are reported while training."""
    for source in run.data.sources:
        rows = open_source(source)
        for index in range(len(rows)):
            try:
                sample = rows[index]
            except Refused:
                continue
            yield from {sample.caption, sample.instruction, sample.question, sample.answer} - {""}


def _check_vocabulary(networks: Networks, tokenizer: Tokenizer) -> None:
    config = networks.transformer.config
    if config.mask_token_id != tokenizer.mask_id:
        raise ValueError(
            f"model.transformer.mask_token_id is {config.mask_token_id}, but the tokenizer masks with id "
            f"{tokenizer.mask_id}; make them equal"
        )
    if not tokenizer.mask_id < config.vocab_size <= tokenizer.vocab_size:
        raise ValueError(
            f"model.transformer.vocab_size is {config.vocab_size}, but the tokenizer has {tokenizer.vocab_size} ids; "
            "set it to the number of ids that captions can hold"
        )


def _first_batch(run: RunConfig, tokenizer: Tokenizer, teacher_tokenizer) -> dict[str, np.ndarray]:
    """The samples that grids are made for: the run's first ones, the same after every resume."""
    batches = make_batches(run.data, tokenizer, teacher_tokenizer)
    try:
        return {name: array[: run.log.sample_count] for name, array in next(batches).items()}
    finally:
        batches.close()


def _accept(meta: dict[str, Any], current: dict[str, Any], run: RunConfig) -> None:
    changed = saved_config.check_unchanged(meta["config"], current, run.allow_changed)
    for key, (old, new) in changed.items():
        logging.warning("config key %s was %r and is now %r, as allowed", key, old, new)


def _step_flops(run: RunConfig, networks: Networks, source: SourceConfig, batch: Batch) -> int:
    config = networks.transformer.config
    height, width, _ = networks.latent_shape(*batch.target.shape[1:3])
    return flops.train_step_flops(
        config,
        batch=run.data.global_batch,
        image_tokens=(height // config.patch_size) * (width // config.patch_size),
        text_tokens=run.data.text_length,
        references=0 if batch.references is None else batch.references.shape[1],
        aligned=networks.teacher is not None,
        image_pass=source.image_pass > 0,
        text_pass=source.text_pass > 0,
    )
