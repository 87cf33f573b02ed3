"""Stage 1 as one function: prompt pairs and a prior -> the text map, with the figures that guard it."""

import gc
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from trce_cli.checkpoint import Checkpoint
from trce_cli.closed_form import CUT_OFF, TextMap, TextMapFitter
from trce_cli.embed import SOT, Embedder
from trce_cli.errors import BadInput, TrceError
from trce_cli.moments import second_moment
from trce_cli.prior import Prior
from trce_cli.prompts import PromptPair
from trce_cli.settings import SLOTS, Settings, check_family, distinct_prompts

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
    """The map at the chosen strength, and the guards' figures as plain JSON values."""

    text_map: TextMap
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

    Prompts are encoded on `device` in `dtype`; statistics and solution are float64 on the CPU. Only the text
    encoders are loaded, and freed before the projections are read one by one. Raises TrceError or BadInput
    where weights or results are not finite, and where the map would not move the targets.
    """
    check_family(checkpoint)
    stage("Loading the text encoder", None, "")
    encoders = checkpoint.load_text_encoders(device, dtype)
    embedder = Embedder(checkpoint.family, checkpoint.load_tokenizers(), encoders)
    dim = embedder.dim
    report = stage("Encoding the prior", len(set(prior.captions)), "captions")
    P = second_moment(embedder, prior.captions, report)
    report = stage("Encoding canaries", len(set(prior.canaries)), "captions")
    canaries = second_moment(embedder, prior.canaries, report)
    report = stage("Encoding prompt pairs", len(distinct_prompts(pairs)), "prompts")
    targets = embed_pairs(embedder, pairs, settings.token_weights, report)
    del encoders, embedder
    gc.collect()

    stage("Solving", None, "")
    # Rounding in `dtype` puts noise of some ulp in every direction alike.
    cut_off = max(CUT_OFF, (16 * torch.finfo(dtype).eps) ** 2 / dim)
    fitter = TextMapFitter(dim).update(targets.unsafe, targets.safe, targets.weights, pairs=len(pairs))
    text_map = fitter.solve(P, settings.preserve, cut_off).scaled(settings.strength)
    keys = checkpoint.projection_keys()
    moved = check_moves(text_map, fitter, checkpoint.read(keys[0]).dtype)
    report = stage("Measuring", len(keys), "layers")
    weights = ((key, checkpoint.read(key)) for key in keys)
    figures = {
        "pairs": len(pairs),
        "captions": len(prior.captions),
        "cosine_to_safe": targets.eot_cosines(text_map),
        "moved": moved,
        "canaries": len(prior.canaries),
        "canary_change": relative_changes(text_map, canaries, weights, report),
        "condition": text_map.condition,
        "rank": text_map.rank,
        "dim": dim,
        "cut_off": cut_off,
    }
    return Solution(text_map, figures)


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
    """Embeddings of all prompt pairs: at the slots that carry weight, and at the first EoTs."""

    unsafe: Tensor  # (slots, dim)
    safe: Tensor  # (slots, dim)
    weights: Tensor  # (slots,)
    unsafe_eot: Tensor  # (pairs, dim)
    safe_eot: Tensor  # (pairs, dim)

    def eot_cosines(self, text_map: TextMap) -> dict[str, dict[str, float]]:
        """Cosine of unsafe to safe first EoT, before and after the map: mean and minimum of the pairs."""
        unsafe, safe = self.unsafe_eot.double(), self.safe_eot.double()
        cosines = {
            when: torch.nn.functional.cosine_similarity(embeddings, safe)
            for when, embeddings in (("before", unsafe), ("after", text_map(unsafe)))
        }
        return {when: {"mean": float(c.mean()), "min": float(c.min())} for when, c in cosines.items()}


def embed_pairs(
    embedder: Embedder,
    pairs: Sequence[PromptPair],
    token_weights: Sequence[float],
    report: Report = lambda prompts: None,
) -> Targets:
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
    for batch in embedder.states(positions, report):
        for prompt, found in batch.items():
            states |= {(prompt, at): state for at, state in zip(positions[prompt], found, strict=True)}
    return Targets(
        unsafe=torch.stack([states[pair.unsafe, slot.unsafe] for pair, slot in weighted]),
        safe=torch.stack([states[pair.safe, slot.safe] for pair, slot in weighted]),
        weights=torch.tensor([slot.weight for _, slot in weighted], dtype=torch.float64),
        unsafe_eot=torch.stack([states[pair.unsafe, slot.unsafe] for pair, slot in eots]),
        safe_eot=torch.stack([states[pair.safe, slot.safe] for pair, slot in eots]),
    )


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


def relative_changes(
    text_map: TextMap,
    moment: Tensor,
    weights: Iterable[tuple[str, Tensor]],
    report: Report = lambda layers: None,
) -> dict[str, dict[str, float]]:
    """How much keys and values of captions change: rms |W M c - W c| / rms |W c|, mean and maximum by layer.

    moment: the captions' second moment (dim, dim). weights: to_k and to_v weights by their names. Raises
    BadInput for weights that are not finite.
    """
    change = text_map.change @ moment @ text_map.change.mT
    ratios: dict[str, list[float]] = {"keys": [], "values": []}
    for name, weight in weights:
        W = weight.double()
        if not bool(torch.isfinite(W).all()):
            raise BadInput(f"{name} holds NaN or infinite values.", "Download or copy the checkpoint again.")
        # The sum over captions of |W c|^2 is the trace of W P W^T.
        before, after = float((W @ moment * W).sum()), float((W @ change * W).sum())
        kind = "keys" if ".to_k." in name else "values"
        ratios[kind].append(math.sqrt(max(after, 0) / before) if before else 0.0)
        report(1)
    return {kind: {"mean": fmean(found), "max": max(found)} for kind, found in ratios.items()}
