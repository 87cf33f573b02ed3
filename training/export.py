"""Write the trained parts as a Stable Diffusion 1.x folder in fp16, judge and image tower beside it."""

import json
import shutil
from pathlib import Path

import torch
from diffusers import DDIMScheduler
from safetensors.torch import load_file, save_file
from torch import Tensor

from training.latents import load_vae
from training.text import load_clip, load_text_encoder
from training.unet import NOISE_SCHEDULE, build_unet


def export(work: Path, weights: Path) -> None:
    """Write the diffusers folder ``weights``; beside it ``judge.safetensors`` and ``clip.safetensors``."""
    weights.mkdir(parents=True, exist_ok=True)
    vae = load_vae(work)
    vae.half().save_pretrained(weights / "vae")
    unet = build_unet()
    unet.load_state_dict(load_file(work / "unet.safetensors"))
    unet.half().save_pretrained(weights / "unet")
    scheduler = DDIMScheduler(**NOISE_SCHEDULE, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    scheduler.save_pretrained(weights / "scheduler")
    shutil.copytree(work / "tokenizer", weights / "tokenizer", dirs_exist_ok=True)
    _export_text_encoder(work, weights / "text_encoder")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.35.0",
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (weights / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", "utf-8")
    clip = load_clip(work)
    tower = {f"image.{k}": v for k, v in clip.image.state_dict().items()}
    tower["text_projection.weight"] = clip.text.text_projection.weight
    _save(tower, weights.parent / "clip.safetensors")
    _save(load_file(work / "judge.safetensors"), weights.parent / "judge.safetensors")


def _export_text_encoder(work: Path, folder: Path) -> None:
    """Old-style keys and configuration, which transformers 4 and 5 both load."""
    folder.mkdir(exist_ok=True)
    model = load_text_encoder(work)
    state = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in model.state_dict().items()}
    _save({k: v for k, v in state.items() if not k.endswith("position_ids")}, folder / "model.safetensors")
    config = model.config
    keys = [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "projection_dim",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
        "hidden_act",
        "layer_norm_eps",
        "attention_dropout",
        "initializer_range",
        "initializer_factor",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
    ]
    described = {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "torch_dtype": "float16",
    }
    described |= {key: getattr(config, key) for key in keys}
    (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n", "utf-8")


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    save_file(
        {k: v.detach().to(torch.float16).contiguous() for k, v in tensors.items()}, path, {"format": "pt"}
    )
    path.chmod(0o644)  # safetensors writes 0600 whatever the umask
