"""SD's diffusers pipelines: loaded strictly, called, and given schedulers."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
import torch
from PIL import Image

from trce_cli.errors import BadInput, refusing
from trce_cli.families.base import Canvas, Weights, check_vae
from trce_cli.families.clip.load import load_text_encoders, load_tokenizers
from trce_cli.families.clip.spec import EncoderSpec, max_clip_skip
from trce_cli.families.load import load_strictly, quiet_libraries
from trce_cli.families.sd.denoiser import check_unet, load_unet
from trce_cli.families.sd.schedule import check_scheduler, own_scheduler

_EDITED: Final = "`trce map` and `trce apply` work on it."  # a hint where nothing is drawn
# What diffusers' pipelines of Stable Diffusion ask of a scheduler.
_OF_PIPELINES: Final = ("init_noise_sigma", "order", "scale_model_input", "set_timesteps", "step")


def canvas(weights: Weights, encoders: Sequence[EncoderSpec]) -> Canvas:
    """See `Family.canvas`."""
    _check_drawn(weights)
    blocks = weights.config["vae"].get("block_out_channels")
    sample = weights.config["denoiser"].get("sample_size")
    size = sample if isinstance(sample, list) else [sample, sample]
    steps = weights.config["scheduler"].get("num_train_timesteps", 1000)
    counts = all(type(number) is int and number > 0 for number in (*size, steps))
    if not counts or not isinstance(blocks, list) or not blocks:
        raise BadInput(f"The configs of {weights.name} do not say what size of picture it draws.")
    factor = 2 ** (len(blocks) - 1)  # pixels a latent
    return Canvas(
        width=size[-1] * factor,
        height=size[0] * factor,
        multiple=math.lcm(8, factor),  # diffusers' pipelines insist on 8
        max_steps=steps - 1,  # SD's schedules begin at 1, and end before the last
        max_clip_skip=max_clip_skip(weights.config, encoders),
    )


def _check_drawn(weights: Weights) -> None:
    if (channels := weights.config["denoiser"].get("in_channels", 4)) != 4:
        does = "fills in" if channels == 9 else "is given"
        raise BadInput(
            f"{weights.name} {does} pictures (its U-Net takes {channels} channels): not drawn here.", _EDITED
        )
    check_unet(weights)
    check_vae(weights)
    if (kind := weights.config["vae"].get("_class_name", "AutoencoderKL")) != "AutoencoderKL":
        raise BadInput(f"{weights.name} is not drawn here: its VAE is an {kind}.", _EDITED)


def load(
    weights: Weights,
    pipeline: str,
    encoders: Sequence[EncoderSpec],
    device: torch.device,
    dtype: torch.dtype,
) -> Any:
    """See `Family.pipe`.

    Every part with weights is loaded by ourselves: the libraries leave weights that they do not find at
    random values. The autoencoder decodes one image at a time, which bounds the memory.
    """
    import diffusers

    quiet_libraries()
    _check_drawn(weights)
    texts = load_text_encoders(weights, encoders, device, dtype)
    parts: dict[str, Any] = dict(zip((spec.folder for spec in encoders), texts, strict=True))
    parts |= zip((spec.tokenizer for spec in encoders), load_tokenizers(weights, encoders), strict=True)
    if pipeline == "StableDiffusionXLPipeline":
        parts |= {"add_watermarker": False}
    else:
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    parts["unet"] = load_unet(weights, device, dtype)
    parts["vae"] = load_strictly(
        diffusers.AutoencoderKL.from_config, weights, "vae", device, lambda key: dtype
    )
    with refusing(f"{weights.name} cannot be loaded"):
        made = own_scheduler(weights.config)
        parts["scheduler"] = made.from_config(dict(weights.config["scheduler"]))
        if not all(hasattr(parts["scheduler"], name) for name in _OF_PIPELINES):
            raise BadInput(
                f"{weights.name} is not drawn here: its scheduler is {made.__name__}, which is none of "
                f"diffusers' {pipeline}.",
                _EDITED,
            )
        pipe = getattr(diffusers, pipeline).from_pretrained(weights.folder(), local_files_only=True, **parts)
    pipe.set_progress_bar_config(disable=True)
    pipe.vae.enable_slicing()
    return pipe.to(device)


def scheduler(pipe: Any, wanted: str, offset: Mapping[str, int]) -> Any:
    """See `Family.scheduler`. wanted: diffusers' class. offset: what DDIM adds to its timesteps."""
    import diffusers

    if type(pipe.scheduler).__name__ == wanted:
        return pipe.scheduler
    made, config = getattr(diffusers, wanted), pipe.scheduler.config
    check_scheduler(type(pipe.scheduler), config, made)
    plain: dict[str, Any] = {}
    if wanted == "PNDMScheduler":
        plain = {"skip_prk_steps": True}  # PLMS as in SD's configs: no warm-up steps
    elif wanted in ("DDIMScheduler", "DDPMScheduler"):
        # Where the config comes from another scheduler, their defaults are those of models of pixels.
        plain = {"clip_sample": False}
        if wanted == "DDIMScheduler" and offset:
            plain |= {**offset, "set_alpha_to_one": config.get("set_alpha_to_one", False)}
    return made.from_config(config, **plain)


def draw(
    pipe: Any,
    prompts: Sequence[str],
    negative: Sequence[str] | None,
    generators: Sequence[torch.Generator],
    *,
    width: int,
    height: int,
    **settings: Any,
) -> Any:
    """See `Family.draw`; settings: of diffusers' pipelines."""
    factor = pipe.vae_scale_factor
    shape = (1, pipe.unet.config.in_channels, height // factor, width // factor)
    latents = torch.cat([torch.randn(shape, generator=generator) for generator in generators])
    return pipe(
        list(prompts),
        # Without one the pipeline is left to its default, which for SDXL is not the empty prompt's embedding.
        negative_prompt=None if negative is None else list(negative),
        width=width,
        height=height,
        generator=list(generators),
        latents=latents.to(pipe.unet.device, pipe.unet.dtype),
        output_type="np",
        **settings,
    ).images


def redraw(pipe: Any, picture: Image.Image, mask: Image.Image | None, **settings: Any) -> np.ndarray:
    """See `families.base.Redraw`; settings: of diffusers' pipelines.

    Of the pipeline's own parts: `from_pipe` would convert them to float32. Where there is a mask, latents
    outside of it are the picture's after every step.
    """
    import diffusers

    task = "Img2Img" if mask is None else "Inpaint"
    if mask is not None:
        settings |= {"mask_image": mask, "width": picture.width, "height": picture.height}
    kind = getattr(diffusers, type(pipe).__name__.replace("Pipeline", f"{task}Pipeline"))
    how = {"requires_safety_checker": False}
    if "XL" in kind.__name__:
        empty = "force_zeros_for_empty_prompt"
        how = {"add_watermarker": False, empty: pipe.config[empty]}
    redrawing = kind(**pipe.components, **how)
    redrawing.set_progress_bar_config(disable=True)
    (found,) = redrawing(image=picture, output_type="np", **settings).images
    return found


@contextmanager
def skipping(pipe: Any, clip_skip: int) -> Iterator[None]:
    """With the text encoder's last `clip_skip` - 1 layers left out, the final norm kept.

    So web UIs have it, for the negative prompt as well; diffusers' own `clip_skip` is of the prompt alone.
    """
    encoder = getattr(pipe.text_encoder, "text_model", pipe.text_encoder).encoder
    layers = encoder.layers
    encoder.layers = layers[: len(layers) + 1 - clip_skip]
    try:
        yield
    finally:
        encoder.layers = layers


@torch.no_grad()
def latents(pipe: Any, images: np.ndarray) -> torch.Tensor:
    """See `Family.latents`: the mode of the autoencoder's distribution, scaled as the U-Net was trained."""
    pixels = torch.from_numpy(images.copy()).permute(0, 3, 1, 2) / 127.5 - 1
    encoded = pipe.vae.encode(pixels.to(pipe.vae.device, pipe.vae.dtype)).latent_dist.mode()
    found: torch.Tensor = encoded.float() * pipe.vae.config.scaling_factor
    return found
