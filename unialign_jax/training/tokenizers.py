"""The tokenizers of a run, of its text encoder and of its teacher."""

import concurrent.futures
import functools
import itertools
from collections.abc import Iterable, Iterator

import jax
from etils import epath

from unialign_jax import lineage, storage
from unialign_jax.convert import store
from unialign_jax.data.report import CorpusError
from unialign_jax.data.samples import Refused
from unialign_jax.data.sources import Source, open_source
from unialign_jax.data.tokenizer import PlainTokenizer, Tokenizer
from unialign_jax.networks import Networks
from unialign_jax.training.run_config import ConfigError, RunConfig

_THREADS = 32
_CHUNK = 64  # rows that a thread reads at a time
_AHEAD = 64  # chunks that are read ahead of the learning


def make(run: RunConfig, init: str | None) -> Tokenizer:
    """The text encoder's: what the config names, else the one that the parameters were trained with, else learned.

    Args:
      run: its tokenizer and, to learn from, its sources.
      init: what the run starts from, as `lineage.locate` finds it; None: random parameters.

    Raises:
      FileNotFoundError: there is no tokenizer where there should be one.
      CorpusError: the texts to learn from can't be read.
      ConfigError: nothing says which, or the texts yield no vocabulary of that size.
      ValueError: see `Tokenizer.load`.
    """
    if run.tokenizer.path is not None:
        return Tokenizer.load(storage.absolute(run.tokenizer.path))
    if init is not None:
        return Tokenizer.load(lineage.tokenizer_directory(epath.Path(init)))
    if run.tokenizer.learn_vocab_size is None:
        raise ConfigError(
            f"{run.stage} starts from random parameters, which have no tokenizer: set init, tokenizer.path or "
            "tokenizer.learn_vocab_size"
        )
    sources = [open_source(source) for source in (*run.data.sources, *run.tokenizer.more_texts)]
    refusals: list[str] = []
    if jax.process_index() == 0:
        print(f"[{run.stage}] learning a tokenizer from {sum(map(len, sources))} rows", flush=True)
    try:
        return Tokenizer.learn(_texts(sources, refusals), run.tokenizer.learn_vocab_size)
    except CorpusError:  # about the texts, not about the size
        raise
    except ValueError as error:
        raise ConfigError(
            f"tokenizer.learn_vocab_size: {error} (model.text_encoder.vocab_size, model.transformer.vocab_size, its "
            "mask_token_id, one less, and model.teacher.vocab_size go with it; in configs/photos_tiny.py they do so by "
            "themselves)" + "".join(f". Rows that can't be used have no part in it, such as {row}" for row in refusals)
        ) from error


def of_teacher(run: RunConfig, networks: Networks, tokenizer: Tokenizer, init: str | None) -> PlainTokenizer | None:
    """The teacher's: what the config names, else the one that came with its weights, else the text encoder's.

    Args:
      run: its `teacher_tokenizer`.
      networks: of the run.
      tokenizer: of the text encoder.
      init: see `make`.

    Returns:
      None without a teacher.

    Raises:
      FileNotFoundError: there is none where one is named; there is none at all, and the text encoder's has other ids
        than the teacher.
    """
    if networks.teacher is None:
        return None
    start = epath.Path(init) if init else None
    if directory := lineage.teacher_tokenizer_directory(run.teacher_tokenizer, start):
        return PlainTokenizer.load(directory)
    sizes = networks.teacher.vocab_size, networks.text_encoder.config.vocab_size
    if sizes[0] != sizes[1]:
        start = lineage.converted_start(start)
        raise FileNotFoundError(
            f"the teacher ({sizes[0]} ids) can't read the text encoder's ids ({sizes[1]}), and "
            + (f"{start} has no {store.TEACHER_TOKENIZER}" if start else "the run starts from no converted directory")
            + ": make the two vocab_size equal, set teacher_tokenizer to the directory of its tokenizer, convert with "
            "--teacher, or train without a teacher: model.teacher={}"
        )
    return tokenizer


def _texts(sources: Iterable[Source], refusals: list[str]) -> Iterator[str]:
    """All texts of the sources, for learning a tokenizer. The first row that can't be used is added to `refusals`; all
    of them are reported while training.
    """

    def read(rows: Source, numbers: Iterable[int]) -> list[str]:
        texts = []
        for index in numbers:
            try:
                sample = rows[index]
            except Refused as refused:
                if not refusals:
                    refusals.append(f"{rows.path}, {rows.place(index)}: {refused}")
                continue
            texts += sorted({sample.caption, sample.instruction, sample.question, sample.answer} - {""})
        return texts

    for rows in sources:
        # Threads, as a row in a bucket is a request; rows on a disk they would only delay.
        with concurrent.futures.ThreadPoolExecutor(_THREADS if storage.is_remote(rows.sizes_path) else 1) as pool:
            chunks = (range(start, min(start + _CHUNK, len(rows))) for start in range(0, len(rows), _CHUNK))
            while ahead := list(itertools.islice(chunks, _AHEAD)):
                for texts in pool.map(functools.partial(read, rows), ahead):
                    yield from texts
