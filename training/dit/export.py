"""Write the trained parts as a Z-Image folder in fp16."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from training.dit.latents import load_vae
from training.dit.llm import LlmTask
from training.dit.transformer import TransformerTask
from training.loop import trained

SHIFT = 2.0  # of the sampling steps towards the noise, where it is decided what a picture shows
INDEX = {
    "_class_name": "ZImagePipeline",
    "_diffusers_version": "0.42.1",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Qwen3Model"],
    "tokenizer": ["transformers", "Qwen2Tokenizer"],
    "transformer": ["diffusers", "ZImageTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def export(work: Path, folder: Path) -> None:
    """Write the diffusers folder: of a run that is over, or of what there is of one that is going on."""
    llm: Any = trained(LlmTask(work), work)
    learner: Any = trained(TransformerTask(work), work)
    folder.mkdir(parents=True, exist_ok=True)
    llm.to(torch.float16).save_pretrained(folder / "text_encoder")
    learner.transformer.half().save_pretrained(folder / "transformer")
    load_vae().half().save_pretrained(folder / "vae")
    FlowMatchEulerDiscreteScheduler(shift=SHIFT).save_pretrained(folder / "scheduler")
    shutil.copytree(work / "tokenizer", folder / "tokenizer", dirs_exist_ok=True)
    (folder / "model_index.json").write_text(json.dumps(INDEX, indent=2) + "\n", "utf-8")
