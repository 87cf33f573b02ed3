"""Maps on live diffusers pipelines: a hook where prompts enter gives the doors M e for each text embedding e.

W (M e) = (W M) e, so the pictures are those of an edited checkpoint, and taking the hook off restores the
pipeline exactly: no weight is touched. Switching costs microseconds, a map in use two small products a step.
"""

from collections.abc import Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trce_cli.errors import BadInput
from trce_cli.families.base import Family
from trce_cli.maths.linear_map import LinearMap

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch.utils.hooks import RemovableHandle


class Hook:
    """What runs before the denoiser's entrance: the maps by stream, in float32, at their present strength."""

    def __init__(self, family: Family, streams: Mapping[str, LinearMap], strength: float) -> None:
        self.family, self.streams, self.strength = family, dict(streams), strength
        self.handle: RemovableHandle | None = None

    def __call__(
        self, entrance: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return self.family.mapped(args, kwargs, self._mapped)

    def _mapped(self, stream: str, embeddings: Tensor) -> Tensor:
        if stream not in self.streams:
            return embeddings
        wide = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))  # fp16 is too coarse
        linear = self.streams[stream] = self.streams[stream].to(wide.dtype, wide.device)
        return torch.add(wide, linear.moves(wide), alpha=self.strength).to(embeddings.dtype)


Hooks = MutableMapping[nn.Module, Hook]


def denoiser_of(family: Family, pipe: "DiffusionPipeline") -> nn.Module:
    """The part of a pipeline that maps act on; BadInput where it has none."""
    denoiser = getattr(pipe, family.denoiser, None)
    if not isinstance(denoiser, nn.Module):
        raise BadInput(f"{type(pipe).__name__} has no {family.denoiser}, so the map cannot be put on it.")
    return denoiser


def apply(
    hooks: Hooks,
    family: Family,
    streams: Mapping[str, LinearMap],
    denoiser: nn.Module,
    strength: float,
) -> None:
    """See `Map.apply_to`. hooks: those of the map, kept up here. streams: in float32."""
    if denoiser in hooks:
        hooks[denoiser].strength = strength
        return
    hook = Hook(family, streams, strength)
    # On weights a later map acts on embeddings first: W M_a M_b e.
    hook.handle = family.entrance(denoiser).register_forward_pre_hook(hook, prepend=True, with_kwargs=True)
    hooks[denoiser] = hook


def remove(hooks: Hooks, denoiser: nn.Module) -> None:
    """See `Map.remove_from`."""
    hook = hooks.pop(denoiser, None)
    if hook is not None and hook.handle is not None:
        hook.handle.remove()
