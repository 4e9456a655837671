"""`UniAlignPipeline`: the six tasks on one set of weights, from Python.

The same compiled programs (`inference/programs.py`) serve every caller: this class, `launch/sample.py`, the image grids
of training.
"""

from collections.abc import Callable, Sequence
from typing import Any, Unpack

import jax
import numpy as np
import tqdm
from etils import epath
from jax.sharding import Mesh
from PIL import Image

from unialign_jax import compilation_cache, parallel, pretrained
from unialign_jax.data.samples import TASKS
from unialign_jax.data.tokenizer import Tokenizer
from unialign_jax.diffusion import flow_matching
from unialign_jax.inference import inputs, presets, programs
from unialign_jax.inference.batches import Batches
from unialign_jax.inference.inputs import ImageLike
from unialign_jax.inference.options import ImageOptions, Preview, TextOptions
from unialign_jax.networks import Networks

_BAR = "{desc}{percentage:3.0f}%|{bar}| {n:.4g}/{total} [{elapsed}, {remaining} left, {rate_fmt}]"


class UniAlignPipeline:
    """Images and texts from one model. Every method takes one item or a list, and answers in kind.

    An item's result depends on the item and its seed alone, up to rounding: not on the batch it sat in, the order, or
    the number of devices. With several processes all make the same calls.

    Attributes:
      networks, params: the model; `params` holds its networks by name, split over the mesh as in training.
      tokenizer: of the text encoder.
      mesh: the devices.
      text_length: T, the number of tokens of every text.
      size: (height, width) in pixels of images where a call gives none.
      shift: of the noise levels, see `flow_matching.euler_sigmas`.
      batches: the compiled batch sizes.
      protocol: what calls take that do not say, a `presets.Protocol`.
      progress: whether calls show a progress bar where they do not say.
    """

    def __init__(
        self,
        networks: Networks,
        params: dict[str, Any],
        tokenizer: Tokenizer,
        *,
        text_length: int,
        size: tuple[int, int],
        shift: float = 3.0,
        protocol: str | presets.Protocol = "unialignment",
        mesh: Mesh | None = None,
        max_batch: int = 8,
        single_size: bool = False,
        progress: bool = False,
    ):
        """See `from_pretrained`.

        Args:
          networks: the model.
          params: by name; placed on the mesh if they are not there already.
          tokenizer, text_length, size, shift, protocol, progress: see the class.
          mesh: see `parallel.make_mesh`; None: that of the parameters, or the first device.
          max_batch, single_size: most items worked on at once (but at least one for each part that the mesh splits a
            batch into), and whether smaller batches are filled up to it instead of getting smaller programs (powers of
            two times the parts).

        Raises:
          ValueError: a mesh that does not divide the heads or the batch.
        """
        self.mesh = mesh or parallel.mesh_of(params)
        parallel.check_heads(self.mesh, networks.transformer.config.num_attention_heads)
        self.batches = Batches(self.mesh, max_batch, single=single_size)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, pretrained.sampled(networks, self.mesh))
        self.params = jax.device_put({name: params[name] for name in shardings}, shardings)
        self.networks, self.tokenizer = networks, tokenizer
        self.text_length, self.size, self.shift, self.progress = text_length, size, shift, progress
        self.protocol = presets.protocol(protocol)

    @classmethod
    def from_pretrained(
        cls,
        directory: epath.PathLike,
        mesh: Mesh | None = None,
        dtype: str = "bfloat16",
        *,
        average: bool = True,
        max_batch: int = 8,
        single_size: bool = False,
        progress: bool = True,
        compile_cache: epath.PathLike | None = None,
    ) -> "UniAlignPipeline":
        """Reads a checkpoint of any kind.

        Args:
          directory: local or `gs://`: a run's stage directory (its newest step), one of its steps, or a converted
            directory; a local public PyTorch pipeline directory (read as it is); or the name of a checkpoint that
            comes with this package.
          mesh: where the model goes, split by the plan of training; None: the first device.
          dtype: compute dtype, "bfloat16" or "float32".
          average: of a run, take the moving average of the parameters where there is one.
          max_batch, single_size: see `__init__`.
          progress: see the class.
          compile_cache: directory in which this process keeps compiled programs from now on; None leaves JAX's setting.

        Raises:
          FileNotFoundError, ValueError: what is wrong with the directory, and what was expected.
        """
        if compile_cache is not None:
            compilation_cache.enable(str(compile_cache))
        mesh = mesh or parallel.first_device()
        model = pretrained.load(directory, dtype=dtype, average=average, mesh=mesh)
        return cls(
            model.networks,
            model.params,
            model.tokenizer,
            text_length=model.text_length,
            size=model.size,
            shift=model.shift,
            protocol=model.protocol,
            mesh=mesh,
            max_batch=max_batch,
            single_size=single_size,
            progress=progress,
        )

    def generate(self, prompt: str | Sequence[str], **options: Unpack[ImageOptions]) -> Any:
        """Text -> image. By default guidance 7 and 50 steps, as published, or what the model's protocol says.

        Raises:
          ValueError: as all methods, for a request that can't be served, before anything is compiled.
        """
        return self._images(prompt, None, **options)

    def edit(
        self, image: ImageLike | Sequence[ImageLike], instruction: str | Sequence[str], **options: Unpack[ImageOptions]
    ) -> Any:
        """Image and instruction -> image; guidance 9 as published, if the model's protocol says nothing else.

        Perception is an edit by its words.
        """
        references = [[item] for item in inputs.as_list(image, instruction, "image", "instruction")]
        return self._images(instruction, references, **options)

    perceive = edit

    def compose(
        self,
        images: Sequence[ImageLike] | Sequence[Sequence[ImageLike]],
        prompt: str | Sequence[str],
        **options: Unpack[ImageOptions],
    ) -> Any:
        """One or more reference images and a prompt -> image; for a list of prompts, a list of as many lists.

        Among several lists some may be empty.
        """
        items = [images] if isinstance(prompt, str) else images
        if inputs.is_image(items):
            raise ValueError("one image came with a list of prompts; each prompt needs a list of images")
        inputs.check_list(items, "images")
        for item in items:
            if not inputs.is_image(item):
                inputs.check_list(item, "images")
        return self._images(prompt, [[item] if inputs.is_image(item) else list(item) for item in items], **options)

    def caption(self, image: ImageLike | Sequence[ImageLike], **options: Unpack[TextOptions]) -> Any:
        """Image -> text. Steps are by default those of the protocol, see `presets.Protocol`."""

        def words(preset: presets.Protocol, count: int) -> tuple[np.ndarray, np.ndarray]:
            length = min(self.text_length, preset.caption_length)
            ids, learned = self.tokenizer.encode_prompted(preset.caption, "", length)
            return np.tile(ids, (count, 1)), np.tile(~learned, (count, 1))

        return self._texts("caption", image, words, **options)

    def answer(
        self, image: ImageLike | Sequence[ImageLike], question: str | Sequence[str], **options: Unpack[TextOptions]
    ) -> Any:
        """Image and question -> a word or phrase; the protocol words the question (`presets.Protocol.question`)."""
        inputs.as_list(image, question, "image", "question")
        questions = inputs.check_texts(question, "question")

        def words(preset: presets.Protocol, count: int) -> tuple[np.ndarray, np.ndarray]:
            ids, known = zip(*(self.encode_question(text, preset) for text in questions), strict=True)
            return np.stack(ids), np.stack(known)

        return self._texts("answer", image, words, **options)

    def complete(
        self, images: Sequence[ImageLike], ids: np.ndarray, known: np.ndarray, **options: Unpack[TextOptions]
    ) -> list[str]:
        """Images and texts of which some ids are known -> the rest; captions and answers are made so.

        Args:
          images: of B items.
          ids: int32 `[B, T]`, read where they are known.
          known: bool `[B, T]`.
          **options: those of `caption`.

        Raises:
          ValueError: as all methods; or the shapes do not go together, or `known` is not bool.
        """
        ids, known = np.asarray(ids), np.asarray(known)
        if known.dtype != bool or not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(f"ids are {ids.dtype} and known {known.dtype}; expected integers and bool")
        if ids.ndim != 2 or ids.shape != known.shape or len(ids) != len(images):
            raise ValueError(
                f"{len(images)} image(s) came with ids {list(ids.shape)} and known {list(known.shape)}; expected one "
                "text for each image, in two arrays [B, T]"
            )
        return self._texts("caption", images, lambda *_: (ids, known), **options)

    def encode_question(self, question: str, protocol: str | presets.Protocol | None = None):
        """The ids int32 `[T]` of a question in a protocol's words, and where they stand, bool `[T]`.

        Raises:
          ValueError: it is so long that no room is left for an answer.
        """
        preset = self.protocol if protocol is None else presets.protocol(protocol)
        length = min(self.text_length, preset.answer_length)
        ids, learned = self.tokenizer.encode_prompted(preset.question.format(question), "", length)
        if learned.sum() < 2:
            raise ValueError(
                f"a question in its protocol's words fills the {length} tokens of a text and leaves no room for an "
                f"answer; shorten {question[:60]!r}"
            )
        return ids, ~learned

    def warm_up(
        self,
        tasks: Sequence[str] = TASKS,
        *,
        sizes: Sequence[tuple[int, int]] | None = None,
        batches: Sequence[int] | None = None,
        references: int = 1,
    ) -> None:
        """Compiles what later calls will run, by running it: image tasks for one step, text tasks in full.

        Args:
          tasks: names in `TASKS`.
          sizes: of images; None: the model's.
          batches: numbers of items; None: all compiled sizes.
          references: images per item of `compose`.

        Raises:
          ValueError: an unknown task, or a size that can't be.
        """
        if unknown := sorted(set(tasks) - set(TASKS)):
            raise ValueError(f"tasks {unknown} are unknown; choose of {', '.join(TASKS)}")
        for task in tasks:
            for size in sizes or [self.size]:
                for count in batches or self.batches.sizes:
                    grey, words = np.full((8, 8, 3), 127, np.uint8), [" "] * count
                    options = {"size": size, "progress": False}
                    if task == "generate":
                        self.generate(words, steps=1, **options)
                    elif task == "caption":
                        self.caption([grey] * count, **options)
                    elif task == "answer":
                        self.answer([grey] * count, words, **options)
                    else:
                        room = references if task == "compose" else 1
                        self.compose([[grey] * room] * count, words, steps=1, **options)

    def _images(
        self,
        prompt: str | Sequence[str],
        references: list[list[ImageLike]] | None,
        *,
        seed: int | Sequence[int] = 0,
        steps: int | None = None,
        guidance: float | None = None,
        reference_guidance: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        negative_prompt: str | None = None,
        size: tuple[int, int] | None = None,
        aspect: str | float | None = None,
        output: str = "pil",
        preview: Preview | None = None,
        progress: bool | None = None,
        protocol: str | presets.Protocol | None = None,
        gather: bool = True,
    ) -> Any:
        """The image tasks; references per item, or None."""
        preset = self.protocol if protocol is None else presets.protocol(protocol)
        prompts = inputs.check_texts(prompt, "prompt")
        if references is not None and (len(references) != len(prompts) or not any(references)):
            raise ValueError(
                f"{len(prompts)} prompt(s) came with {[len(r) for r in references]} reference image(s); each prompt "
                "needs a list, and one of the lists at least one image (without any: generate)"
            )
        height, width = inputs.image_size(self.networks, self.size, size, aspect)
        seeds = inputs.check_seeds(seed, len(prompts))
        task = "generate" if references is None else "compose"
        settled = preset.settle(task, steps=steps, guidance=guidance, negative_prompt=negative_prompt)
        steps, guidance = settled["steps"], settled["guidance"]
        inputs.check_number("steps", steps, 1, programs.MAX_STEPS, whole=True)
        inputs.check_number("guidance", guidance, 0)
        inputs.check_number("reference_guidance", reference_guidance, 0)
        flow_matching.check_interval(guidance_interval)
        if preview is not None and not callable(preview):
            raise ValueError(f"preview is {preview!r}; a function was expected")
        if references is None and reference_guidance != 1:
            raise ValueError(f"reference_guidance {reference_guidance} needs reference images; there are none")
        inputs.check_choice("output", output, ("pil", "array", "latent"))
        [negative] = inputs.check_texts([settled["negative_prompt"]], "negative_prompt")
        negative_ids = self.tokenizer.encode(negative, self.text_length)
        rows = [seeds, np.stack([self.tokenizer.encode(text, self.text_length) for text in prompts])]
        if references is not None:
            pictures, mask = inputs.reference_pixels(references, height, width)
            # Attention without a mask is faster: it comes where some item, or a branch of guidance, lacks a reference.
            rows += [pictures] if mask.all() and reference_guidance == 1 else [pictures, mask]
        made = programs.image_programs(self.networks, self.mesh)
        branches = 3 if reference_guidance != 1 else 2 if guidance != 1 else 1
        scales = np.asarray([reference_guidance, guidance][3 - branches :] if branches > 1 else [], np.float32)
        sigmas = programs.sigma_table(steps, self.shift)
        runs = flow_matching.guided_runs(sigmas[: steps + 1], guidance_interval, guided=branches > 1)
        watched = (self.progress if progress is None else progress) or preview is not None
        if gather:
            self.batches.check_same(
                makes="images",
                items=len(prompts),
                references=0 if references is None else rows[2].shape[1],
                height=height,
                width=width,
                steps=steps,
                guided_branches=branches,
                guidance_runs=runs,
                watched=watched,
                previewed=preview is not None,
                latents=output == "latent",
            )

        def sample(first: int, count: int, bar: tqdm.tqdm, seeds, ids, pictures=None, mask=None) -> jax.Array:
            latents, conditions = made.begin(
                self.params, seeds, ids, negative_ids, pictures, mask, (height, width), branches
            )
            for start, stop, guided in runs:
                chain, scale = (conditions, scales) if guided else (conditions[-1:], scales[:0])
                # If nobody looks, the run of steps is one program. Else the step before the newest is waited for.
                for now in range(start, stop, 1 if watched else stop - start):
                    after = now + 1 if watched else stop
                    before = latents
                    latents = made.advance(self.params, before, chain, scale, sigmas, now, after)
                    if watched:
                        jax.block_until_ready(before)
                        bar.update(first + count * now / steps - bar.n)
                    if preview is not None:
                        images = made.finish(self.params, made.estimate(before, latents, sigmas, now))
                        shown = self.batches.fetch(images, count, gather=gather)
                        preview(after, steps, {first + i: x for i, x in enumerate(shown) if x is not None})
            return latents if output == "latent" else made.finish(self.params, latents)

        out = self._in_batches(sample, rows, "image", progress=progress, gather=gather)
        if output == "pil":
            out = [None if item is None else Image.fromarray(item) for item in out]
        return out[0] if isinstance(prompt, str) else out

    def _texts(
        self,
        task: str,
        image: ImageLike | Sequence[ImageLike],
        words: Callable[[presets.Protocol, int], tuple[np.ndarray, np.ndarray]],
        *,
        seed: int | Sequence[int] = 0,
        steps: int | None = None,
        fast: bool | None = None,
        size: tuple[int, int] | None = None,
        aspect: str | float | None = None,
        output: str = "text",
        progress: bool | None = None,
        protocol: str | presets.Protocol | None = None,
        gather: bool = True,
    ) -> Any:
        """The text tasks; `words` gives a protocol's ids for a number of images, and which of them are known."""
        preset = self.protocol if protocol is None else presets.protocol(protocol)
        single = inputs.is_image(image)
        if not single:
            inputs.check_list(image, "image")
        images = [image] if single else list(image)
        if not images:
            raise ValueError("there is nothing to do: the list is empty")
        height, width = inputs.image_size(self.networks, self.size, size, aspect)
        seeds = inputs.check_seeds(seed, len(images))
        settled = preset.settle(task, steps=steps, fast=fast)
        steps, fast = settled["steps"], settled["fast"]
        inputs.check_number("steps", steps, 1, programs.MAX_STEPS, whole=True)
        inputs.check_choice("fast", fast, (True, False))
        inputs.check_choice("output", output, ("text", "array"))
        ids, known = words(preset, len(images))
        pictures = np.stack([inputs.pixels(item, height, width) for item in images])
        if gather:
            request = {"items": len(images), "height": height, "width": width, "steps": steps, "fast": fast}
            self.batches.check_same(makes="texts", **request, length=ids.shape[1])
        program = programs.text_program(
            self.networks, self.mesh, steps, fast, self.tokenizer.mask_id, self.tokenizer.end_id
        )

        def sample(first: int, count: int, bar: tqdm.tqdm, seeds, pictures, ids, known) -> jax.Array:
            return program(self.params, seeds, pictures, ids, known)

        rows = [seeds, pictures, ids, known]
        out = self._in_batches(sample, rows, "text", progress=progress, gather=gather)
        if output == "text":
            out = [
                None if row is None else self.tokenizer.decode(row[~prompt])
                for row, prompt in zip(out, known, strict=True)
            ]
        return out[0] if single else out

    def _in_batches(
        self, sample: Callable, rows: Sequence[np.ndarray], unit: str, *, progress: bool | None, gather: bool
    ) -> list[np.ndarray | None]:
        """Runs `sample(first item, items, bar, *placed rows)` on the batches of a request; the rows of its results."""
        count, made, out = len(rows[0]), [], []
        shown = (self.progress if progress is None else progress) and jax.process_index() == 0
        with tqdm.tqdm(total=count, unit=unit, disable=not shown, bar_format=_BAR) as bar, jax.set_mesh(self.mesh):

            def fetch():
                out.extend(self.batches.fetch(*made.pop(0), gather=gather))
                bar.update(max(len(out) - bar.n, 0))

            for start, stop, size in self.batches.cut(count):
                placed = [self.batches.place(array[start:stop], size) for array in rows]
                made.append((sample(start, stop - start, bar, *placed), stop - start))
                # A batch is fetched when the next one is on its way, so that the devices never wait.
                if len(made) > 1:
                    fetch()
            fetch()
        return out
