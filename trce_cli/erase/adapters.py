"""What stage 2 trains where a rank is asked for: a LoRA on what it would tune (arXiv 2106.09685)."""

import math
import re
from collections.abc import Callable

import torch
from torch import nn

from trce_cli.checkpoint.checkpoint import Checkpoint
from trce_cli.edits.edit import LowRank

_NAME = "default"  # PEFT's own, of the one adapter that a layer has


def add_adapters(module: nn.Module, is_tuned: Callable[[str], bool], rank: int, seed: int) -> None:
    """Freeze a denoiser, and give each linear layer whose weight stage 2 tunes factors to be trained.

    W x becomes W x + up down x, factors in float32. down is random, the same of a seed on every device; up is
    zero, so that the denoiser predicts what it did.
    """
    from peft import LoraConfig, inject_adapter_in_model

    layers = [
        name
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and is_tuned(f"{name}.weight")
    ]
    # As one pattern of whole names: a list would also match what ends so.
    names = "|".join(map(re.escape, layers))
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=names), module)
    generator = torch.Generator().manual_seed(seed)
    for layer in layers:
        down, up = (module.get_parameter(f"{layer}.lora_{part}.{_NAME}.weight") for part in "AB")
        random = torch.empty(down.shape)
        nn.init.kaiming_uniform_(random, math.sqrt(5), generator=generator)  # as PEFT has it
        down.data = random.to(down.device)
        up.data = torch.zeros_like(up, dtype=torch.float32)


def take_adapters(module: nn.Module) -> dict[str, LowRank]:
    """Take the factors off a denoiser, which is then what it was: by the names of the weights they add to."""
    from peft.tuners.lora import LoraLayer

    found: dict[str, LowRank] = {}
    for name, layer in list(module.named_modules()):
        if isinstance(layer, LoraLayer):
            up, down = (part[_NAME].weight.detach().cpu() for part in (layer.lora_B, layer.lora_A))
            found[f"{name}.weight"] = LowRank(up, down)
            module.set_submodule(name, layer.get_base_layer())
    return found


def all_numbers(checkpoint: Checkpoint) -> int:
    """How many numbers a checkpoint's denoiser has."""
    return sum(math.prod(checkpoint.shape("denoiser", key)) for key in checkpoint.keys("denoiser"))


def frozen_numbers(checkpoint: Checkpoint, rank: int | None) -> int:
    """How many of them stage 2 leaves as they are: beside a LoRA all."""
    return all_numbers(checkpoint) - (trained_numbers(checkpoint, None) if rank is None else 0)


def trained_numbers(checkpoint: Checkpoint, rank: int | None) -> int:
    """How many numbers stage 2 trains of a checkpoint: of its weights, or of the factors of a LoRA."""
    keys = [key for key in checkpoint.keys("denoiser") if checkpoint.family.tuned(key)]
    shapes = [checkpoint.shape("denoiser", key) for key in keys]
    if rank is None:
        return sum(map(math.prod, shapes))
    return rank * sum(sum(shape) for shape in shapes if len(shape) == 2)
