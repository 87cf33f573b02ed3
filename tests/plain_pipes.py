"""Pipelines as diffusers alone loads them, against which ours are held."""

from pathlib import Path
from typing import Any

import torch


def load(folder: Path) -> Any:
    """The pipeline of a folder, in float32 and without bars."""
    import diffusers

    diffusers.utils.logging.disable_progress_bar()
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe
