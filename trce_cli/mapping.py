"""Stage 1 as one function: prompt pairs and a prior -> the text map, with the figures that guard it."""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from trce_cli.checkpoint import Checkpoint
from trce_cli.closed_form import CUT_OFF, TextMap, TextMapFitter
from trce_cli.embed import SOT, Embedder
from trce_cli.errors import BadInput, TrceError
from trce_cli.families import POOLED_KEY
from trce_cli.moments import second_moments
from trce_cli.prior import Prior
from trce_cli.prompts import PromptPair
from trce_cli.settings import SLOTS, Settings, distinct_prompts

# An edit that takes the targets less than this share of their way has erased nothing.
LEAST_MOVE: Final = 1e-4
# Embeddings closer than this, as a share of their length, are one embedding and the rounding of float32.
SAME: Final = 1e-4

Report = Callable[[int], None]
Stage = Callable[[str, int | None, str], Report]  # text, total, unit -> what is told the number just done


def no_stage(text: str, total: int | None = None, unit: str = "") -> Report:
    """The progress of those who do not want one."""
    return lambda count: None


@dataclass(frozen=True)
class Solution:
    """The maps at the chosen strength, and the guards' figures as plain JSON values.

    text_map: of the text embeddings that the cross-attention sees. pooled_map: of SDXL's pooled embedding;
    None where that is not mapped.
    """

    text_map: TextMap
    pooled_map: TextMap | None
    figures: dict[str, Any]


def solve(
    checkpoint: Checkpoint,
    pairs: Sequence[PromptPair],
    prior: Prior,
    settings: Settings,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    stage: Stage = no_stage,
) -> Solution:
    """Solve stage 1 for a checkpoint and measure what the map would do to it; nothing is changed.

    Prompts are encoded on `device` in `dtype`; statistics and solution are float64 on the CPU. The text
    encoders and the projections are read one layer at a time. The pooled embedding has a map
    of its own, the same closed form over pooled embeddings of the same prompts, whatever the token weights.
    Raises TrceError or BadInput where weights or results are not finite, and where a map would not move its
    targets.
    """
    stage("Checking the text encoder", None, "")
    embedder = Embedder.of(checkpoint, device, dtype)
    report = stage("Encoding the prior", len(set(prior.captions)), "captions")
    P = second_moments(embedder, prior.captions, report)
    report = stage("Encoding canaries", len(set(prior.canaries)), "captions")
    canaries = second_moments(embedder, prior.canaries, report)
    report = stage("Encoding prompt pairs", len(distinct_prompts(pairs)), "prompts")
    targets = embed_pairs(embedder, pairs, settings.token_weights, report)

    stage("Solving", None, "")
    keys = checkpoint.projection_keys()
    eps = torch.finfo(dtype).eps
    text_map, figures = fit(targets.context, P.context, settings, eps, checkpoint.read(keys[0]).dtype)
    figures |= {
        "pairs": len(pairs),
        "captions": len(prior.captions),
        "canaries": len(prior.canaries),
        "cosine_to_safe": targets.eots.cosines(text_map),
    }
    pooled_map = None
    if settings.pooled and targets.pooled and P.pooled is not None and canaries.pooled is not None:
        weight = checkpoint.read(POOLED_KEY)
        pooled_map, pooled = fit(targets.pooled, P.pooled, settings, eps, weight.dtype)
        moved = moved_moment(pooled_map, canaries.pooled)
        figures["pooled"] = pooled | {
            "cosine_to_safe": targets.pooled.cosines(pooled_map),
            "canary_change": relative_change(weight, canaries.pooled, moved, POOLED_KEY),
        }
    moved = moved_moment(text_map, canaries.context)
    report = stage("Measuring", len(keys), "layers")
    changes: dict[str, list[float]] = {"keys": [], "values": []}
    for key in keys:
        change = relative_change(checkpoint.read(key), canaries.context, moved, key)
        changes["keys" if ".to_k." in key else "values"].append(change)
        report(1)
    figures["canary_change"] = {
        kind: {"mean": fmean(found), "max": max(found)} for kind, found in changes.items()
    }
    return Solution(text_map, pooled_map, figures)


def fit(
    targets: "Targets", P: Tensor, settings: Settings, eps: float, weights: torch.dtype
) -> tuple[TextMap, dict[str, Any]]:
    """The map of these targets at the chosen strength, and its figures.

    eps: of the dtype that prompts were encoded in. weights: dtype of the weights that the map goes into.
    Raises TrceError as `check_moves` does.
    """
    # Rounding in `dtype` puts noise of some ulp in every direction alike.
    cut_off = max(CUT_OFF, (16 * eps) ** 2 / len(P))
    fitter = TextMapFitter(len(P)).update(targets.unsafe, targets.safe, targets.weights, targets.pairs)
    text_map = fitter.solve(P, settings.preserve, cut_off).scaled(settings.strength)
    moved = check_moves(text_map, fitter, weights)
    return text_map, {
        "moved": moved,
        "condition": text_map.condition,
        "rank": text_map.rank,
        "dim": len(P),
        "cut_off": cut_off,
    }


class Slot(NamedTuple):
    """A slot of a prompt pair: kind, position in the unsafe prompt, matching one in the safe one, w b."""

    kind: str
    unsafe: int
    safe: int
    weight: float


def slots(embedder: Embedder, pair: PromptPair, token_weights: Sequence[float]) -> list[Slot]:
    """The slots of a pair that carry weight, each prompt's own EoT found from its token ids."""
    unsafe, safe = embedder.tokens([pair.unsafe, pair.safe])
    w = dict(zip(SLOTS, token_weights, strict=True))
    found = [
        Slot("SOT", SOT, SOT, w["SOT"]),
        Slot("FIRST_EOT", unsafe.eot, safe.eot, w["FIRST_EOT"]),
        Slot("LAST_EOT", unsafe.last, safe.last, w["LAST_EOT"] * unsafe.padding),
    ]
    if w["KEYWORD"]:
        keyword = embedder.keyword_positions(pair.unsafe, pair.keyword)
        found += [Slot("KEYWORD", position, safe.last, w["KEYWORD"]) for position in keyword]
    return [slot for slot in found if slot.weight]


@dataclass(frozen=True)
class Targets:
    """What a map has to take where: unsafe embeddings o, safe ones n, weights w; of so many pairs."""

    unsafe: Tensor  # (slots, dim)
    safe: Tensor  # (slots, dim)
    weights: Tensor  # (slots,)
    pairs: int

    def cosines(self, text_map: TextMap) -> dict[str, dict[str, float]]:
        """Cosine of unsafe to safe embeddings, before and after the map: mean and minimum."""
        unsafe, safe = self.unsafe.double(), self.safe.double()
        cosines = {
            when: torch.nn.functional.cosine_similarity(embeddings, safe)
            for when, embeddings in (("before", unsafe), ("after", text_map(unsafe)))
        }
        return {when: {"mean": float(c.mean()), "min": float(c.min())} for when, c in cosines.items()}


class PairTargets(NamedTuple):
    """Targets of prompt pairs: at the slots that carry weight, at the first EoTs, and pooled (SDXL)."""

    context: Targets
    eots: Targets
    pooled: Targets | None


def embed_pairs(
    embedder: Embedder,
    pairs: Sequence[PromptPair],
    token_weights: Sequence[float],
    report: Report = lambda prompts: None,
) -> PairTargets:
    """Encode each distinct prompt once, up to the last of its slots that carries weight.

    Raises TrceError where a weight is given to a kind of slot that no pair has, and so would do nothing.
    """
    weighted = [(pair, slot) for pair in pairs for slot in slots(embedder, pair, token_weights)]
    kinds = {slot.kind for _, slot in weighted}
    for kind, weight in zip(SLOTS, token_weights, strict=True):
        if weight and kind not in kinds:
            raise TrceError(
                f"The token weight {weight:g} of {kind} would do nothing: no unsafe prompt has such a token.",
                "It is cut off where prompts are too long; shorten the templates, or set that weight to 0.",
            )
    eots = [(pair, slot) for pair in pairs for slot in slots(embedder, pair, (0, 1, 0, 0))]

    wanted: dict[str, set[int]] = defaultdict(set)
    for pair, slot in weighted + eots:
        wanted[pair.unsafe].add(slot.unsafe)
        wanted[pair.safe].add(slot.safe)
    positions = {prompt: sorted(places) for prompt, places in wanted.items()}
    states: dict[tuple[str, int], Tensor] = {}
    pooled: dict[str, Tensor] = {}
    for batch in embedder.states(positions, report):
        for number, (prompt, rows) in enumerate(batch.rows.items()):
            found = batch.context[rows]
            states |= {(prompt, at): state for at, state in zip(positions[prompt], found, strict=True)}
            if batch.pooled is not None:
                pooled[prompt] = batch.pooled[number]

    def at_slots(chosen: Sequence[tuple[PromptPair, Slot]]) -> Targets:
        return Targets(
            unsafe=torch.stack([states[pair.unsafe, slot.unsafe] for pair, slot in chosen]),
            safe=torch.stack([states[pair.safe, slot.safe] for pair, slot in chosen]),
            weights=torch.tensor([slot.weight for _, slot in chosen], dtype=torch.float64),
            pairs=len(pairs),
        )

    pooled_targets = None
    if pooled:
        pooled_targets = Targets(
            unsafe=torch.stack([pooled[pair.unsafe] for pair in pairs]),
            safe=torch.stack([pooled[pair.safe] for pair in pairs]),
            weights=torch.ones(len(pairs), dtype=torch.float64),
            pairs=len(pairs),
        )
    return PairTargets(at_slots(weighted), at_slots(eots), pooled_targets)


def check_moves(text_map: TextMap, fitter: TextMapFitter, weights: torch.dtype) -> float:
    """How far the map moves the targets, as a share of their way to the safe embeddings.

    Raises TrceError where that is not finite, or so little that weights of that dtype would round it away.
    """
    if not bool(torch.isfinite(text_map.change).all()):
        raise TrceError("The solution is not finite.", "Use a lower --strength.")
    if fitter.distance < SAME:
        raise TrceError(
            "The edit would do nothing: at the weighted tokens, safe prompts are embedded as unsafe ones.",
            "Give weight to tokens that can differ (SOT never does), or other safe phrases.",
        )
    moved = fitter.moved(text_map)
    if moved < max(LEAST_MOVE, torch.finfo(weights).eps):
        raise TrceError(
            f"The edit would do nothing: it moves its targets {moved:.2g} of their way to the safe ones.",
            "Lower --preserve or raise --strength.",
        )
    return moved


def moved_moment(text_map: TextMap, moment: Tensor) -> Tensor:
    """Second moment of what the map adds to embeddings c, (M - I) c, from that of c; (dim, dim)."""
    return text_map.change @ moment @ text_map.change.mT


def relative_change(weight: Tensor, moment: Tensor, moved: Tensor, name: str) -> float:
    """How much what a weight W makes of captions changes: rms |W M c - W c| / rms |W c|.

    weight: (out, dim), or with further columns that the map does not meet. moment, moved: second moments of c
    and of (M - I) c, (dim, dim). Raises BadInput for a weight that is not finite.
    """
    W = weight[:, : len(moment)].float()  # enough for a figure, in half the time
    if not bool(torch.isfinite(W).all()):
        raise BadInput(f"{name} holds NaN or infinite values.", "Download or copy the checkpoint again.")
    # The sum over captions of |W c|^2 is the trace of W P W^T.
    before, after = (float((W @ P.float() * W).sum()) for P in (moment, moved))
    return math.sqrt(max(after, 0) / before) if before else 0.0
