"""How long an edit will take, told before, by a short piece of the real work; writes nothing."""

from collections.abc import Mapping
from typing import Any

import torch

from trce_cli.checkpoint.checkpoint import Checkpoint
from trce_cli.edits.estimate import copy_seconds
from trce_cli.edits.outputs import Outputs
from trce_cli.erase.moments import is_cached, seconds_each
from trce_cli.erase.prior import Prior
from trce_cli.erase.vocabulary import asked_words
from trce_cli.images.estimate import pace
from trce_cli.images.plan import plan_images
from trce_cli.images.settings import DrawSettings
from trce_cli.prompts.files import Prompt

BACKWARD = 3  # a training step takes about three times an evaluation: forward, and twice that back
GUIDED = 2  # evaluations a denoising step, with guidance


def solving_seconds(
    checkpoint: Checkpoint, prior: Prior, word_prompts: int, prompts: int, device: torch.device
) -> float:
    """About how long encoding for stage 1 takes, but for what is cached; some captions and words are encoded.

    word_prompts, prompts: how many there are of words, and of the pairs, which are as short.
    """
    family = checkpoint.family
    text = family.text(checkpoint, device, torch.float32)
    each = seconds_each(text, prior.captions)
    captions = (prior.captions, prior.canaries, prior.bystanders)
    found = sum(each * len({*some}) for some in captions if some and not is_cached(text, some))
    if words := asked_words(text, word_prompts).prompts if word_prompts else []:
        each = seconds_each(text, words)
        found += 0.0 if is_cached(text, words, family.defaults.meaning) else each * len(words)
    return found + each * prompts


def map_seconds(
    checkpoint: Checkpoint,
    planned: Mapping[str, Any],
    prior: Prior,
    outputs: Outputs,
    device: torch.device,
) -> float:
    """About how long `trce map` takes: encoding, hashing the checkpoint, and writing it edited."""
    doors = [key for weights in checkpoint.door_weights().values() for key in weights]
    edits = {key: lambda weight: weight @ weight.mT.matmul(weight) for key in doors}
    count, prompts = planned["word_prompts"], planned["distinct_prompts"]
    encoding = planned["clip_skip"] * solving_seconds(checkpoint, prior, count, prompts, device)
    return encoding + copy_seconds(checkpoint, outputs, edits)


def steer_seconds(checkpoint: Checkpoint, planned: Mapping[str, Any], device: torch.device) -> float:
    """About how long stage 2 takes, by what a denoising step takes; a picture is drawn in a few steps.

    planned: as `steer.estimate` has it.
    """
    (record,) = plan_images([Prompt("a photo of a cat")], {"image": checkpoint}, DrawSettings())
    drawn = pace(checkpoint, record, device, "float32")
    counts = dict(planned["evaluations"])
    training = BACKWARD * counts.pop("training")
    return 2 * drawn.load + (sum(counts.values()) + training) * drawn.step / GUIDED
