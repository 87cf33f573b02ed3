"""The transformer: flow matching on the white latents, conditioned on the frozen language model."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ZImageTransformer2DModel
from torch import Tensor, nn

from training.dit import packed
from training.dit.latents import load_latents
from training.dit.llm import WIDTH, LlmTask
from training.dit.words import PAD, load_tokenizer, prompt
from training.loop import Recipe, trained
from trce_cli.emoji.world import BACKGROUNDS, Scene, caption, concepts

CAPTION_DROPOUT = 0.1
SIGMA_MEAN = 0.5  # of the logit of the noise's share: what a picture shows is decided where it is high
DEPTH = 3  # main layers after which image tokens are asked what they are to show
ASKED = 0.2  # weight of that question in the loss
SIDE = 8  # image tokens, both ways
RECIPE = Recipe(
    steps=1_300,
    batch_size=64,
    lr=2e-3,
    warmup=150,
    decay=0.25,
    ema=0.998,
    muon=("attention.to_", "feed_forward."),
)


def build_transformer() -> ZImageTransformer2DModel:
    """The untrained model."""
    return ZImageTransformer2DModel(
        in_channels=4,
        dim=192,
        n_layers=6,
        n_refiner_layers=1,
        n_heads=3,
        n_kv_heads=3,
        cap_feat_dim=WIDTH,
        axes_dims=[16, 24, 24],
        axes_lens=[1024, 32, 32],
    )


class Learner(nn.Module):
    """The transformer, and in training a question about its middle layer, as REPA aligns one (2410.06940).

    Each image token is asked for the class that stands there and for the background. What answers is left
    out of the checkpoint.
    """

    def __init__(self) -> None:
        super().__init__()
        self.transformer = build_transformer()
        self.classes = nn.Linear(self.transformer.dim, len(concepts()))
        self.background = nn.Linear(self.transformer.dim, len(BACKGROUNDS))


@dataclass(frozen=True)
class TransformerTask:
    """Velocity prediction; the noise's share is drawn logit-normal."""

    work: Path
    recipe: Recipe = RECIPE
    name: str = "transformer"

    def build(self) -> nn.Module:
        return Learner()

    def loss(self, model: Any, count: int, seed: int) -> tuple[Tensor, dict[str, float]]:
        rng = Random(seed)
        generator = torch.Generator().manual_seed(seed)
        latents, scenes = _data(self.work)
        chosen, tokens = _batch(self.work, scenes, rng, count)
        states, lengths = encode(self.work, tokens)
        shown = [scenes[index] for index in chosen]
        z = latents[chosen].float()
        noise = torch.randn(z.shape, generator=generator)
        sigma = torch.sigmoid(torch.randn(count, generator=generator) + SIGMA_MEAN)
        level = sigma[:, None, None, None]
        with torch.autocast("cpu", torch.bfloat16):
            predicted, seen = packed.velocity(
                model.transformer,
                z.lerp(noise, level),
                1 - sigma,
                states,
                lengths,
                DEPTH,
                _compiled() if states.shape[1] == packed.MULTIPLE else None,
            )
            classes, background = model.classes(seen).float(), model.background(seen).float()
        error = (predicted.float() - (z - noise)).square().mean()
        what, where = what_stands_where(shown)
        named = F.cross_entropy(classes.flatten(0, 1), what.flatten(), ignore_index=-100)
        behind = F.cross_entropy(background.flatten(0, 1), where.flatten())
        wrong = (classes.detach().argmax(-1) != what)[what >= 0].float().mean()
        parts = {"velocity": float(error.detach()), "named": float(named.detach()), "wrong": float(wrong)}
        return error + ASKED * (named + behind), parts


def what_stands_where(scenes: list[Scene]) -> tuple[Tensor, Tensor]:
    """The class at each image token, -100 where it is mostly background, and the background's number.

    Both int64 (scenes, tokens), tokens row by row.
    """
    order, colours = list(concepts()), list(BACKGROUNDS)
    what = torch.full((len(scenes), SIDE, SIDE), -100)
    where = torch.empty(len(scenes), SIDE * SIDE, dtype=torch.long)
    for row, back, scene in zip(what, where, scenes, strict=True):
        numbers = [order.index(name) for name in scene.objects]
        back[:] = colours.index(scene.background)
        if len(numbers) == 1:
            row[1:7, 1:7] = numbers[0]
        else:
            row[2:6, :4], row[2:6, 4:] = numbers[0], numbers[1]
    return what.flatten(1), where


def _batch(work: Path, scenes: list[Scene], rng: Random, count: int) -> tuple[list[int], list[list[int]]]:
    """Scenes, and the tokens of a caption of each, all of them of one padded length.

    The first drawn says which length, so that each has its share of the batches.
    """
    tokenizer = load_tokenizer(work / "tokenizer")
    chosen: list[int] = []
    tokens: list[list[int]] = []
    while len(chosen) < count:
        drawn = [rng.randrange(len(scenes)) for _ in range(count)]
        texts = ["" if rng.random() < CAPTION_DROPOUT else caption(scenes[index], rng) for index in drawn]
        for index, ids in zip(drawn, tokenizer([prompt(text) for text in texts]).input_ids, strict=True):
            if not tokens or packed.padded(len(ids)) == packed.padded(len(tokens[0])):
                chosen.append(index)
                tokens.append(ids)
    return chosen[:count], tokens[:count]


@torch.no_grad()
def encode(work: Path, tokens: list[list[int]]) -> tuple[Tensor, Tensor]:
    """The states that a Z-Image pipeline hands over, (count, padded length, width), and their lengths."""
    model, pad = _encoder(work)
    length = max(packed.padded(len(ids)) for ids in tokens)
    ids = torch.tensor([row + [pad] * (length - len(row)) for row in tokens])
    with torch.autocast("cpu", torch.bfloat16):
        states = model(input_ids=ids).last_hidden_state  # padding stands behind, where nothing looks
    return states.float(), torch.tensor([len(row) for row in tokens])


@cache
def _encoder(work: Path) -> tuple[Any, int]:
    """The language model without its last layer and norm, as `hidden_states[-2]` is; the padding's token."""
    model: Any = trained(LlmTask(work), work)
    model.layers = model.layers[:-1]
    model.config.num_hidden_layers -= 1
    model.norm = nn.Identity()
    return model, load_tokenizer(work / "tokenizer").convert_tokens_to_ids(PAD)


@cache
def _compiled() -> packed.Block:
    """A block in half the time, after minutes for the first; longer captions are too few to compile for."""
    # With vectors of 512 bits torch 2.13's backward pass of it was NaN on one of two machines.
    options: dict[str, Any] = {"cpp.simdlen": 256}
    compiled: packed.Block = torch.compile(packed.block, dynamic=False, options=options)
    return compiled


@cache
def _data(work: Path) -> tuple[Tensor, list[Scene]]:
    return load_latents(work)
