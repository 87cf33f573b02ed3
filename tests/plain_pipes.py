"""Pipelines as diffusers alone loads them, against which ours are held."""

import json
from pathlib import Path
from typing import Any

import torch


def load(folder: Path) -> Any:
    """The pipeline of a folder, in float32 and without bars."""
    import diffusers

    diffusers.utils.logging.disable_progress_bar()
    index = json.loads((folder / "model_index.json").read_text())
    absent = {part: None for part in ("text_encoder_3", "tokenizer_3") if index.get(part) == [None, None]}
    pipe = diffusers.DiffusionPipeline.from_pretrained(
        folder, local_files_only=True, dtype=torch.float32, **absent
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
