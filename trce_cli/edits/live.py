"""Maps on live diffusers pipelines: a hook on the U-Net gives it M e in place of each text embedding e.

W (M e) = (W M) e, so the pictures are those of an edited checkpoint, and taking the hook off restores the
pipeline exactly: no weight is touched. Switching costs microseconds, a map in use two small products a step.
"""

import math
from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trce_cli.errors import BadInput

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch.utils.hooks import RemovableHandle

CONTEXT = 2  # the place of encoder_hidden_states among the positional arguments of a U-Net


class Hook:
    """What runs before the U-Net: the map at its present strength."""

    def __init__(self, changes: list[Tensor | None], strength: float) -> None:
        self.changes = changes
        self.strength = strength
        self.handle: RemovableHandle | None = None

    def __call__(
        self, unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if len(args) > CONTEXT:
            args = (*args[:CONTEXT], self._mapped(args[CONTEXT], 0), *args[CONTEXT + 1 :])
        else:
            kwargs["encoder_hidden_states"] = self._mapped(kwargs["encoder_hidden_states"], 0)
        if self.changes[1] is not None:
            conditions = kwargs["added_cond_kwargs"]
            pooled = self._mapped(conditions["text_embeds"], 1)
            kwargs["added_cond_kwargs"] = {**conditions, "text_embeds": pooled}
        return args, kwargs

    def _mapped(self, embeddings: Tensor, which: int) -> Tensor:
        wide = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))  # fp16 is too coarse
        change = self.changes[which] = self.changes[which].to(wide)  # type: ignore[union-attr]
        return torch.add(wide, wide @ change.mT, alpha=self.strength).to(embeddings.dtype)


Hooks = MutableMapping[nn.Module, Hook]
Changes = tuple[Tensor, Tensor | None]  # of the context, and of the pooled embedding


def apply(hooks: Hooks, changes: Changes, pipe: "DiffusionPipeline", strength: float) -> None:
    """See `Map.apply_to`. hooks: those of the map, kept up here. changes: in float32."""
    check_strength(strength)
    unet = getattr(pipe, "unet", None)
    if unet is None:
        raise BadInput(f"{type(pipe).__name__} has no U-Net, so the map cannot be put on it.")
    if unet in hooks:
        hooks[unet].strength = strength
        return
    name = f"the {type(pipe).__name__}"
    context, pooled = changes
    check_width(len(context), unet.config.cross_attention_dim, name)
    if pooled is not None:
        sizes = 6 * unet.config.addition_time_embed_dim  # of SDXL's size, crop and target size
        pooled_width = unet.config.projection_class_embeddings_input_dim - sizes
        check_width(len(pooled), pooled_width, name, "pooled ")
    hook = Hook([context, pooled], strength)
    # On weights a later map acts on embeddings first: W M_a M_b e.
    hook.handle = unet.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)
    hooks[unet] = hook


def remove(hooks: Hooks, pipe: "DiffusionPipeline") -> None:
    """See `Map.remove_from`."""
    hook = hooks.pop(pipe.unet, None)
    if hook is not None and hook.handle is not None:
        hook.handle.remove()


def check_strength(strength: float) -> None:
    """BadInput unless it is finite and at least 0."""
    if not (math.isfinite(strength) and strength >= 0):
        raise BadInput(f"The strength must be finite and at least 0, not {strength:g}.")


def check_width(width: int, wanted: int, name: str, kind: str = "") -> None:
    """BadInput where a map of `width` meets embeddings of another."""
    if width != wanted:
        raise BadInput(f"The map is for {kind}embeddings of width {width}; those of {name} have {wanted}.")
