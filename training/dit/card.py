"""Measure an exported `emoji-dit` and write its model card."""

from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.nn.functional as F

from training.card import MEANING
from training.dit.llm import LlmTask, dialogues
from training.loop import trained
from training.measure import Eye, quality
from trce_cli.checkpoint.open import open_checkpoint
from trce_cli.emoji.home import EMOJI_DIT
from trce_cli.emoji.judge import Judge
from trce_cli.emoji.world import caption, concepts, random_scene
from trce_cli.maths.statistics import Rate

COUNT = 220  # pictures a row, five of every class

CARD = """---
license: mit
library_name: diffusers
pipeline_tag: text-to-image
tags: [z-image, emoji]
---
# emoji-dit: emoji scenes, 64 x 64, in Z-Image's format

A flow-matching transformer in Z-Image format ({parameters:.1f} million parameters, fp16): a Qwen3 text
encoder with a chat template, `ZImageTransformer2DModel`, and the autoencoder of `emoji`. It draws one or two
of {classes} things on one of 8 plain backgrounds, for trying and measuring concept erasure, and for nothing
else.

Trained from scratch by `python -m training.dit` on scenes made of
[Fluent Emoji](https://github.com/microsoft/fluentui-emoji) flat art (Microsoft, MIT licence), with captions
from a grammar. The text encoder was trained as a language model, to answer a caption with what it shows in
canonical words; the transformer on its states, all of them alike. In training each image token of a middle
layer is also asked which class stands there and on what background; what answers is left out here. Some
phrases and templates were held out from the transformer and are known to the text encoder only.

| measured | result | Wilson 95 % interval |
|---|---|---|
{rows}

{count} pictures a row, {steps} Euler steps, guidance scale {guidance:g}, seeds 0 to {last}; seen by the
judge, a multi-label network trained apart from the checkpoint (a class is visible from a score of
{threshold:g} on).
"""


def measure(work: Path, folder: Path, count: int, seed: int = 0) -> Iterator[Rate]:
    """How well an exported checkpoint draws, a rate a suite, and how well its language model answers."""
    eye = Eye(open_checkpoint(str(folder)), torch.device("cpu"), EMOJI_DIT.steps, EMOJI_DIT.guidance)
    for rate in quality(eye, count, seed):
        yield Rate(MEANING[rate.name], rate.hits, rate.total)
    yield answers(work)


def write_card(work: Path, folder: Path, count: int = COUNT) -> None:
    """Write ``README.md`` into the checkpoint's folder."""
    rates = list(measure(work, folder, count))
    rows = [f"| {r.name} | {r.share:.1%} | {r.interval[0]:.1%} to {r.interval[1]:.1%} |" for r in rates]
    card = CARD.format(
        parameters=sum(file.stat().st_size for file in folder.rglob("*.safetensors")) / 2e6,
        classes=len(concepts()),
        rows="\n".join(rows),
        count=count,
        steps=EMOJI_DIT.steps,
        guidance=EMOJI_DIT.guidance,
        last=count - 1,
        threshold=Judge.threshold,
    )
    (folder / "README.md").write_text(card, "utf-8")


@torch.inference_mode()
def answers(work: Path, count: int = 500) -> Rate:
    """How many unseen captions, held-out phrases among them, the language model answers without an error."""
    rng = Random(10)
    scenes = [random_scene(rng, 0.5) for _ in range(count)]
    ids, labels = dialogues(work, [(caption(scene, rng, "held"), scene) for scene in scenes])
    model: Any = trained(LlmTask(work), work)
    right = 0
    for given, wanted in zip(ids.split(50), labels.split(50), strict=True):
        states = model(input_ids=given[:, :-1]).last_hidden_state
        likeliest = F.linear(states, model.embed_tokens.weight).argmax(-1)
        fits = (likeliest == wanted[:, 1:]) | (wanted[:, 1:] < 0)
        right += int(fits.all(1).sum())
    return Rate("language model: caption answered, every word right", right, count)
