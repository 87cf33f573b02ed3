"""The U-Net and what it is conditioned on, in one form for all families.

`Conditioning` holds the frozen text encoders' embeddings of all prompts of a run, so that the encoders need
not stay in memory; `load_unet` reads a U-Net weight by weight through the checkpoint, whatever its layout.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trce_cli.checkpoint.checkpoint import Checkpoint, read_json
from trce_cli.errors import BadInput, first_line
from trce_cli.system.memory import free

if TYPE_CHECKING:
    from diffusers import DDIMScheduler

EMPTY = ""  # the prompt of unconditional predictions
PROMPTS_AT_ONCE = 32

# The visual side of the attention: all of self-attention, and the queries of cross-attention.
_TRAINABLE = re.compile(r"(.+\.)?(attn1\..+|attn2\.to_q\..+)")


def is_trainable(key: str) -> bool:
    """Whether stage 2 tunes this weight; cross-attention's keys and values stay as stage 1 left them."""
    return _TRAINABLE.fullmatch(key) is not None


@dataclass(frozen=True)
class Conditioning:
    """What the U-Net sees of each prompt, as the family's pipeline gives it, empty prompt included.

    context: (prompts, tokens, width). For SDXL also pooled: (prompts, pooled width), and time_ids: (6,), the
    size and crop of an image as it was trained. All float32.
    """

    prompts: tuple[str, ...]
    context: Tensor
    pooled: Tensor | None = None
    time_ids: Tensor | None = None

    def rows(self, prompts: Sequence[str]) -> Tensor:
        """The rows of these prompts, int64."""
        return torch.tensor([self.prompts.index(prompt) for prompt in prompts])

    def inputs(self, rows: Tensor) -> dict[str, Any]:
        """The U-Net's keyword arguments for a batch of these rows."""
        rows = rows.to(self.context.device)
        inputs: dict[str, Any] = {"encoder_hidden_states": self.context[rows]}
        if self.pooled is not None and self.time_ids is not None:
            time_ids = self.time_ids.expand(len(rows), -1)
            inputs["added_cond_kwargs"] = {"text_embeds": self.pooled[rows], "time_ids": time_ids}
        return inputs


def predict(
    unet: nn.Module, latents: Tensor, timesteps: Tensor, conditioning: Conditioning, rows: Tensor
) -> Tensor:
    """The U-Net's output, noise or v, at (batch, channels, height, width); timesteps, rows: (batch,).

    It is computed in the precision of the frozen weights; float32 comes out.
    """
    precision = next(parameter.dtype for parameter in unet.parameters() if not parameter.requires_grad)
    with torch.autocast(latents.device.type, precision, enabled=precision != torch.float32):
        prediction: Tensor = unet(latents, timesteps, return_dict=False, **conditioning.inputs(rows))[0]
    return prediction.float()


def encode(checkpoint: Checkpoint, prompts: Sequence[str], device: torch.device) -> Conditioning:
    """The embeddings of the prompts, and of the empty one, by the `encode_prompt` of the family's own
    pipeline.

    The empty prompt is what that pipeline guides away from, which for most SDXL checkpoints is all zeros.
    """
    conditioning = _encode(checkpoint, prompts, device)
    free(device)  # the U-Net is to come where the text encoders were
    return conditioning


@torch.no_grad()
def _encode(checkpoint: Checkpoint, prompts: Sequence[str], device: torch.device) -> Conditioning:
    pipeline = _text_pipeline(checkpoint, device)
    every = tuple(dict.fromkeys((EMPTY, *prompts)))
    context, pooled = [], []
    for start in range(0, len(every), PROMPTS_AT_ONCE):
        batch = list(every[start : start + PROMPTS_AT_ONCE])
        encoded = pipeline.encode_prompt(
            prompt=batch, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        context.append(encoded[0].float())
        pooled += [encoded[2].float()] if checkpoint.family.pooled else []
    conditioning = Conditioning(every, torch.cat(context))
    if not checkpoint.family.pooled:
        return conditioning
    if pipeline.config.force_zeros_for_empty_prompt:
        context[0][0], pooled[0][0] = 0, 0
    height, width = (side * pixels_per_latent(checkpoint) for side in latent_shape(checkpoint)[1:])
    time_ids = torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32, device=device)
    return Conditioning(every, torch.cat(context), torch.cat(pooled), time_ids)


def _text_pipeline(checkpoint: Checkpoint, device: torch.device) -> Any:
    """The family's pipeline with nothing in it but tokenizers and text encoders."""
    import diffusers
    import transformers

    transformers.logging.set_verbosity_error()
    diffusers.logging.set_verbosity_error()
    parts: dict[str, Any] = {"vae": None, "unet": None, "scheduler": None}
    for spec, tokenizer, encoder in zip(
        checkpoint.family.encoders,
        checkpoint.load_tokenizers(),
        checkpoint.load_text_encoders(device, torch.float32),
        strict=True,
    ):
        parts |= {spec.tokenizer: tokenizer, spec.folder: encoder}
    if checkpoint.family.pooled:
        index = read_json(checkpoint.config_folder / "model_index.json")
        zeros = index.get("force_zeros_for_empty_prompt", True)
        return diffusers.StableDiffusionXLPipeline(
            **parts, force_zeros_for_empty_prompt=zeros, add_watermarker=False
        )
    return diffusers.StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )


def latent_shape(checkpoint: Checkpoint) -> tuple[int, int, int]:
    """(channels, height, width) of a latent image of the size that the U-Net was trained with."""
    size: Any = checkpoint.unet_config.get("sample_size")
    channels: Any = checkpoint.unet_config.get("in_channels", 4)
    height, width = size if isinstance(size, list) and len(size) == 2 else (size, size)
    if not all(type(side) is int and side > 0 for side in (channels, height, width)):
        raise BadInput(
            f"The U-Net's config of {checkpoint.path} gives no image size: sample_size is {size!r}."
        )
    return channels, height, width


def pixels_per_latent(checkpoint: Checkpoint) -> int:
    """How many pixels' width the autoencoder makes of one latent."""
    blocks = read_json(checkpoint.config_folder / "vae/config.json").get("block_out_channels")
    if not isinstance(blocks, list) or not blocks:
        raise BadInput(f"The VAE's config of {checkpoint.path} has no list block_out_channels.")
    return int(2 ** (len(blocks) - 1))


def ddim(checkpoint: Checkpoint, steps: int) -> "DDIMScheduler":
    """DDIM with the checkpoint's noise schedule and prediction type, set to `steps` steps.

    As the pipelines do, never clips, and for SD takes a steps_offset of 1.
    """
    from diffusers import DDIMScheduler

    config = read_json(checkpoint.config_folder / "scheduler/scheduler_config.json")
    offset = {} if checkpoint.family.pooled else {"steps_offset": 1}
    try:
        scheduler = DDIMScheduler.from_config(config, clip_sample=False, **offset)
        scheduler.set_timesteps(steps)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise BadInput(
            f"{checkpoint.name} cannot be sampled with {steps} DDIM steps: {first_line(error)}"
        ) from error
    if int(scheduler.timesteps.max()) >= scheduler.config.num_train_timesteps:
        raise BadInput(f"{checkpoint.name} cannot be sampled with as many as {steps} DDIM steps.")
    return scheduler


def load_unet(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype = torch.float32, train: bool = False
) -> nn.Module:
    """The checkpoint's U-Net on `device` in `dtype`; nothing else of the checkpoint is read.

    With `train` the weights of `is_trainable` are float32 and require gradients, and no others do. Raises
    BadInput for a weight that is missing, has another shape than config.json asks for, or is not finite.
    """
    from diffusers import UNet2DConditionModel

    try:
        with torch.device("meta"):
            unet: nn.Module = UNet2DConditionModel.from_config(dict(checkpoint.unet_config))
    except (ValueError, TypeError, AttributeError) as error:
        raise BadInput(
            f"The U-Net's config of {checkpoint.path} cannot be used: {first_line(error)}"
        ) from error
    state = {}
    for key, parameter in unet.named_parameters():
        if key not in checkpoint.unet[0].tensors:
            raise BadInput(f"The U-Net of {checkpoint.path} lacks the weight {key}.")
        weight = checkpoint.read(key)
        if weight.shape != parameter.shape:
            raise BadInput(
                f"{key} in {checkpoint.path} has shape {list(weight.shape)}; its config asks for "
                f"{list(parameter.shape)}."
            )
        _check_finite(checkpoint, key, weight)
        state[key] = weight.to(device, torch.float32 if train and is_trainable(key) else dtype)
    unet.load_state_dict(state, assign=True)
    unet.eval().requires_grad_(False)  # no dropout: predictions are compared with those of stage 1
    if train:
        for parameter in trainable(unet).values():
            parameter.requires_grad_(True)
    return unet


def check_finite(checkpoint: Checkpoint) -> None:
    """Raise BadInput for a weight of the U-Net that is not finite; one tensor is in memory at a time."""
    for key in checkpoint.unet[0].tensors:
        _check_finite(checkpoint, key, checkpoint.read(key))


def _check_finite(checkpoint: Checkpoint, key: str, weight: Tensor) -> None:
    if not bool(torch.isfinite(weight).all()):
        raise BadInput(f"{key} in {checkpoint.path} holds NaN or infinite values.")


def trainable(unet: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that stage 2 tunes, by name."""
    return {key: parameter for key, parameter in unet.named_parameters() if is_trainable(key)}


def check_same_model(teacher: Checkpoint, erased: Checkpoint) -> None:
    """Raise BadInput where `erased` cannot have been made from `teacher`: another architecture, text or
    schedule.

    Reads headers, configs and the text encoders; computes nothing.
    """
    hint = "--teacher is the original from which the erased checkpoint was made."
    shapes = [{key: one.shape(key) for key in one.unet[0].tensors} for one in (teacher, erased)]
    configs = [
        {key: value for key, value in one.unet_config.items() if not key.startswith("_")}
        for one in (teacher, erased)
    ]
    if teacher.family != erased.family:
        difference = f"it is {teacher.family.name}, and {erased.name} is {erased.family.name}"
    elif shapes[0] != shapes[1] or configs[0] != configs[1]:
        difference = f"its U-Net is of another architecture than that of {erased.name}"
    elif teacher.text_encoder_hash() != erased.text_encoder_hash():
        difference = f"its text encoder is not that of {erased.name}"
    elif _schedule(teacher) != _schedule(erased):
        difference = f"its noise schedule or prediction type is not that of {erased.name}"
    else:
        return
    raise BadInput(f"{teacher.name} cannot be the teacher: {difference}.", hint)


def _schedule(checkpoint: Checkpoint) -> dict[str, Any]:
    scheduler = ddim(checkpoint, 1)
    return {
        "betas": scheduler.betas.tolist(),
        "prediction": scheduler.config.prediction_type,
        "spacing": scheduler.config.timestep_spacing,
    }
