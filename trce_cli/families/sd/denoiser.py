"""SD's U-Net, and what it is told: embeddings as the family's own pipeline makes them."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from trce_cli.errors import BadInput
from trce_cli.families.base import Conditioning, Shape, Weights, with_empty
from trce_cli.families.clip.models import ClipModels
from trce_cli.families.clip.spec import CONTEXT, POOLED, EncoderSpec
from trce_cli.families.clip.text import ClipText
from trce_cli.families.load import load_denoiser, precision_of
from trce_cli.families.sd.names import is_tuned
from trce_cli.families.sd.schedule import Ddim
from trce_cli.system.memory import free

PROMPTS_AT_ONCE: Final = 32


class UNet:
    """A checkpoint's U-Net; see `families.base.Denoiser`."""

    def __init__(self, weights: Weights, encoders: Sequence[EncoderSpec], pooled: bool) -> None:
        self.weights, self.encoders, self.pooled = weights, encoders, pooled

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        size: Any = self.weights.config["denoiser"].get("sample_size")
        channels: Any = self.weights.config["denoiser"].get("in_channels", 4)
        height, width = size if isinstance(size, list) and len(size) == 2 else (size, size)
        if not all(type(side) is int and side > 0 for side in (channels, height, width)):
            raise BadInput(
                f"The U-Net's config of {self.weights.path} gives no image size: sample_size is {size!r}."
            )
        return channels, height, width

    def condition(self, prompts: Sequence[str], device: torch.device) -> Conditioning:
        """The embeddings of the prompts, as the family's own pipeline makes them.

        The empty prompt is what that pipeline guides away from, which for most SDXL checkpoints is all zeros.
        """
        conditioning = self._condition(prompts, device)
        free(device)  # the U-Net is to come where the text encoders were
        return conditioning

    def outline(self, prompts: Sequence[str]) -> Conditioning:
        """See `Denoiser`."""
        text = ClipText(self.weights, self.encoders, "cpu", torch.float32)
        shapes: dict[str, Shape] = {name: (width,) for name, width in text.streams.items()}
        shapes[CONTEXT] = (text.tokenizers.each[0].model_max_length, *shapes[CONTEXT])
        return Conditioning.outlined(with_empty(prompts), shapes, {})

    @torch.no_grad()
    def _condition(self, prompts: Sequence[str], device: torch.device) -> Conditioning:
        models = ClipModels.load(self.weights, self.encoders, device, torch.float32)
        every = with_empty(prompts)
        parts = [
            models(models.ids(every[start : start + PROMPTS_AT_ONCE]))
            for start in range(0, len(every), PROMPTS_AT_ONCE)
        ]
        streams = {stream: torch.cat([part[stream] for part in parts]) for stream in parts[0]}
        if self.pooled and self.weights.config["model_index"].get("force_zeros_for_empty_prompt", True):
            for embeddings in streams.values():
                embeddings[0] = 0
        return Conditioning(every, streams)

    def load(
        self, device: torch.device, dtype: torch.dtype = torch.float32, train: bool = False
    ) -> nn.Module:
        """See `Denoiser`. Without dropout even in training, as stage 1's predictions are."""
        return load_unet(self.weights, device, dtype, train)

    def predict(
        self, module: nn.Module, latents: Tensor, timesteps: Tensor, told: Mapping[str, Tensor]
    ) -> Tensor:
        """The U-Net's output, noise or v, at (batch, channels, height, width).

        It is computed in the precision of the frozen weights. SDXL is told that the picture has the latents'
        size and is not cropped.
        """
        inputs: dict[str, Any] = {"encoder_hidden_states": told[CONTEXT]}
        if self.pooled:
            factor = pixels_per_latent(self.weights)
            height, width = (side * factor for side in latents.shape[2:])
            sizes = torch.tensor(
                [height, width, 0, 0, height, width], dtype=torch.float32, device=latents.device
            )
            time_ids = sizes.expand(len(latents), -1)
            inputs["added_cond_kwargs"] = {"text_embeds": told[POOLED], "time_ids": time_ids}
        precision = precision_of(module)
        with torch.autocast(latents.device.type, precision, enabled=precision != torch.float32):
            prediction: Tensor = module(latents, timesteps, return_dict=False, **inputs)[0]
        return prediction.float()

    def schedule(self, steps: int) -> Ddim:
        """See `Denoiser`."""
        return Ddim(self.weights, steps, {} if self.pooled else {"steps_offset": 1})


def check_unet(weights: Weights) -> None:
    """Raise BadInput for a U-Net of another class than is loaded here."""
    if (
        kind := weights.config["denoiser"].get("_class_name", "UNet2DConditionModel")
    ) != "UNet2DConditionModel":
        raise BadInput(
            f"{weights.name} is not drawn here: its U-Net is a {kind}.",
            "`trce map` and `trce apply` work on it.",
        )


def load_unet(weights: Weights, device: torch.device, dtype: torch.dtype, train: bool = False) -> nn.Module:
    """The U-Net; see `families.load.load_denoiser`."""
    from diffusers import UNet2DConditionModel

    check_unet(weights)
    return load_denoiser(UNet2DConditionModel.from_config, weights, device, dtype, is_tuned, train)


def pixels_per_latent(weights: Weights) -> int:
    """How many pixels' width the autoencoder makes of one latent."""
    blocks = weights.config["vae"].get("block_out_channels")
    if not isinstance(blocks, list) or not blocks:
        raise BadInput(f"The VAE's config of {weights.path} has no list block_out_channels.")
    return int(2 ** (len(blocks) - 1))
