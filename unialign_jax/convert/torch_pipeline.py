"""A public pipeline directory run by PyTorch: transformers' T5, diffusers' autoencoder, scheduler and SD3 blocks.

What is exported is compared with this (`torch_check`), and PyTorch users may start from it. It needs the extra
`unialign_jax[convert]`; nothing else of the package imports it.
"""

import json
import pathlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention import JointTransformerBlock
from diffusers.models.embeddings import PatchEmbed, TimestepEmbedding, Timesteps
from diffusers.models.normalization import AdaLayerNormContinuous
from torch import nn
from transformers import T5EncoderModel

from unialign_jax.convert import configs
from unialign_jax.convert.errors import ConversionError

LAST_TIME = 1e-5  # where the times of the text sampler end


class _Time(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.timestep_embedder = TimestepEmbedding(in_channels=256, time_embed_dim=width)


class _Adapter(nn.Module):
    def __init__(self, width: int, hidden: int, out: int):
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, out))


class SD3JointModelFlexible(ModelMixin, ConfigMixin):
    """The transformer from diffusers' parts, with the public class's name and tensor names."""

    @register_to_config
    def __init__(
        self,
        sample_size: int,
        patch_size: int,
        in_channels: int,
        num_layers: int,
        attention_head_dim: int,
        num_attention_heads: int,
        joint_attention_dim: int,
        caption_projection_dim: int,
        out_channels: int,
        pos_embed_max_size: int,
        vocab_size: int = 32100,
        adapter_hidden: int = 2048,
        semantic_dim: int = 3584,
        qk_norm: str | None = None,
        **kwargs,
    ):
        super().__init__()
        width = attention_head_dim * num_attention_heads
        self.pos_embed = PatchEmbed(
            sample_size, sample_size, patch_size, in_channels, width, pos_embed_max_size=pos_embed_max_size
        )
        self.null_image_embd = nn.Parameter(torch.zeros(1, 8, width))
        self.time_proj = Timesteps(num_channels=256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_text_embed = _Time(width)
        self.context_embedder = nn.Linear(joint_attention_dim, caption_projection_dim)
        self.transformer_blocks = nn.ModuleList(
            JointTransformerBlock(
                width, num_attention_heads, attention_head_dim, context_pre_only=False, qk_norm=qk_norm
            )
            for _ in range(num_layers)
        )
        self.image_norm_out = AdaLayerNormContinuous(width, width, elementwise_affine=False, eps=1e-6)
        self.image_proj_out = nn.Linear(width, patch_size * patch_size * out_channels)
        self.text_norm_out = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.text_proj_out = nn.Linear(width, vocab_size)
        self.siglip_adapter_img, self.siglip_adapter_text = (
            _Adapter(width, adapter_hidden, semantic_dim) for _ in range(2)
        )

    def forward(
        self,
        latents: torch.Tensor,
        text_states: torch.Tensor,
        timesteps: torch.Tensor,
        references: Sequence[torch.Tensor] = (),
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`[B, C, H, W]`, `[B, T, E]`, `[B]` in [0, 1000] -> velocity `[B, C, H, W]` and logits `[B, T, V]`."""
        patch = self.config.patch_size
        rows, columns = latents.shape[2] // patch, latents.shape[3] // patch
        image = torch.cat([self.pos_embed(x) for x in (latents, *references)], dim=1)
        text = self.context_embedder(text_states)
        time = self.time_text_embed.timestep_embedder(self.time_proj(timesteps).to(text.dtype))
        for block in self.transformer_blocks:
            text, image = block(hidden_states=image, encoder_hidden_states=text, temb=time)
        image = self.image_proj_out(self.image_norm_out(image[:, : rows * columns], time))
        image = image.reshape(len(image), rows, columns, patch, patch, -1)
        velocity = torch.einsum("bhwpqc->bchpwq", image).reshape(len(image), -1, rows * patch, columns * patch)
        return velocity, self.text_proj_out(self.text_norm_out(text))


class PixelCodec:
    """The codec of small models, pixels rearranged; `config` as in its `vae/config.json`."""

    def __init__(self, config: dict):
        self.patch, self.scale, self.shift = config["patch"], config["scaling_factor"], config["shift_factor"]

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """`[B, 3, H, W]` -> scaled latents `[B, 3 p p, H / p, W / p]`."""
        x = nn.functional.pixel_unshuffle(images, self.patch)  # channels: colour, row, column
        x = x.unflatten(1, (3, self.patch**2)).transpose(1, 2).flatten(1, 2)  # row, column, colour
        return (x - self.shift) * self.scale

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        x = (latents / self.scale + self.shift).unflatten(1, (self.patch**2, 3)).transpose(1, 2).flatten(1, 2)
        return nn.functional.pixel_shuffle(x, self.patch)


class _Autoencoder:
    def __init__(self, directory: pathlib.Path):
        self.module = AutoencoderKL.from_pretrained(directory).float().eval()

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        config = self.module.config
        return (self.module.encode(images).latent_dist.mean - config.shift_factor) * config.scaling_factor

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        config = self.module.config
        return self.module.decode(latents / config.scaling_factor + config.shift_factor).sample


class TorchPipeline:
    """The samplers of the public pipeline in float32. Arrays in and out are NumPy's, images channels last.

    Args:
      directory: a public pipeline directory.

    Raises:
      ConversionError: a part of it is missing.
    """

    def __init__(self, directory: str | pathlib.Path):
        directory = pathlib.Path(directory)
        if absent := [part for part in ("transformer", "text_encoder", "vae") if not (directory / part).is_dir()]:
            raise ConversionError(f"{directory} holds no {', no '.join(absent)}; expected a UniAlignment pipeline")
        self.transformer = SD3JointModelFlexible.from_pretrained(directory / "transformer").float().eval()
        self.text_encoder = T5EncoderModel.from_pretrained(directory / "text_encoder").float().eval()
        file = directory / "vae" / "config.json"
        self.codec = (
            PixelCodec(json.loads(file.read_text())) if configs.is_pixel_codec(file) else _Autoencoder(file.parent)
        )
        self.scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(directory / "scheduler")

    @torch.no_grad()
    def sample_image(
        self,
        noise: np.ndarray,
        ids: np.ndarray,
        negative_ids: np.ndarray,
        references: np.ndarray | None,
        *,
        steps: int,
        guidance: float,
    ) -> np.ndarray:
        """The published image sampler.

        Args:
          noise: `[B, h, w, C]`.
          ids, negative_ids: `[B, T]` and `[T]`.
          references: uint8 `[B, N, H, W, 3]`, or None.
          steps, guidance: Euler steps, classifier-free guidance.

        Returns:
          Scaled latents float32 `[B, h, w, C]`.
        """
        clean = [] if references is None else [self._encode(x) for x in np.moveaxis(references, 1, 0)]
        full, negative = self._states(ids), self._states(negative_ids[None]).expand(len(ids), -1, -1)
        latents = torch.from_numpy(np.moveaxis(np.asarray(noise), -1, 1).copy())
        self.scheduler.set_timesteps(steps)
        for time in self.scheduler.timesteps:
            times = time.expand(len(latents))
            weak, strong = (self.transformer(latents, states, times, clean)[0] for states in (negative, full))
            latents = self.scheduler.step(weak + guidance * (strong - weak), time, latents).prev_sample
        return np.moveaxis(latents.numpy(), 1, -1)

    @torch.no_grad()
    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Scaled latents `[B, h, w, C]` -> uint8 `[B, H, W, 3]`."""
        pixels = self.codec.decode(torch.from_numpy(np.moveaxis(latents, -1, 1).copy())).clamp(-1, 1)
        return np.moveaxis(((pixels + 1) * 127.5).round().to(torch.uint8).numpy(), 1, -1)

    @torch.no_grad()
    def sample_text(
        self,
        images: np.ndarray,
        ids: np.ndarray,
        known: np.ndarray,
        uniforms: Callable[[int], np.ndarray],
        *,
        steps: int,
        mask_id: int,
        end_id: int,
    ) -> np.ndarray:
        """The published text sampler; everything after the first end token that is not the prompt's is cut.

        Args:
          images: uint8 `[B, H, W, 3]`.
          ids, known: `[B, T]`, a prompt's tokens and where they stand.
          uniforms: step -> `[B, T, V]`.
          steps, mask_id, end_id: number of times; ids of the tokenizer.

        Returns:
          `[B, T]`.
        """
        latents, times = self._encode(images), torch.zeros(len(images))
        known = torch.from_numpy(known)
        x = torch.where(known, torch.from_numpy(ids).long(), mask_id)

        def log_probs(x):
            logits = self.transformer(latents, self._states(x), times)[1]
            logits[..., mask_id] -= 1e6
            certain = torch.full_like(logits, -1e6).scatter_(-1, x[..., None], 0.0)
            return torch.where((x == mask_id)[..., None], logits.log_softmax(-1), certain)

        cache = None
        width = (1 - LAST_TIME) / steps
        for step, time in enumerate(torch.linspace(1, LAST_TIME, steps + 1)[:-1]):
            cache = log_probs(x).exp() if cache is None else cache
            q = cache * (time - (time - width))
            q[..., mask_id] = time - width
            drawn = (q / (1e-10 - torch.log(torch.from_numpy(uniforms(step)) + 1e-10))).argmax(-1)
            drawn = torch.where(x == mask_id, drawn, x)
            if not torch.equal(drawn, x):
                cache = None
            x = drawn
        x = log_probs(x).argmax(-1)
        is_end = (x == end_id) & ~known
        ended = (is_end.cumsum(1) - is_end.long()) > 0
        return torch.where(ended & ~known, end_id, x).numpy()

    def _states(self, ids: np.ndarray | torch.Tensor) -> torch.Tensor:
        return self.text_encoder(torch.as_tensor(ids).long()).last_hidden_state

    def _encode(self, images: np.ndarray) -> torch.Tensor:
        return self.codec.encode(torch.from_numpy(np.moveaxis(images, -1, 1) / 127.5 - 1).float())
