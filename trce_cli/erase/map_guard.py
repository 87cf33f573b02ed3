"""What edits do to a checkpoint that they were not solved for: the figures to read before one trusts them."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, Final

import torch
from torch import Tensor

from trce_cli.checkpoint.checkpoint import Checkpoint
from trce_cli.edits.edit import WeightEdit
from trce_cli.erase.map import Stage, embed_pairs, no_stage
from trce_cli.erase.moments import second_moments
from trce_cli.erase.prior import choose_prior
from trce_cli.families.clip.embedder import Embedder
from trce_cli.prompts.pairs import PromptPair

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
    stage: Stage = no_stage,
) -> dict[str, Any]:
    """What the edits do to keys and values, by the checkpoint's own text encoders; plain JSON values.

    cosine_to_safe: of the unsafe first EoT's keys and values, W' o, to those of the safe one, W n, before and
    after: mean over the layers, then mean and minimum of the pairs; absent without pairs. canary_change: rms
    |W' c - W c| / rms |W c| over canary captions, mean and maximum by layer.
    """
    stage("Checking the text encoder", None, "")
    embedder = Embedder.of(checkpoint, "cpu", torch.float32)
    canaries = choose_prior(checkpoint).canaries
    moment = second_moments(embedder, canaries, stage("Encoding canaries", len(canaries), "captions")).context
    unsafe = safe = torch.zeros(0, embedder.dim, dtype=torch.float64)
    if pairs:
        targets = embed_pairs(embedder, pairs, []).eots
        unsafe, safe = (targets.embeddings[rows].double() for rows in (targets.unsafe, targets.safe))
    cosines: dict[str, list[Tensor]] = {"before": [], "after": []}
    changes: dict[str, list[float]] = {"keys": [], "values": []}
    keys = checkpoint.projection_keys()
    report = stage("Measuring", len(keys), "layers")
    for key in keys:
        weight = checkpoint.read(key).double()
        edited = edits[key](weight).double() if key in edits else weight
        for when, projection in (("before", weight), ("after", edited)):
            cosines[when].append(torch.cosine_similarity(unsafe @ projection.mT, safe @ weight.mT))
        change = edited - weight
        size = float(((weight @ moment) * weight).sum())
        moved = float(((change @ moment) * change).sum())
        changes["keys" if ".to_k." in key else "values"].append(
            (max(moved, 0) / size) ** 0.5 if size else 0.0
        )
        report(1)
    figures: dict[str, Any] = {"pairs": len(pairs), "canaries": len(canaries)}
    if pairs:
        means = {when: torch.stack(found).mean(0) for when, found in cosines.items()}
        figures["cosine_to_safe"] = {
            when: {"mean": float(found.mean()), "min": float(found.min())} for when, found in means.items()
        }
    figures["canary_change"] = {
        kind: {"mean": fmean(found), "max": max(found)} for kind, found in changes.items()
    }
    return figures
