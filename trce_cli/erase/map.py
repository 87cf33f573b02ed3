"""Stage 1 in two steps: prompt pairs and a prior -> statistics -> a map, with figures that guard it."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Final

import torch
from torch import Tensor

from trce_cli.checkpoint.checkpoint import Checkpoint
from trce_cli.erase.map_plan import distinct_prompts
from trce_cli.erase.map_verdict import judge
from trce_cli.erase.moments import Moments, second_moments
from trce_cli.erase.padding import Padding
from trce_cli.erase.prior import Prior
from trce_cli.erase.settings import MapSettings
from trce_cli.erase.targets import EmbeddedPairs, Targets, embed_pairs
from trce_cli.erase.vocabulary import Vocabulary
from trce_cli.errors import BadInput, TrceError
from trce_cli.families.base import Family, Text
from trce_cli.families.slots import slot_weights
from trce_cli.maths.closed_form import CUT_OFF, MapFitter
from trce_cli.maths.linear_map import LinearMap
from trce_cli.prompts.pairs import PromptPair, with_compounds
from trce_cli.system.progress import Report, Task, no_report, no_task

# An edit that takes the targets less than this share of their way has erased nothing.
LEAST_MOVE: Final = 1e-4
# Embeddings closer than this, as a share of their length, are one embedding and the rounding of float32.
SAME: Final = 1e-4


@dataclass(frozen=True)
class Solution:
    """The maps by stream at the chosen strength, and the guards' figures as plain JSON values.

    The figures of the family's main stream stand at the top, those of further ones under their names.
    """

    streams: Mapping[str, LinearMap]
    figures: dict[str, Any]


def solve(
    checkpoint: Checkpoint,
    pairs: Sequence[PromptPair],
    prior: Prior,
    settings: MapSettings,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    task: Task = no_task,
) -> Solution:
    """Both steps at once, for one setting: see `Statistics`."""
    statistics = Statistics.of(checkpoint, pairs, prior, [settings], device=device, dtype=dtype, task=task)
    return statistics.solve(settings, task)


@dataclass(frozen=True)
class Reading:
    """What a text encoder, read at one of its layers, makes of the prompts that a map is solved from.

    P, canaries, bystanders: moments of the prior's captions, of its canaries, and of those of what neither
    names, where it has some. words: the same of the vocabulary's words, where it has some and they are asked
    for. pairs: with all their compounds. guards: the targets that guards measure at, the slots of the
    family's defaults in pairs that name one concept. paddings: those that the denoiser sees, by the names of
    their figures.
    """

    P: Moments
    canaries: Moments
    bystanders: Moments | None
    words: Vocabulary | None
    pairs: EmbeddedPairs
    guards: Mapping[str, Targets]
    paddings: Mapping[str, Padding]

    @classmethod
    def of(
        cls,
        text: Text,
        family: Family,
        pairs: Sequence[PromptPair],
        prior: Prior,
        settings: Collection[MapSettings],
        task: Task,
    ) -> "Reading":
        """Encode captions, words and pairs, for maps with any of these settings."""
        text.check()
        report = task("Encoding the prior", len(set(prior.captions)), "captions")
        P = second_moments(text, prior.captions, report)
        report = task("Encoding canaries", len(set(prior.canaries)), "captions")
        canaries = second_moments(text, prior.canaries, report)
        bystanders = None
        if prior.bystanders:
            report = task("Encoding bystanders", len(set(prior.bystanders)), "captions")
            bystanders = second_moments(text, prior.bystanders, report)
        words = None
        if word_prompts := max(each.words_asked for each in settings):
            report = task("Encoding words", None, "prompts")
            words = Vocabulary.of(text, pairs, family.defaults.meaning, word_prompts, report)
        guarded = slot_weights(family, None)
        weights = [guarded, *(slot_weights(family, each.token_weights) for each in settings)]
        distinct = {tuple(each.values()): each for each in weights}.values()
        every = with_compounds(pairs, max(each.compounds for each in settings))
        report = task("Encoding prompt pairs", len(distinct_prompts(every)), "prompts")
        embedded = embed_pairs(text, every, distinct, report)
        texts = {"padding_moved": text, "eot_padding_moved": text.padded_with_eot()}
        found = {name: Padding.of(each, pairs) for name, each in texts.items() if each}
        paddings = {name: padding for name, padding in found.items() if padding}
        return cls(P, canaries, bystanders, words, embedded, embedded.targets(guarded, pairs), paddings)

    def preserved(self, stream: str, word_share: float) -> Tensor:
        """P: of captions and words by their shares, of captions alone where there are no words."""
        if self.words is None:
            return self.P[stream]
        return (1 - word_share) * self.P[stream] + word_share * self.words.P[stream]

    @property
    def measured(self) -> list[tuple[str, Moments]]:
        """What side effects are measured on, by the names of the figures."""
        bystanders = [("bystander_change", self.bystanders)] if self.bystanders else []
        words = [("word_change", self.words.canaries)] if self.words else []
        return [("canary_change", self.canaries), *bystanders, *words]


@dataclass(frozen=True)
class Statistics:
    """What every map of some prompt pairs is solved from, at whatever setting: the part that takes time.

    pairs: without compounds. readings: of the text encoder by clip skip, from 1 on. dtype: that prompts were
    encoded in.
    """

    checkpoint: Checkpoint
    pairs: Sequence[PromptPair]
    prior: Prior
    readings: Sequence[Reading]
    dtype: torch.dtype

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        pairs: Sequence[PromptPair],
        prior: Prior,
        settings: Collection[MapSettings],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        task: Task = no_task,
    ) -> "Statistics":
        """Encode captions, words and pairs, on `device` in `dtype`, for maps with any of these settings.

        Statistics are float64 on the CPU. The text encoders are read one layer at a time, anew for each clip
        skip. Raises TrceError or BadInput where weights or embeddings are not finite, and BadInput for a clip
        skip that the checkpoint does not have.
        """
        task("Checking the encoder", None, "")
        family = checkpoint.family
        texts = [
            family.skipped_text(checkpoint, device, dtype, skip)
            for skip in range(1, max(each.clip_skip for each in settings) + 1)
        ]
        readings = [Reading.of(text, family, pairs, prior, settings, task) for text in texts]
        return cls(checkpoint, pairs, prior, readings, dtype)

    def solve(self, settings: MapSettings, task: Task = no_task) -> Solution:
        """Solve stage 1 in float64 and measure what the map would do to the checkpoint; nothing is changed.

        The settings' token weights, words, compounds and clip skip must be among those that were encoded for.
        Each stream has a map of its own by the same closed form. With a clip skip, pairs and P are those of
        all readings, each of which counts alike. The doors are read one weight at a time. Raises TrceError or
        BadInput where weights or results are not finite, and where a map would not move its targets.
        """
        family = self.checkpoint.family
        streams, readings = settings.streams(family), self.readings[: settings.clip_skip]
        first = readings[0]
        slots = slot_weights(family, settings.token_weights)
        pairs = with_compounds(self.pairs, settings.compounds)
        targets = [reading.pairs.targets(slots, pairs) for reading in readings]
        doors = self.checkpoint.door_weights()
        solved: dict[str, LinearMap] = {}
        figures: dict[str, dict[str, Any]] = {}
        for stream in streams:
            task("Solving", None, "")
            weights = self.checkpoint.read("denoiser", doors[stream][0]).dtype
            eps = torch.finfo(self.dtype).eps
            preserved = [reading.preserved(stream, settings.word_share) for reading in readings]
            P = preserved[0] if len(readings) == 1 else torch.stack(preserved).mean(0)
            joined = Targets.joined([each[stream] for each in targets])
            solved[stream], figures[stream] = fit(joined, P, settings, eps, weights)
            guarded = Targets.joined([reading.guards[stream] for reading in readings])
            figures[stream]["moved"] = guarded.moved(solved[stream])
            if stream == streams[0]:
                figures[stream] |= {
                    "pairs": len(self.pairs),
                    "captions": len(self.prior.captions),
                    "canaries": len(self.prior.canaries),
                    "bystanders": len(self.prior.bystanders),
                }
                if first.words and settings.word_share:
                    figures[stream] |= {
                        "word_prompts": first.words.prompts,
                        "exempt_words": list(first.words.exempt),
                        "held_out_words": len(first.words.held_out),
                    }
            figures[stream] |= self._guards(stream, solved[stream], first, task)
            if stream == streams[0]:
                figures[stream] |= self._paddings(stream, solved[stream], first)
        main = figures.pop(streams[0])
        changes = {name: main.pop(name) for name, _ in first.measured}
        skipped = {
            f"clip_skip_{skip}": self._guards(streams[0], solved[streams[0]], reading, task)
            | {"moved": reading.guards[streams[0]].moved(solved[streams[0]])}
            | self._paddings(streams[0], solved[streams[0]], reading)
            for skip, reading in enumerate(readings, 1)
            if skip > 1
        }
        told = main | figures | changes | skipped
        return Solution(solved, told | {"verdicts": judge(told, family.defaults.moved)})

    def _guards(self, stream: str, linear: LinearMap, reading: Reading, task: Task) -> dict[str, Any]:
        """What a map does at the guards' slots and to what is not to be erased, as one reading has them."""
        found: dict[str, Any] = {"cosine_to_safe": reading.guards[stream].cosines(linear)}
        for name, moments in reading.measured:
            report = task("Measuring", len(self.checkpoint.door_weights()[stream]), "layers")
            found[name] = self._change(stream, linear, moments[stream], report)
        return found

    def _paddings(self, stream: str, linear: LinearMap, reading: Reading) -> dict[str, float]:
        """How far padding is moved where it enters the doors of the main stream: the least of their means."""
        found = {}
        for name, padding in reading.paddings.items():
            shares = door_changes(self.checkpoint, stream, padding.moved(linear))
            one = isinstance(shares, float)
            found[name] = shares if one else min(each["mean"] for each in shares.values())
        return found

    def _change(self, stream: str, linear: LinearMap, moment: Tensor, report: Report) -> Any:
        moved = linear.moved_moment(moment)

        def change(weight: Tensor, key: str) -> float:
            return relative_change(weight, moment, moved, key)

        return door_changes(self.checkpoint, stream, change, report)


def fit(
    targets: Targets, P: Tensor, settings: MapSettings, eps: float, weights: torch.dtype
) -> tuple[LinearMap, dict[str, Any]]:
    """The map of these targets at the chosen strength, and its figures.

    eps: of the dtype that prompts were encoded in. weights: dtype of the weights that the map goes into.
    Raises TrceError as `check_moves` does.
    """
    # Rounding in `dtype` puts noise of some ulp in every direction alike.
    cut_off = max(CUT_OFF, (16 * eps) ** 2 / len(P))
    fitter = targets.fitter()
    found = fitter.solve(P, settings.preserve, settings.ridge, cut_off)
    linear = found.map.scaled(settings.strength)
    deflated = {}
    if settings.deflate and linear.is_finite:
        linear, deflated["deflated"] = linear.deflated(settings.deflate)
    check_moves(linear, fitter, weights)
    return linear, {
        "norm": linear.norm,
        "condition": found.condition,
        "rank": found.rank,
        "dim": len(P),
        "cut_off": cut_off,
    } | deflated


def door_changes(
    checkpoint: Checkpoint,
    stream: str,
    change: Callable[[Tensor, str], float],
    report: Report = no_report,
) -> Any:
    """How much the weights of a stream's doors change, mean and maximum by door; of a single weight a number.

    change: of a weight and its name. The weights are read one at a time, and `report` called with 1.
    """
    names = {key: door.name for door in checkpoint.doors() if door.stream == stream for key in door.weights}
    changes: dict[str, list[float]] = {name: [] for name in names.values()}
    for key in checkpoint.door_weights()[stream]:
        changes[names[key]].append(change(checkpoint.read("denoiser", key), key))
        report(1)
    if len(names) == 1:
        return changes[names[key]][0]
    return {name: {"mean": fmean(found), "max": max(found)} for name, found in changes.items()}


def check_moves(linear: LinearMap, fitter: MapFitter, weights: torch.dtype) -> float:
    """How far the map moves the targets, as a share of their way to the safe embeddings.

    Raises TrceError where that is not finite, or so little that weights of that dtype would round it away.
    """
    if not linear.is_finite:
        raise TrceError("The solution is not finite.", "Use a lower --strength.")
    if fitter.distance < SAME:
        raise TrceError(
            "The edit would do nothing: at the weighted tokens, safe prompts are embedded as unsafe ones.",
            "Give weight to tokens that can differ (SOT never does), or other safe phrases.",
        )
    moved = fitter.moved(linear)
    if moved < max(LEAST_MOVE, torch.finfo(weights).eps):
        raise TrceError(
            f"The edit would do nothing: it moves its targets {moved:.2g} of their way to the safe ones.",
            "Lower --preserve or raise --strength.",
        )
    return moved


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
    if not math.isfinite(after):  # more than float32 holds
        return math.inf
    return math.sqrt(max(after, 0) / before) if before else 0.0
