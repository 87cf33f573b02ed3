"""Near bystanders apart from far ones, as the checkpoint's own text encoder has it."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from trce_cli.checkpoint.checkpoint import Checkpoint
from trce_cli.erase.moments import look
from trce_cli.prompts.presets import Preset
from trce_cli.prompts.suites import Suite, parts

NEAR, FAR = "near", "far"
SHARE = 3  # one subject in so many is near


def near_and_far(suite: Suite, presets: Sequence[Preset], checkpoint: Checkpoint) -> Suite:
    """The suite with its prompts in two groups: near the third of its subjects that lies closest.

    Closeness is the largest cosine of a subject's embedding to that of an unsafe phrase, at the slots that
    the family maps by default, around the mean of them all: a text encoder's embeddings have much in common.
    """
    assert suite.subjects is not None, "its prompts are about something that is known"
    subjects = list(dict.fromkeys(suite.subjects))
    unsafe = list(dict.fromkeys(concept.unsafe for part in parts(presets) for concept in part.concepts))
    text = checkpoint.family.text(checkpoint, "cpu", torch.float32)
    embedded = look(text, [*subjects, *unsafe], checkpoint.family.defaults.meaning).meanings
    embedded = torch.nn.functional.normalize(embedded - embedded.mean(0), dim=1)
    closeness = (embedded[: len(subjects)] @ embedded[len(subjects) :].T).amax(1)
    ranked = [subjects[place] for place in closeness.argsort(descending=True).tolist()]
    near = set(ranked[: -(-len(ranked) // SHARE)])
    return replace(suite, groups=tuple(NEAR if each in near else FAR for each in suite.subjects))
