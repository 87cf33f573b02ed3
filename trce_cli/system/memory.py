"""Memory of models that are done with."""

import gc
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def free(device: "torch.device") -> None:
    """Give back the memory of models that nothing refers to any more, before the next one is loaded.

    Text encoders, and with them pipelines, hold themselves in cycles, so that they do not go of themselves.
    """
    import torch

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
