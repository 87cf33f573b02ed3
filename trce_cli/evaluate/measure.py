"""From pictures and scores to the figures of a suite, and a verdict on every picture."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from trce_cli.evaluate.detectors.base import Loaded
from trce_cli.evaluate.features import Extractor
from trce_cli.evaluate.question import Evaluation
from trce_cli.evaluate.scores import BATCH, ROLES, Pair, ScoreStore, batches, load_image
from trce_cli.images.given import pictures_in
from trce_cli.images.record import ImageRecord, load
from trce_cli.maths.statistics import Change, Rate, frechet_distance, mean_change, similarity
from trce_cli.prompts.home import Clip
from trce_cli.prompts.suites import Suite
from trce_cli.system.progress import Report
from trce_cli.system.safetensors import hash_file


def measure_suite(
    evaluation: Evaluation,
    suite: Suite,
    pairs: Sequence[Pair],
    stores: Mapping[str, ScoreStore],
    report: Report,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A suite's figures, and its verdicts: a row a pair."""
    keys = {role: [hash_file(pair.path(role)) for pair in pairs] for role in ROLES}
    features: dict[tuple[int, str], list[np.ndarray]] = {}
    images: dict[str, list[np.ndarray]] = {role: [] for role in ROLES}
    changes: list[float] = []
    for batch in batches(pairs):
        both = {role: np.stack([load_image(pair.path(role)) for pair in batch]) for role in ROLES}
        gap = np.abs(both["original"].astype(np.int16) - both["erased"]).mean((1, 2, 3)) / 255
        changes += gap.tolist()
        for role in ROLES:
            for number, extractor in enumerate(evaluation.extractors):
                features.setdefault((number, role), []).append(extractor.features(both[role]))
            if evaluation.clip:
                images[role].append(evaluation.clip.images(both[role]))
        report(len(batch))
    found: dict[str, Any] = {
        "name": suite.name,
        "role": suite.role,
        "source": suite.source,
        "prompts": len(pairs),
    }
    rows = [start_row(suite.name, pair, change) for pair, change in zip(pairs, changes, strict=True)]
    found["asr"] = [
        verdict
        for detector in evaluation.detectors
        for verdict in attack_success(detector, stores[detector.name], keys, rows)
    ]
    shown: dict[str, np.ndarray] = {}
    how = None
    if evaluation.clip:
        embedded = {role: np.concatenate(parts) for role, parts in images.items()}
        fits = Fits.of(evaluation.clip, [prompt.text for prompt in suite.prompts], embedded)
        found["clip_score"] = clip_scores(fits, rows)
        if suite.objects is None and evaluation.keeps(suite):
            if suite.subjects is not None:
                fits = Fits.of(evaluation.clip, suite.subjects, embedded)
            asked = "prompt" if suite.subjects is None else "subject"
            shown, how = fits.best, f"{fits.by}: the own {asked} ranks first among the suite's"
    if suite.objects is not None:
        judge = evaluation.judge
        shown = objects_visible(suite, judge, stores[judge.name], keys)
        how = f"{judge.name}: all that should survive is visible"
    if how is not None:
        found["kept"] = preservation(how, shown, rows, suite.groups)
    found["frechet"] = [
        distance
        for number, extractor in enumerate(evaluation.extractors)
        for distance in frechet(
            evaluation,
            suite,
            extractor,
            {role: np.concatenate(features[number, role]) for role in ROLES},
            pairs[0].records["erased"],
        )
    ]
    same = [change == 0 for change in changes]
    found["change"] = {
        "mean": float(np.mean(changes)),
        "identical": Rate.of("identical", same).as_dict(),
    }
    return found, rows


def start_row(suite: str, pair: Pair, change: float) -> dict[str, Any]:
    """The verdict row of a pair, to which every measure adds its own."""
    record = pair.records["erased"]
    return {
        "suite": suite,
        "index": record.index,
        "prompt": record.prompt,
        "seed": record.seed,
        "files": {role: pair.records[role].file for role in ROLES},
        "change": change,
        "hits": {},
        "scores": {},
    }


def attack_success(
    detector: Loaded,
    store: ScoreStore,
    keys: Mapping[str, Sequence[str]],
    rows: Sequence[dict[str, Any]],
) -> Iterator[dict[str, Any]]:
    """For each convention how often both checkpoints show what should be gone, and what the edit changed."""
    scores = {role: np.array([store[key] for key in keys[role]]) for role in ROLES}
    for role in ROLES:
        for row, line in zip(rows, scores[role], strict=True):
            row["scores"].setdefault(detector.name, {})[role] = line.tolist()
    for convention in detector.conventions:
        hits = {role: detector.hits(convention, scores[role]) for role in ROLES}
        for row, before, after in zip(rows, hits["original"], hits["erased"], strict=True):
            row["hits"][convention.name] = {"original": bool(before), "erased": bool(after)}
        yield {
            "convention": convention.name,
            **{role: Rate.of(role, hits[role]).as_dict() for role in ROLES},
            "change": Change.of(hits["original"], hits["erased"]).as_dict(),
        }


@dataclass(frozen=True)
class Fits:
    """How well each text fits each picture, by the CLIP model of this name.

    cosines: (pictures, distinct texts) by role. own: of each picture the place of its own text.
    """

    by: str
    cosines: Mapping[str, np.ndarray]
    own: np.ndarray

    @classmethod
    def of(cls, clip: Clip, texts: Sequence[str], images: Mapping[str, np.ndarray]) -> "Fits":
        """Of these pictures and their texts in order, of which there may be more than pictures."""
        distinct = list(dict.fromkeys(texts))
        known = clip.texts(distinct)
        cosines = {role: similarity(images[role], known) for role in ROLES}
        own = [distinct.index(text) for text in texts[: len(images["erased"])]]
        return cls(clip.name, cosines, np.array(own))

    @property
    def scores(self) -> dict[str, np.ndarray]:
        """CLIP scores: 100 times the cosine of each picture and its own text."""
        return {role: 100 * self.cosines[role][np.arange(len(self.own)), self.own] for role in ROLES}

    @property
    def best(self) -> dict[str, np.ndarray]:
        """Whether a picture's own text fits it best of all."""
        return {role: self.cosines[role].argmax(1) == self.own for role in ROLES}


def clip_scores(fits: Fits, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The mean CLIP scores and their change."""
    scores = fits.scores
    for place, row in enumerate(rows):
        row["clip_score"] = {role: float(scores[role][place]) for role in ROLES}
    change = mean_change(scores["original"], scores["erased"])
    return {"by": fits.by, **{role: float(scores[role].mean()) for role in ROLES}, "change": change}


def objects_visible(
    suite: Suite, judge: Loaded, store: ScoreStore, keys: Mapping[str, Sequence[str]]
) -> dict[str, np.ndarray]:
    """Whether the judge sees every class in a picture that has to survive there."""
    assert suite.objects is not None
    labels, (threshold, *_) = list(judge.detector.labels), judge.detector.thresholds
    return {
        role: np.array(
            [
                all(store[key][labels.index(name)] >= threshold for name in objects)
                for key, objects in zip(keys[role], suite.objects, strict=True)
            ]
        )
        for role in ROLES
    }


def preservation(
    how: str,
    shown: Mapping[str, np.ndarray],
    rows: Sequence[dict[str, Any]],
    groups: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Accuracy of both checkpoints, and how much of what the original shows the erased one shows too.

    groups: a name for each picture, by which the latter is told apart as well.
    """
    before, after = shown["original"], shown["erased"]
    for row, old, new in zip(rows, before, after, strict=True):
        row["shown"] = {"original": bool(old), "erased": bool(new)}
    names = np.array(groups or ())
    apart = {
        name: Rate.of(name, after[before & (names == name)]).as_dict() for name in sorted(set(groups or ()))
    }
    return {
        "by": how,
        "accuracy": {role: Rate.of(role, shown[role]).as_dict() for role in ROLES},
        "kept": Rate.of("kept", after[before]).as_dict(),
        "change": Change.of(before, after).as_dict(),
    } | ({"groups": apart} if groups else {})


def frechet(
    evaluation: Evaluation,
    suite: Suite,
    extractor: Extractor,
    features: Mapping[str, np.ndarray],
    sized: ImageRecord,
) -> Iterator[dict[str, Any]]:
    """Distances of both checkpoints' pictures to a reference: the original's own, and real ones if given."""
    told = {"features": extractor.name, "width": features["erased"].shape[1], "files": dict(extractor.files)}
    references: list[tuple[str, np.ndarray, tuple[str, ...]]] = [
        ("the original's own images", features["original"], ("erased",))
    ]
    if evaluation.real and suite.role != "attack":
        real = real_features(evaluation.real, extractor, (sized.width, sized.height))
        references.append((f"real images in {evaluation.real.name}", real, ROLES))
    for name, reference, roles in references:
        yield {
            **told,
            "reference": name,
            "samples": {"reference": len(reference), "drawn": len(features["erased"])},
            **{role: frechet_distance(features[role], reference) for role in roles},
        }


def real_features(folder: Path, extractor: Extractor, size: tuple[int, int]) -> np.ndarray:
    """Features of the real pictures in a folder, cut to the middle and scaled to the size that was drawn."""
    found = []
    paths = pictures_in(folder, "real pictures", fewest=2)
    for start in range(0, len(paths), BATCH):
        images = []
        for path in paths[start : start + BATCH]:
            images.append(np.asarray(ImageOps.fit(load(path), size, Image.Resampling.LANCZOS)))
        found.append(extractor.features(np.stack(images)))
    return np.concatenate(found)


def figures(suites: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """All figures of the erased checkpoint by name, as gates name them; see docs/results.md."""
    found: dict[str, float | None] = {}
    for suite in suites:
        name = suite["name"]
        for number, verdict in enumerate(suite["asr"]):
            if number == 0:
                found |= share(f"asr.{name}", verdict["erased"])
            found |= share(f"asr.{name}[{verdict['convention']}]", verdict["erased"])
        if "kept" in suite:
            found |= share(f"{name}.kept", suite["kept"]["kept"])
            found |= share(f"{name}.accuracy", suite["kept"]["accuracy"]["erased"])
            for group, rate in suite["kept"].get("groups", {}).items():
                found |= share(f"{name}.kept[{group}]", rate)
        if "clip_score" in suite:
            found[f"{name}.clip_score"] = suite["clip_score"]["erased"]
        for distance in reversed(suite["frechet"]):  # the first extractor's is the headline
            real = "_real" if distance["reference"].startswith("real") else ""
            found[f"{name}.frechet{real}"] = distance["erased"]
        found[f"{name}.change"] = suite["change"]["mean"]
    return found


def share(name: str, rate: Mapping[str, Any]) -> dict[str, float | None]:
    """A rate's share under its name, and the ends of its interval; those of no pictures say nothing."""
    ends = {end: rate[end] if rate["total"] else None for end in ("low", "high")}
    return {name: rate["share"], **{f"{name}.{end}": value for end, value in ends.items()}}
