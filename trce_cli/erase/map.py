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
from trce_cli.erase.prior import Prior
from trce_cli.erase.settings import MapSettings
from trce_cli.erase.targets import EmbeddedPairs, Targets, embed_pairs
from trce_cli.erase.vocabulary import Vocabulary
from trce_cli.errors import BadInput, TrceError
from trce_cli.families.slots import Given, slot_weights
from trce_cli.maths.closed_form import CUT_OFF, MapFitter
from trce_cli.maths.linear_map import LinearMap
from trce_cli.prompts.pairs import PromptPair
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
    weights = [settings.token_weights]
    statistics = Statistics.of(
        checkpoint, pairs, prior, weights, settings.words_asked, device=device, dtype=dtype, task=task
    )
    return statistics.solve(settings, task)


@dataclass(frozen=True)
class Statistics:
    """What every map of some prompt pairs is solved from, at whatever setting: the part that takes time.

    P, canaries, bystanders: moments of the prior's captions, of its canaries, and of those of what neither
    names, where it has some. words: the same of the vocabulary's words, where it has some and they are asked
    for. guards: the targets that guards measure at, the slots of the family's defaults. dtype: that prompts
    were encoded in.
    """

    checkpoint: Checkpoint
    prior: Prior
    P: Moments
    canaries: Moments
    bystanders: Moments | None
    words: Vocabulary | None
    pairs: EmbeddedPairs
    guards: Mapping[str, Targets]
    dtype: torch.dtype

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        pairs: Sequence[PromptPair],
        prior: Prior,
        token_weights: Collection[Given],
        word_prompts: int = 0,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        task: Task = no_task,
    ) -> "Statistics":
        """Encode captions, words and pairs, on `device` in `dtype`, for maps with any of these token weights.

        Statistics are float64 on the CPU. The text encoders are read one layer at a time. Raises TrceError or
        BadInput where weights or embeddings are not finite.
        """
        task("Checking the text encoder", None, "")
        family = checkpoint.family
        text = family.text(checkpoint, device, dtype)
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
        if word_prompts:
            report = task("Encoding words", None, "prompts")
            words = Vocabulary.of(text, pairs, family.defaults.slots, word_prompts, report)
        report = task("Encoding prompt pairs", len(distinct_prompts(pairs)), "prompts")
        guarded = slot_weights(family, None)
        weights = [guarded, *(slot_weights(family, each) for each in token_weights)]
        distinct = {tuple(each.values()): each for each in weights}.values()
        embedded = embed_pairs(text, pairs, distinct, report)
        guards = embedded.targets(guarded)
        return cls(checkpoint, prior, P, canaries, bystanders, words, embedded, guards, dtype)

    def solve(self, settings: MapSettings, task: Task = no_task) -> Solution:
        """Solve stage 1 in float64 and measure what the map would do to the checkpoint; nothing is changed.

        The token weights must be among those that were encoded for. Each stream has a map of its own by the
        same closed form. The doors are read one weight at a time. Raises TrceError or BadInput where weights
        or results are not finite, and where a map would not move its targets.
        """
        family = self.checkpoint.family
        streams = settings.streams(family)
        targets = self.pairs.targets(slot_weights(family, settings.token_weights))
        doors = self.checkpoint.door_weights()
        solved: dict[str, LinearMap] = {}
        figures: dict[str, dict[str, Any]] = {}
        for stream in streams:
            task("Solving", None, "")
            weights = self.checkpoint.read("denoiser", doors[stream][0]).dtype
            eps = torch.finfo(self.dtype).eps
            solved[stream], figures[stream] = fit(
                targets[stream], self._preserved(stream, settings.word_share), settings, eps, weights
            )
            if stream == streams[0]:
                figures[stream] |= {
                    "pairs": len(self.pairs.pairs),
                    "captions": len(self.prior.captions),
                    "canaries": len(self.prior.canaries),
                    "bystanders": len(self.prior.bystanders),
                }
                if self.words and settings.word_share:
                    figures[stream] |= {
                        "word_prompts": self.words.prompts,
                        "exempt_words": list(self.words.exempt),
                        "held_out_words": len(self.words.held_out),
                    }
            figures[stream] |= {
                "cosine_to_safe": self.guards[stream].cosines(solved[stream]),
            }
            for name, moments in self._measured():
                report = task("Measuring", len(doors[stream]), "layers")
                figures[stream][name] = self._change(stream, solved[stream], moments[stream], report)
        main = figures.pop(streams[0])
        changes = {name: main.pop(name) for name, _ in self._measured()}
        told = main | figures | changes
        return Solution(solved, told | {"verdicts": judge(told)})

    def _preserved(self, stream: str, word_share: float) -> Tensor:
        """P: of captions and words by their shares, of captions alone where there are no words."""
        if self.words is None:
            return self.P[stream]
        return (1 - word_share) * self.P[stream] + word_share * self.words.P[stream]

    def _measured(self) -> list[tuple[str, Moments]]:
        """What side effects are measured on, by the names of the figures."""
        bystanders = [("bystander_change", self.bystanders)] if self.bystanders else []
        words = [("word_change", self.words.canaries)] if self.words else []
        return [("canary_change", self.canaries), *bystanders, *words]

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
    moved = check_moves(linear, fitter, weights)
    return linear, {
        "moved": moved,
        "norm": linear.norm,
        "condition": found.condition,
        "rank": found.rank,
        "dim": len(P),
        "cut_off": cut_off,
    }


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
    return math.sqrt(max(after, 0) / before) if before else 0.0
