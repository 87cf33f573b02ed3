"""Weights into modules, strictly: nothing is left at random values."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from trce_cli.errors import BadInput, first_line
from trce_cli.families.base import Weights
from trce_cli.system.safetensors import all_finite


def load_strictly(
    make: Callable[[dict[str, Any]], nn.Module],
    weights: Weights,
    part: str,
    device: torch.device | str,
    dtype: Callable[[str], torch.dtype],
) -> nn.Module:
    """The module that `make` makes of a part's configuration, in evaluation mode and without gradients.

    dtype: of each weight by its name. Raises BadInput for a configuration that cannot be used and for a
    weight that is missing, of another shape than the configuration asks for, or not finite.
    """
    config: Mapping[str, Any] = weights.config[part]
    try:
        with torch.device("meta"):
            module = make(dict(config))
    except (ValueError, TypeError, AttributeError) as error:
        where = weights.folder(part) / "config.json"
        raise BadInput(f"{where} cannot be used: {first_line(error)}") from error
    state = {}
    for key, parameter in module.named_parameters():
        weight = weights.read(part, key)
        if weight.shape != parameter.shape:
            raise BadInput(
                f"{key} in the {part} of {weights.path} has shape {list(weight.shape)}; its config.json asks "
                f"for {list(parameter.shape)}."
            )
        if not all_finite(weight):
            raise BadInput(f"{key} in the {part} of {weights.path} holds NaN or infinite values.")
        state[key] = weight.to(device, dtype(key))
    module.load_state_dict(state, assign=True)
    return module.eval().requires_grad_(False)
