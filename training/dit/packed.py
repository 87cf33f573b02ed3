"""A forward pass of ``ZImageTransformer2DModel`` for a batch of one shape: the same numbers, less work.

diffusers' own pass takes lists, pads each entry for itself and turns queries and keys as complex numbers; at
this size that costs several times what the matrices do.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ZImageTransformer2DModel
from torch import Tensor, nn

MULTIPLE = 32  # captions are padded to a multiple of it
PATCH = 2
Block = Callable[[Any, Tensor, Tensor, Tensor | None], Tensor]


def padded(length: int) -> int:
    """The number of positions that a caption of so many tokens takes."""
    return -(-length // MULTIPLE) * MULTIPLE


def velocity(
    model: ZImageTransformer2DModel,
    latents: Tensor,
    time: Tensor,
    states: Tensor,
    lengths: Tensor,
    depth: int,
    run: Block | None = None,
) -> tuple[Tensor, Tensor]:
    """What the model predicts, data minus noise, and its image tokens after `depth` main layers.

    latents: (batch, channels, height, width); time: (batch,), 0 noise to 1 data; states: the captions'
    (batch, length, width), length a multiple of 32, as height * width / 4 is; lengths: (batch,), tokens of
    each that are real; run: `block`, or it compiled. The tokens are (batch, height / 2 * width / 2, dim).
    """
    run = run or block
    batch, channels, height, width = latents.shape
    rows, columns = height // PATCH, width // PATCH
    length = states.shape[1]
    c = model.t_embedder(time * model.t_scale)
    text_turn, image_turn = _turns(model, length, rows, columns)
    x = latents.view(batch, channels, rows, PATCH, columns, PATCH).permute(0, 2, 4, 3, 5, 1)
    x = model.all_x_embedder["2-1"](x.reshape(batch, rows * columns, PATCH * PATCH * channels))
    for layer in model.noise_refiner:
        x = run(layer, x, image_turn, c)
    text = model.cap_embedder(states)
    real = torch.arange(length) < lengths[:, None]
    text = torch.where(real[..., None], text, model.cap_pad_token.to(text.dtype))
    for layer in model.context_refiner:
        text = run(layer, text, text_turn, None)
    x = torch.cat([x, text.to(x.dtype)], 1)
    turn = torch.cat([image_turn, text_turn], 2)
    seen = x
    for index, layer in enumerate(model.layers):
        x = run(layer, x, turn, c)
        if index + 1 == depth:
            seen = x[:, : rows * columns]
    x = model.all_final_layer["2-1"](x[:, : rows * columns], c)
    x = x.view(batch, rows, columns, PATCH, PATCH, channels).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(latents.shape), seen


def block(layer: Any, x: Tensor, turn: Tensor, c: Tensor | None) -> Tensor:
    """One block on (batch, length, dim), modulated by the time where `c` (batch, width) says it."""
    if c is None:
        scales = gates = (None, None)
    else:
        scale, gate, scale_mlp, gate_mlp = layer.adaLN_modulation(c)[:, None].chunk(4, 2)
        scales, gates = (scale, scale_mlp), (gate, gate_mlp)
    a, f = layer.attention, layer.feed_forward
    y = _scaled(layer.attention_norm1, x, scales[0])
    q, k, v = F.linear(y, torch.cat([a.to_q.weight, a.to_k.weight, a.to_v.weight])).chunk(3, 2)
    q, k, v = (each.unflatten(2, (a.heads, -1)).transpose(1, 2) for each in (q, k, v))
    q, k = _turned(_normed(a.norm_q, q), turn), _turned(_normed(a.norm_k, k), turn)
    # Written out: at this size the backward pass of the fused kernel took a third of a step on a CPU.
    y = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).softmax(-1).to(v.dtype) @ v
    y = a.to_out[0](y.transpose(1, 2).flatten(2))
    x = _added(x, _normed(layer.attention_norm2, y), gates[0])
    y = _scaled(layer.ffn_norm1, x, scales[1])
    one, three = F.linear(y, torch.cat([f.w1.weight, f.w3.weight])).chunk(2, 2)
    return _added(x, _normed(layer.ffn_norm2, f.w2(F.silu(one) * three)), gates[1])


def _normed(norm: Any, x: Tensor) -> Tensor:
    return F.rms_norm(x.float(), x.shape[-1:], norm.weight, norm.eps)


def _scaled(norm: nn.Module, x: Tensor, scale: Tensor | None) -> Tensor:
    y = _normed(norm, x)
    return y if scale is None else y * (1 + scale)


def _added(x: Tensor, y: Tensor, gate: Tensor | None) -> Tensor:
    return x + (y if gate is None else gate.tanh() * y)


def _turned(x: Tensor, turn: Tensor) -> Tensor:
    """Rotate pairs of (batch, heads, length, dim) by the cosines and sines (2, 1, length, dim / 2)."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = turn
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


def _turns(model: ZImageTransformer2DModel, length: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the text's positions and of the image's, which stand behind it."""
    text = model.create_coordinate_grid((length, 1, 1), (1, 0, 0)).flatten(0, 2)
    image = model.create_coordinate_grid((1, rows, columns), (length + 1, 0, 0)).flatten(0, 2)
    return tuple(  # type: ignore[return-value]
        torch.view_as_real(model.rope_embedder(places)).permute(2, 0, 1)[:, None] for places in (text, image)
    )
