"""Stage 1 in two steps: prompt pairs and a prior -> statistics -> a text map, with figures that guard it."""

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from trce_cli.checkpoint.checkpoint import Checkpoint
from trce_cli.erase.map_settings import SLOTS, Settings, distinct_prompts
from trce_cli.erase.moments import Moments, second_moments
from trce_cli.erase.prior import Prior
from trce_cli.errors import BadInput, TrceError
from trce_cli.families.clip.embedder import SOT, Embedder
from trce_cli.families.sd.family import POOLED_KEY
from trce_cli.maths.closed_form import CUT_OFF, TextMap, TextMapFitter
from trce_cli.prompts.pairs import PromptPair

# An edit that takes the targets less than this share of their way has erased nothing.
LEAST_MOVE: Final = 1e-4
# Embeddings closer than this, as a share of their length, are one embedding and the rounding of float32.
SAME: Final = 1e-4
BLOCK: Final = 1024  # slots whose embeddings are in memory in float64 at a time
EOT: Final = (0.0, 1.0, 0.0, 0.0)  # the token weights of the first EoT alone

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
    """Both steps at once, for one setting: see `Statistics`."""
    weights = [settings.token_weights]
    return Statistics.of(checkpoint, pairs, prior, weights, device, dtype, stage).solve(settings, stage)


@dataclass(frozen=True)
class Statistics:
    """What every map of some prompt pairs is solved from, at whatever setting: the part that takes time.

    P, canaries: moments of the prior's captions and of its canaries. dtype: that prompts were encoded in.
    """

    checkpoint: Checkpoint
    prior: Prior
    P: Moments
    canaries: Moments
    pairs: "EmbeddedPairs"
    dtype: torch.dtype

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        pairs: Sequence[PromptPair],
        prior: Prior,
        token_weights: Collection[Sequence[float]],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        stage: Stage = no_stage,
    ) -> "Statistics":
        """Encode captions and pairs, on `device` in `dtype`, for maps with any of these token weights.

        Statistics are float64 on the CPU. The text encoders are read one layer at a time. Raises TrceError or
        BadInput where weights or embeddings are not finite.
        """
        stage("Checking the text encoder", None, "")
        embedder = Embedder.of(checkpoint, device, dtype)
        report = stage("Encoding the prior", len(set(prior.captions)), "captions")
        P = second_moments(embedder, prior.captions, report)
        report = stage("Encoding canaries", len(set(prior.canaries)), "captions")
        canaries = second_moments(embedder, prior.canaries, report)
        report = stage("Encoding prompt pairs", len(distinct_prompts(pairs)), "prompts")
        return cls(checkpoint, prior, P, canaries, embed_pairs(embedder, pairs, token_weights, report), dtype)

    def solve(self, settings: Settings, stage: Stage = no_stage) -> Solution:
        """Solve stage 1 in float64 and measure what the map would do to the checkpoint; nothing is changed.

        The token weights must be among those that were encoded for. The pooled embedding has a map of its
        own, the same closed form over pooled embeddings of the same prompts, whatever the token weights.
        Projections are read one layer at a time. Raises TrceError or BadInput where weights or results are
        not finite, and where a map would not move its targets.
        """
        stage("Solving", None, "")
        checkpoint, P, canaries = self.checkpoint, self.P, self.canaries
        eots, pooled_targets = self.pairs.eots, self.pairs.pooled_targets
        targets = eots if settings.token_weights == EOT else self.pairs.targets(settings.token_weights)
        keys = checkpoint.projection_keys()
        eps = torch.finfo(self.dtype).eps
        text_map, figures = fit(targets, P.context, settings, eps, checkpoint.read(keys[0]).dtype)
        figures |= {
            "pairs": len(self.pairs.pairs),
            "captions": len(self.prior.captions),
            "canaries": len(self.prior.canaries),
            "cosine_to_safe": eots.cosines(text_map),
        }
        pooled_map = None
        if settings.pooled and pooled_targets and P.pooled is not None and canaries.pooled is not None:
            weight = checkpoint.read(POOLED_KEY)
            pooled_map, pooled = fit(pooled_targets, P.pooled, settings, eps, weight.dtype)
            moved = moved_moment(pooled_map, canaries.pooled)
            figures["pooled"] = pooled | {
                "cosine_to_safe": pooled_targets.cosines(pooled_map),
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
    fitter = targets.fitter()
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
    """What a map has to take where, slot by slot: the rows of the unsafe embedding o and of the safe one n.

    embeddings: (rows, dim), each distinct one once. weights: w of the slots. pairs: that the slots are of.
    """

    embeddings: Tensor
    unsafe: Tensor  # (slots,)
    safe: Tensor  # (slots,)
    weights: Tensor  # (slots,)
    pairs: int

    def blocks(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """o and n, float64 (slots, dim), and w (slots,), of so many slots at a time."""
        rows = (self.unsafe, self.safe, self.weights)
        for unsafe, safe, w in zip(*(each.split(BLOCK) for each in rows), strict=True):
            yield self.embeddings[unsafe].double(), self.embeddings[safe].double(), w

    def fitter(self) -> TextMapFitter:
        """What the closed form needs of them."""
        fitter = TextMapFitter(self.embeddings.shape[1], self.pairs)
        for block in self.blocks():
            fitter.update(*block)
        return fitter

    def cosines(self, text_map: TextMap) -> dict[str, dict[str, float]]:
        """Cosine of unsafe to safe embeddings, before and after the map: mean and minimum."""
        cosines: dict[str, list[Tensor]] = {"before": [], "after": []}
        for o, n, _ in self.blocks():
            for when, embeddings in (("before", o), ("after", text_map(o))):
                cosines[when].append(torch.nn.functional.cosine_similarity(embeddings, n))
        found = {when: torch.cat(parts) for when, parts in cosines.items()}
        return {when: {"mean": float(c.mean()), "min": float(c.min())} for when, c in found.items()}


@dataclass(frozen=True)
class EmbeddedPairs:
    """Prompt pairs with the embeddings of their slots, from which targets of several weights are made.

    states: float32 (rows, dim). places: prompt and position -> row. pooled: SDXL's, float32 (prompts, dim),
    in the order of `pooled_places`; None for families without any.
    """

    embedder: Embedder
    pairs: Sequence[PromptPair]
    states: Tensor
    places: Mapping[tuple[str, int], int]
    pooled: Tensor | None
    pooled_places: Mapping[str, int]

    def targets(self, token_weights: Sequence[float]) -> Targets:
        """The targets at the slots that carry weight.

        Raises TrceError where a weight is given to a kind of slot that no pair has, and so would do nothing.
        """
        weighted = [(pair, slot) for pair in self.pairs for slot in slots(self.embedder, pair, token_weights)]
        kinds = {slot.kind for _, slot in weighted}
        for kind, weight in zip(SLOTS, token_weights, strict=True):
            if weight and kind not in kinds:
                raise TrceError(
                    f"The token weight {weight:g} of {kind} would do nothing: no unsafe prompt has one.",
                    "It is cut off where prompts are too long; shorten the templates, or set it to 0.",
                )
        return Targets(
            embeddings=self.states,
            unsafe=torch.tensor([self.places[pair.unsafe, slot.unsafe] for pair, slot in weighted]),
            safe=torch.tensor([self.places[pair.safe, slot.safe] for pair, slot in weighted]),
            weights=torch.tensor([slot.weight for _, slot in weighted], dtype=torch.float64),
            pairs=len(self.pairs),
        )

    @cached_property
    def eots(self) -> Targets:
        """The first EoTs, which the guards measure at whatever the token weights."""
        return self.targets(EOT)

    @cached_property
    def pooled_targets(self) -> Targets | None:
        """The pooled embeddings, each of weight 1; None for families without any."""
        if self.pooled is None:
            return None
        return Targets(
            embeddings=self.pooled,
            unsafe=torch.tensor([self.pooled_places[pair.unsafe] for pair in self.pairs]),
            safe=torch.tensor([self.pooled_places[pair.safe] for pair in self.pairs]),
            weights=torch.ones(len(self.pairs), dtype=torch.float64),
            pairs=len(self.pairs),
        )


def embed_pairs(
    embedder: Embedder,
    pairs: Sequence[PromptPair],
    token_weights: Collection[Sequence[float]],
    report: Report = lambda prompts: None,
) -> EmbeddedPairs:
    """Encode each distinct prompt once, up to the last slot that any of these token weights gives weight.

    The first EoTs are always among them.
    """
    wanted: dict[str, set[int]] = defaultdict(set)
    for weights in dict.fromkeys((EOT, *map(tuple, token_weights))):
        for pair in pairs:
            for slot in slots(embedder, pair, weights):
                wanted[pair.unsafe].add(slot.unsafe)
                wanted[pair.safe].add(slot.safe)
    positions = {prompt: sorted(places) for prompt, places in wanted.items()}
    states = torch.empty(sum(map(len, positions.values())), embedder.dim)
    pooled = torch.empty(len(positions), embedder.pooled_dim) if embedder.family.pooled else None
    places: dict[tuple[str, int], int] = {}
    pooled_places: dict[str, int] = {}
    for batch in embedder.states(positions, report):
        if pooled is not None and batch.pooled is not None:
            pooled[len(pooled_places) :][: len(batch.pooled)] = batch.pooled
        for prompt, rows in batch.rows.items():
            states[len(places) :][: len(rows)] = batch.context[rows]
            places |= {(prompt, at): len(places) + row for row, at in enumerate(positions[prompt])}
            pooled_places[prompt] = len(pooled_places)
    return EmbeddedPairs(embedder, pairs, states, places, pooled, pooled_places)


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
