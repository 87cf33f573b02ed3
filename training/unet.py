"""The UNet: epsilon-prediction on the whitened latents, conditioned on the frozen text encoder."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn

from training.latents import load_latents
from training.loop import Recipe
from training.text import MAX_LENGTH, load_text_encoder, load_tokenizer
from trce_cli.emoji.networks import WIDTH
from trce_cli.emoji.world import Scene, caption

CAPTION_DROPOUT = 0.1
WORD_DROPOUT = 0.2  # share of captions read from their EoT on only, so that the EoT's meaning is relied on
# Stable Diffusion 1.x's own noise schedule.
NOISE_SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
}

Encode = Callable[[list[str]], tuple[Tensor, Tensor]]


def build_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 96, 128),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        attention_head_dim=4,
        cross_attention_dim=WIDTH,
    )


@dataclass(frozen=True)
class UNetTask:
    """Noise prediction with the min-SNR-5 weighting (arXiv 2303.09556)."""

    work: Path
    recipe: Recipe
    name: str = "unet"

    def build(self) -> nn.Module:
        return build_unet()

    def loss(self, model: nn.Module, count: int, seed: int) -> tuple[Tensor, dict[str, float]]:
        rng = Random(seed)
        generator = torch.Generator().manual_seed(seed)
        latents, scenes, encode, schedule = _parts(self.work)
        chosen = [rng.randrange(len(scenes)) for _ in range(count)]
        z = latents[chosen].float()
        texts = ["" if rng.random() < CAPTION_DROPOUT else caption(scenes[i], rng) for i in chosen]
        noise = torch.randn(z.shape, generator=generator)
        timesteps = torch.randint(schedule.config.num_train_timesteps, (count,), generator=generator)
        snr = schedule.alphas_cumprod[timesteps] / (1 - schedule.alphas_cumprod[timesteps])
        with torch.autocast("cpu", torch.bfloat16):
            context, ids = encode(texts)
            context = _drop_words(context, ids, rng)
            predicted = model(schedule.add_noise(z, noise, timesteps), timesteps, context).sample
        error = (predicted.float() - noise).square().mean((1, 2, 3))
        return (error * (5 / snr).clamp(max=1)).mean(), {"mse": float(error.detach().mean())}


def _drop_words(context: Tensor, ids: Tensor, rng: Random) -> Tensor:
    """Put the last padding position's embedding in place of a caption's words; (batch, length, width)."""
    context = context.clone()
    for row, tokens in zip(context, ids.tolist(), strict=True):
        if rng.random() < WORD_DROPOUT:
            row[1 : tokens.index(tokens[-1])] = row[-1]
    return context


@cache
def _parts(work: Path) -> tuple[Tensor, list[Scene], Encode, DDPMScheduler]:
    tensors, scenes = load_latents(work)
    tokenizer, encoder = load_tokenizer(work), load_text_encoder(work)

    @torch.no_grad()
    def encode(texts: list[str]) -> tuple[Tensor, Tensor]:
        ids = tokenizer(
            texts, padding="max_length", truncation=True, max_length=MAX_LENGTH, return_tensors="pt"
        ).input_ids
        return encoder(input_ids=ids).last_hidden_state, ids

    return tensors["latents"], scenes, encode, DDPMScheduler(**NOISE_SCHEDULE)
