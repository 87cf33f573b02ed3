"""Maps on live diffusers pipelines: a hook where prompts enter gives the doors M e for each text embedding e.

W (M e) = (W M) e, so the pictures are those of an edited checkpoint, and taking the hook off restores the
pipeline exactly: no weight is touched. Switching costs microseconds, a map in use two small products a step.
"""

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from trce_cli.errors import BadInput, TrceError
from trce_cli.families.base import Family
from trce_cli.maths.linear_map import LinearMap

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class Hook:
    """What runs before the denoiser's entrance: the maps by stream, in float32, at their present strength.

    map_id: of the map that it is of.
    """

    def __init__(
        self, map_id: str, family: Family, streams: Mapping[str, LinearMap], strength: float
    ) -> None:
        self.map_id, self.family = map_id, family
        self.streams, self.strength = dict(streams), strength

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


def denoiser_of(family: Family, pipe: "DiffusionPipeline") -> nn.Module:
    """The part of a pipeline that maps act on, as it was before compilation; BadInput without one."""
    denoiser = getattr(pipe, family.denoiser, None)
    if not isinstance(denoiser, nn.Module):
        raise BadInput(f"{type(pipe).__name__} has no {family.denoiser}, so the map cannot be put on it.")
    while isinstance(inner := getattr(denoiser, "_orig_mod", None), nn.Module):
        torch.compiler.reset()  # what was compiled knows the hooks of then
        denoiser = inner
    return denoiser


def hooks_of(family: Family, denoiser: nn.Module, map_id: str) -> dict[int, Hook]:
    """The map's hooks by their numbers: found on the module itself, for a copy of one has copies of them."""
    hooks = family.entrance(denoiser)._forward_pre_hooks
    return {
        number: hook for number, hook in hooks.items() if isinstance(hook, Hook) and hook.map_id == map_id
    }


def apply(
    map_id: str, family: Family, streams: Mapping[str, LinearMap], denoiser: nn.Module, strength: float
) -> None:
    """See `Map.apply_to`. map_id: of the map. streams: in float32."""
    if found := hooks_of(family, denoiser, map_id):
        for hook in found.values():
            hook.strength = strength
        return
    # On weights a later map acts on embeddings first: W M_a M_b e.
    hook = Hook(map_id, family, streams, strength)
    family.entrance(denoiser).register_forward_pre_hook(hook, prepend=True, with_kwargs=True)


def remove(map_id: str, family: Family, denoiser: nn.Module) -> None:
    """See `Map.remove_from`."""
    entrance = family.entrance(denoiser)
    for number in hooks_of(family, denoiser, map_id):
        del entrance._forward_pre_hooks[number]
        entrance._forward_pre_hooks_with_kwargs.pop(number, None)


_ADAPTED: Final = ".base_layer."  # in the name of a weight that PEFT has put an adapter on


def _check_plain(denoiser: nn.Module, weights: Mapping[str, Tensor], keys: Collection[str]) -> None:
    """Raise BadInput where the weights of these names are not all that acts in their places."""
    if any(getattr(module, "fused_projections", False) for module in denoiser.modules()):
        raise BadInput("No map is folded into fused projections.", "Call unfuse_qkv_projections() before.")
    for key in keys:
        if (weight := weights.get(key)) is None:
            raise BadInput(
                f"An adapter lies on {key}, so no map is folded in.",
                "Take it off before, with unload_lora_weights(); where it is to stay, after fuse_lora().",
            )
        if weight.is_meta:
            raise BadInput(f"{key} is offloaded, so no map is folded in.", "Fold it in before offloading.")
        if not weight.is_floating_point() or weight.itemsize < 2:
            raise BadInput(f"{key} is stored as {weight.dtype}, so no map is folded in.")


@torch.no_grad()
def bake(family: Family, streams: Mapping[str, LinearMap], pipe: "DiffusionPipeline") -> None:
    """See `Map.bake_into`."""
    denoiser: Any = denoiser_of(family, pipe)
    config = {"denoiser": dict(denoiser.config)}
    for part in family.weight_parts:
        of: Any = getattr(getattr(pipe, part, None), "config", {})
        config[part] = of.to_dict() if hasattr(of, "to_dict") else dict(of)
    weights = dict(denoiser.named_parameters())
    doors = family.doors(config, [name.replace(_ADAPTED, ".") for name in weights])
    found = {key: door.stream for door in doors if door.stream in streams for key in door.weights}
    _check_plain(denoiser, weights, found)
    edited = {key: streams[stream].edit(weights[key].double().cpu()) for key, stream in found.items()}
    for key, value in edited.items():
        if not bool(value.to(weights[key].dtype).isfinite().all()):
            raise TrceError(f"The map gives values in {key} that {weights[key].dtype} cannot hold.")
    for key, value in edited.items():
        weights[key].copy_(value)
