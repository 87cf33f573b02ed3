"""What edits do to a checkpoint that they were not solved for: the figures to read before one trusts them."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from trce_cli.checkpoint.checkpoint import Checkpoint
from trce_cli.edits.edit import WeightEdit
from trce_cli.erase.map import door_changes
from trce_cli.erase.map_verdict import judge
from trce_cli.erase.moments import second_moments
from trce_cli.erase.prior import choose_prior
from trce_cli.erase.targets import embed_pairs
from trce_cli.prompts.pairs import PromptPair
from trce_cli.system.progress import Task, no_task

MAX_PAIRS: Final = 300  # enough for a figure, however many concepts a file claims


def concept_pairs(history: Sequence[Mapping[str, Any]]) -> list[PromptPair]:
    """The concepts that the entries of a history name, as bare phrases: the first `MAX_PAIRS` of them."""
    concepts = [
        (concept["unsafe"], concept["safe"])
        for entry in history
        for preset in entry["presets"]
        for concept in preset["concepts"]
    ]
    texts = [pair for pair in concepts if all(isinstance(text, str) and text for text in pair)]
    return [PromptPair(unsafe, safe, unsafe) for unsafe, safe in list(dict.fromkeys(texts))[:MAX_PAIRS]]


def measure(
    checkpoint: Checkpoint,
    edits: Mapping[str, WeightEdit],
    pairs: Sequence[PromptPair],
    task: Task = no_task,
) -> dict[str, Any]:
    """What the edits do to what enters by the main stream's doors, by the checkpoint's own text encoders.

    Plain JSON values. projected_cosine_to_safe: of what doors make of the unsafe embedding at the slots of
    the family's defaults, W' o, to what they make of the safe one, W n, before and after: mean over the
    doors, then mean and minimum of the slots; absent without pairs. canary_change: rms |W' c - W c| / rms
    |W c| over canary captions, mean and maximum by door. verdicts: see `map_verdict.judge`.
    """
    task("Checking the encoder", None, "")
    family = checkpoint.family
    text, stream = family.text(checkpoint, "cpu", torch.float32), family.streams[0]
    text.check()
    canaries = choose_prior(checkpoint).canaries
    moment = second_moments(text, canaries, task("Encoding canaries", len(canaries), "captions"))[stream]
    unsafe = safe = torch.zeros(0, len(moment), dtype=torch.float64)
    if pairs:
        weights = family.defaults.slots
        targets = embed_pairs(text, pairs, [weights]).targets(weights)[stream]
        unsafe, safe = (targets.embeddings[rows].double() for rows in (targets.unsafe, targets.safe))
    cosines: dict[str, list[Tensor]] = {"before": [], "after": []}

    def change(weight: Tensor, key: str) -> float:
        weight = weight.double()
        edited = edits[key](weight).double() if key in edits else weight
        weight, edited = weight[:, : len(moment)], edited[:, : len(moment)]
        for when, projection in (("before", weight), ("after", edited)):
            cosines[when].append(torch.cosine_similarity(unsafe @ projection.mT, safe @ weight.mT))
        size, moved = (float(((W @ moment) * W).sum()) for W in (weight, edited - weight))
        return (max(moved, 0) / size) ** 0.5 if size else 0.0

    report = task("Measuring", len(checkpoint.door_weights()[stream]), "layers")
    changes = door_changes(checkpoint, stream, change, report)
    figures: dict[str, Any] = {"pairs": len(pairs), "canaries": len(canaries)}
    if pairs:
        means = {when: torch.stack(found).mean(0) for when, found in cosines.items()}
        figures["projected_cosine_to_safe"] = {
            when: {"mean": float(found.mean()), "min": float(found.min())} for when, found in means.items()
        }
    figures |= {"canary_change": changes}
    return figures | {"verdicts": judge(figures)}
