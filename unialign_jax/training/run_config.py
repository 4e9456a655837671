"""What one training stage is, typed: the dataclasses that a config file's `ConfigDict` must fit, key by key."""

import dataclasses
import functools
import os
from collections.abc import Mapping
from typing import Any

from etils import epath

from unialign_jax import storage, typed
from unialign_jax.data.config import DataConfig
from unialign_jax.data.sources import SourceConfig
from unialign_jax.diffusion.flow_matching import NUM_TRAIN_TIMES
from unialign_jax.inference.presets import PROTOCOLS
from unialign_jax.objectives import Objective
from unialign_jax.state import OptimizerConfig
from unialign_jax.tuning import LoraConfig, Tuning

CACHED = {"latents": "autoencoder", "instructions": "text_encoder", "teacher": "teacher"}  # part -> who makes it
_NETWORKS = {"transformer", "text_encoder", "autoencoder", "pixel_codec", "teacher"}
# Not configured: the tokenizer has the first two, every source its own of the others.
_OBJECTIVE_FROM_ELSEWHERE = ("mask_token_id", "end_token_id", "image_pass", "text_pass")


class ConfigError(ValueError):
    """A config with an unknown or missing key, or a value of the wrong type. The message names the key."""

    final = True  # see `cli.run`


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """Where token ids come from. With neither `path` nor `learn_vocab_size`, from what the run starts from.

    Attributes:
      path: directory of a saved tokenizer.
      learn_vocab_size: learn one of this size from the captions of the data, once, at the start of the run. A run that
        starts from another (`RunConfig.init`) takes over that one's tokenizer instead: parameters go with their ids.
      more_texts: sources to learn from as well, those of stages that will take the tokenizer over; in a config by name,
        as `data.sources` are.
    """

    path: str | None = None
    learn_vocab_size: int | None = None
    more_texts: tuple[SourceConfig, ...] = ()

    def __post_init__(self):
        if self.path is not None and self.learn_vocab_size is not None:
            raise ValueError("path and learn_vocab_size are both set, expected one of them at most")


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """How often the run speaks, in steps.

    Attributes:
      every: a line on the console and a point in TensorBoard: means of the steps whose values have arrived since the
        last, up to two steps behind; at a save, of all.
      samples_every: a grid of sampled images and captions; 0 samples nothing.
      sample_count: how many training samples the grid is made for.
      sample_steps: network evaluations per image and per caption.
      guidance: of the sampled images.
    """

    every: int = 20
    samples_every: int = 0
    sample_count: int = 8
    sample_steps: int = 28
    guidance: float = 7.0

    def __post_init__(self):
        if self.every < 1 or self.samples_every < 0:
            raise ValueError(
                f"every is {self.every}, expected 1 or more; samples_every {self.samples_every}, 0 or more"
            )
        if self.sample_count < 1 or not 1 <= self.sample_steps <= NUM_TRAIN_TIMES or not self.guidance >= 0:
            raise ValueError(
                f"sample_count is {self.sample_count}, expected 1 or more; sample_steps {self.sample_steps}, 1 to "
                f"{NUM_TRAIN_TIMES}; guidance {self.guidance}, 0 or more"
            )


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are saved, and which stay. The last step is always saved.

    Attributes:
      every: steps between two.
      keep: how many of the newest stay.
      keep_period: multiples of this stay for good; None: none do.
    """

    every: int = 1000
    keep: int = 3
    keep_period: int | None = None

    def __post_init__(self):
        if self.every < 1 or self.keep < 1:
            raise ValueError(f"every is {self.every} and keep is {self.keep}, expected 1 or more of each")
        if self.keep_period is not None and self.keep_period < 1:
            raise ValueError(f"keep_period is {self.keep_period}, expected 1 or more, or None for none")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """One training stage.

    Attributes:
      stage: its name; also the sub-directory of the working directory.
      seed: of initialisation and of every draw of the losses.
      steps: updates in all.
      model: the networks, as `networks.build_networks` takes them.
      data: what is trained on; its sources are named, and terms of the loss are reported by these names too. A source
        of weight 0 is left out, whatever else its section says. The config's `data.root` is a directory that the paths
        of these sources and of `tokenizer.more_texts` are relative to, except TFDS datasets and addresses (`gs://`).
      source_names: the names, in the order of `data.sources`.
      objective, optimizer: see their classes; the mask and end tokens follow from the tokenizer.
      tokenizer: of the text encoder.
      teacher_tokenizer: directory of the teacher's; None: see `tokenizers.of_teacher`.
      after: name of the stage that this one goes on from, see `stages`; None: it starts from `init` alone.
      trained, frozen, lora: which parameters are trained, see `tuning.Tuning`.
      init: what to start from: a run's stage directory (its newest step), a step in one, or a converted directory;
        empty: random; None: random, or where `after` ended.
      init_average: of a run, start from the moving average of its parameters where one was kept.
      cached: what a cache provides instead of the frozen networks, of `CACHED`; the batches then hold these arrays in
        place of pixels and ids, see `batch.Batch`.
      cache_directory: where `launch/precompute.py` has put it, local or `gs://`.
      micro_batches: parts in which a batch is worked off, see `training.step`.
      dtype: compute dtype, "bfloat16" or "float32".
      remat: what the backward pass recomputes, see `models.blocks.REMAT_POLICIES`.
      attention: the transformer's kernel, see `models.attention.attend`.
      unroll: blocks in one iteration of the loop over blocks, see `models.unialign.UniAlign`.
      strategy: how the model and the batch are split over devices, see `parallel.mesh_shape`.
      log, checkpoint: when to write.
      protocol: what its samplers take where they are told nothing else, a name in `inference.presets.PROTOCOLS`.
      resume_step: go back to this step, once: given again, as when a run is restarted, it goes on from what was saved
        since. None: go on from the newest, if there is one.
      allow_changed: config keys that may differ from those of the run that is resumed.
    """

    stage: str
    seed: int
    steps: int
    model: Mapping[str, Any]
    data: DataConfig
    source_names: tuple[str, ...]
    objective: Objective
    optimizer: OptimizerConfig
    tokenizer: TokenizerConfig
    teacher_tokenizer: str | None = None
    after: str | None = None
    trained: tuple[str, ...] = Tuning.trained
    frozen: tuple[str, ...] = ()
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    init: str | None = None
    init_average: bool = True
    cached: tuple[str, ...] = ()
    cache_directory: str | None = None
    micro_batches: int = 1
    dtype: str = "bfloat16"
    remat: str = "none"
    attention: str = "auto"
    unroll: int = 1
    strategy: str = "fsdp"
    log: LogConfig = dataclasses.field(default_factory=LogConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    protocol: str = "unialignment"
    resume_step: int | None = None
    allow_changed: tuple[str, ...] = ()

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}, expected 1 or more")
        for name in ("micro_batches", "unroll"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 1 or more")
        if self.protocol not in PROTOCOLS:
            raise ValueError(f"protocol is {self.protocol!r}, expected one of {', '.join(PROTOCOLS)}")
        if self.data.caption_prompt != (sampled := PROTOCOLS[self.protocol].caption):
            raise ValueError(
                f"data.caption_prompt is {self.data.caption_prompt!r}, but protocol {self.protocol!r} samples captions "
                f"after {sampled!r}; make them equal, or choose another protocol (inference/presets.py has them)"
            )
        if unknown := set(self.model) - _NETWORKS:
            raise ValueError(f"model.{min(unknown)}: unknown key; known are {', '.join(sorted(_NETWORKS))}")
        if not self.trained:
            raise ValueError("trained is empty, expected networks or patterns of parameters")
        if set(self.cached) - set(CACHED):
            raise ValueError(f"cached is {self.cached}, expected some of {', '.join(CACHED)}")
        if "teacher" in self.cached and not self.model.get("teacher"):
            raise ValueError("cached has teacher, but model.teacher is not set")

    @property
    def tuning(self) -> Tuning:
        """The split of the parameters in trained and frozen ones."""
        return Tuning(self.trained, self.frozen, self.lora)


_build = functools.partial(typed.build, error=ConfigError, unset="give it with --config.{}=…")


def read(config: Any, name: str = "") -> RunConfig:
    """Checks a `ConfigDict`, as a config file returns it, against the dataclasses.

    Args:
      config: of one stage.
      name: of the section that it is in a config of several, for messages.

    Raises:
      ConfigError: an unknown key, a missing one, a wrong type or a value out of its range; the message names the key.
    """
    prefix = f"{name}." if name else ""
    fields = config.to_dict()
    fixed = [f"objective.{key}" for key in _OBJECTIVE_FROM_ELSEWHERE if key in fields.get("objective", {})]
    if fixed or "source_names" in fields:
        raise ConfigError(
            f"{prefix}{(fixed or ['source_names'])[0]}: not a key of the config, it follows from other keys"
        )
    data, tokenizer = fields.get("data"), fields.get("tokenizer")
    data = dict(data) if isinstance(data, Mapping) else {}
    root = data.pop("root", "")
    sources = _sources(data.get("sources"), root, f"{prefix}data.sources")
    fields["data"] = {**data, "sources": tuple(sources.values())}
    fields["source_names"] = tuple(sources)
    if isinstance(tokenizer, Mapping) and "more_texts" in tokenizer:
        more = _sources(tokenizer["more_texts"], root, f"{prefix}tokenizer.more_texts")
        fields["tokenizer"] = {**tokenizer, "more_texts": tuple(more.values())}
    return _build(RunConfig, fields, name)


def _sources(section: Any, root: str, name: str) -> dict[str, SourceConfig]:
    """The sources of a section, their paths below `root`."""
    if not isinstance(section, Mapping):
        raise ConfigError(f"{name}: expected one section per source, by name")
    found = {}
    for key, source in section.items():
        if isinstance(source, Mapping) and source.get("weight") == 0:
            continue  # a command line can set what a config file has, and remove none of it
        if isinstance(source, Mapping) and source.get("format") != "tfds":
            path = source.get("path")
            if root and isinstance(path, str) and not storage.is_remote(path):
                path = str(epath.Path(os.path.expanduser(root)) / os.path.expanduser(path))
                source = {**source, "path": path}
        found[key] = _build(SourceConfig, source, f"{name}.{key}")
    return found
