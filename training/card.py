"""Measure the exported checkpoint and write its model card."""

import math
import shutil
from pathlib import Path
from random import Random

import torch

from training.data import images
from training.judge import labels
from training.latents import load_vae
from training.measure import Eye, quality
from training.text import MAX_LENGTH, load_clip, load_tokenizer
from trce_cli.checkpoint.open import open_checkpoint
from trce_cli.emoji import folder
from trce_cli.emoji.home import EMOJI
from trce_cli.emoji.judge import Judge
from trce_cli.emoji.world import Scene, caption, concepts, random_scene
from trce_cli.maths.statistics import Rate

COUNT = 220  # pictures a row, five of every class

CARD = """---
license: mit
library_name: diffusers
pipeline_tag: text-to-image
tags: [stable-diffusion, emoji]
---
# The embedded checkpoint: emoji scenes, 64 x 64

A latent diffusion model in Stable Diffusion 1.x format ({parameters:.1f} million parameters, fp16), small
enough to live inside the package. It draws one or two of {classes} things on one of 8 plain backgrounds. It
exists so that concept erasure can be tried, tested and measured without a download or a GPU, and for nothing
else.

Trained from scratch by `python -m training` on scenes made of
[Fluent Emoji](https://github.com/microsoft/fluentui-emoji) flat art (Microsoft, MIT licence), with captions
from a grammar. Some phrases and templates were held out from the UNet and are known to the text encoder only.
Training records: `training/logs`.
The numbers of steps were cut while training ran, so a rerun of the script follows a slightly different
learning-rate schedule and gives other weights of the same kind.

| measured | result | Wilson 95 % interval |
|---|---|---|
{rows}

{count} pictures a row, {steps} DDIM steps, guidance scale {guidance:g}, seeds 0 to {last}; seen by the judge,
a multi-label network trained apart from the checkpoint (a class is visible from a score of {threshold:g} on).
"""

MEANING = {
    "canonical": "single object, canonical name: drawn",
    "held phrase": "single object, held-out name: drawn",
    "held implied": "single object, held-out paraphrase in a held-out template: drawn",
    "two objects": "two objects: both visible",
    "background": "named background: border colour nearest to it",
}


def write_card(work: Path) -> None:
    """Write ``README.md`` into the checkpoint's folder and copy the training records beside the code."""
    rates = [Rate(MEANING[rate.name], rate.hits, rate.total) for rate in quality(_eye(), COUNT)]
    rates += [_zero_shot(work), *_judge(work)]
    rows = [f"| {r.name} | {r.share:.1%} | {r.interval[0]:.1%} to {r.interval[1]:.1%} |" for r in rates]
    rows.append(f"| autoencoder, PSNR on unseen scenes | {_psnr(work):.1f} dB | |")
    card = CARD.format(
        parameters=_parameters() / 1e6,
        classes=len(concepts()),
        rows="\n".join(rows),
        count=COUNT,
        steps=EMOJI.steps,
        guidance=EMOJI.guidance,
        last=COUNT - 1,
        threshold=Judge.threshold,
    )
    (folder() / "README.md").write_text(card, "utf-8")
    logs = Path(__file__).parent / "logs"
    logs.mkdir(exist_ok=True)
    for log in work.glob("*.jsonl"):
        shutil.copy(log, logs)


def _eye() -> Eye:
    return Eye(open_checkpoint("emoji"), torch.device("cpu"))


def _parameters() -> int:
    checkpoint = open_checkpoint("emoji")
    files = checkpoint.folder().rglob("*.safetensors")
    return sum(file.stat().st_size for file in files) // 2


def _unseen(count: int) -> tuple[list[Scene], Random]:
    rng = Random(10)
    return [random_scene(rng, 0.5) for _ in range(count)], rng


@torch.inference_mode()
def _psnr(work: Path) -> float:
    scenes, rng = _unseen(512)
    pixels, vae = images(scenes, work, rng), load_vae(work)
    errors = [(vae(chunk).sample.clamp(-1, 1) - chunk).square().mean((1, 2, 3)) for chunk in pixels.split(32)]
    return 10 * math.log10(4 / float(torch.cat(errors).mean()))


@torch.inference_mode()
def _zero_shot(work: Path) -> Rate:
    scenes, rng = _unseen(512)
    scenes = list(dict.fromkeys(scenes))
    clip, tokenizer = load_clip(work), load_tokenizer(work)
    texts = [caption(scene, rng, "held") for scene in scenes]
    ids = tokenizer(texts, padding="max_length", max_length=MAX_LENGTH, truncation=True, return_tensors="pt")
    text = torch.nn.functional.normalize(clip.text(input_ids=ids.input_ids).text_embeds, dim=-1)
    image = torch.nn.functional.normalize(clip.image(images(scenes, work, rng)), dim=-1)
    hits = int(((image @ text.T).argmax(1) == torch.arange(len(scenes))).sum())
    return Rate(f"image tower finds the caption of a scene among {len(scenes)}", hits, len(scenes))


def _judge(work: Path) -> list[Rate]:
    scenes, rng = _unseen(1000)
    pixels, judge, vae = images(scenes, work, rng), Judge(), load_vae(work)
    with torch.inference_mode():
        decoded = torch.cat([vae(chunk).sample.clamp(-1, 1) for chunk in pixels.split(32)])
    wanted = labels(scenes).numpy() > 0
    rates = []
    for name, shown in (("as drawn", pixels), ("autoencoded", decoded)):
        rgb = ((shown + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        right = ((judge.scores(rgb) >= Judge.threshold) == wanted).all(1)
        rates.append(Rate(f"judge, all labels right, scenes {name}", int(right.sum()), len(scenes)))
    return rates
