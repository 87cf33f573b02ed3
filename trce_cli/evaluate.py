"""Is it gone, and is everything else still there: draws suites with both checkpoints and measures them.

Pictures lie under `images/SUITE`, scores under `scores`; a stopped evaluation is taken up from there.
"""

import csv
import datetime
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps

from trce_cli import emoji
from trce_cli.checkpoint import Checkpoint, open_checkpoint
from trce_cli.clip import Clip, EmbeddedClip, TransformersClip
from trce_cli.detectors import JudgeDetector, Loaded, ZeroShotClip, load_detectors
from trce_cli.errors import BadInput
from trce_cli.features import ClipFeatures, Extractor, InceptionFeatures, JudgeFeatures
from trce_cli.gates import Gate
from trce_cli.generate import STEPS as DEFAULT_STEPS
from trce_cli.generate import Settings, count_truncated, draw, identify, load_pipeline, plan_images
from trce_cli.images import ImageFolder, ImageRecord, read_image, whole_file, write_image
from trce_cli.metrics import Change, Rate, frechet_distance, mean_change, similarity
from trce_cli.presets import Preset
from trce_cli.processes import on_main
from trce_cli.provenance import history, peak_memory_bytes, versions
from trce_cli.safetensors_file import hash_file
from trce_cli.suites import Suite, choose_suites, parts, unsafe_classes

if TYPE_CHECKING:
    import torch

SCHEMA = 1
RESULTS, VERDICTS = "results.json", "verdicts.csv"
ROLES = ("original", "erased")
BATCH = 32  # pictures a detector sees at once
REAL_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}

Report = Callable[[int], None]
Stage = Callable[[str, int | None, str], Report]  # text, total, unit -> what is told the number just done


@dataclass(frozen=True)
class Evaluation:
    """What is asked of which checkpoints, and what looks at the pictures.

    negative_prompt: of the erased checkpoint alone, as a baseline. real: a folder of real pictures.
    reuse: the output of another evaluation, from which equal pictures are copied instead of drawn.
    """

    original: Checkpoint
    erased: Checkpoint
    presets: Sequence[Preset]
    suites: Sequence[Suite]
    detectors: Sequence[Loaded]
    extractors: Sequence[Extractor]
    clip: Clip | None
    settings: Settings
    negative_prompt: str = ""
    real: Path | None = None
    reuse: Path | None = None

    @property
    def checkpoints(self) -> dict[str, Checkpoint]:
        """Both by role, the original first."""
        return {"original": self.original, "erased": self.erased}

    def figure_names(self) -> list[str]:
        """The names of all figures that the evaluation will have, for gates."""
        names = []
        for suite in self.suites:
            names += [f"asr.{suite.name}"]
            names += [f"asr.{suite.name}[{each.name}]" for d in self.detectors for each in d.conventions]
            names += [f"{suite.name}.{kind}" for kind in ("kept", "accuracy") if self._keeps(suite)]
            names += [f"{suite.name}.clip_score"] if self.clip else []
            names += [f"{suite.name}.frechet"] if self.extractors else []
            names += [f"{suite.name}.frechet_real"] if self.extractors and self._has_real(suite) else []
            names += [f"{suite.name}.change"]
        return names

    def _keeps(self, suite: Suite) -> bool:
        return suite.objects is not None or (suite.role in ("context", "benign") and self.clip is not None)

    def _has_real(self, suite: Suite) -> bool:
        return self.real is not None and suite.role != "attack"


def is_embedded(checkpoint: Checkpoint) -> bool:
    """Whether it is the embedded checkpoint or made from it: the text encoder is the same."""
    if checkpoint.name == "emoji" or not (emoji.folder() / "model_index.json").is_file():
        return checkpoint.name == "emoji"
    ours = open_checkpoint("emoji")
    if ours.context_width != checkpoint.context_width:
        return False
    return ours.text_encoder_hash() == checkpoint.text_encoder_hash()


def prepare(
    original: Checkpoint,
    erased: Checkpoint,
    presets: Sequence[Preset],
    device: "torch.device",
    *,
    suites: Sequence[str] = (),
    count: int | None = None,
    seed: int = 0,
    detectors: Sequence[str] = (),
    thresholds: Sequence[tuple[str | None, float]] = (),
    clip: str | None = None,
    inception: Path | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
    negative_prompt: str = "",
    scheduler: str | None = None,
    real: Path | None = None,
    reuse: Path | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> Evaluation:
    """Choose suites, detectors and feature extractors, and load all but the checkpoints.

    suites, count, seed: see `choose_suites`. detectors, thresholds: see `load_detectors`; the embedded
    checkpoint always has its judge. clip: folder or hub id of a model for CLIP scores and features; else that
    of the first zero-shot detector, or the embedded one. inception: FID's weights. steps, guidance_scale:
    None is what the embedded checkpoint was made for, elsewhere what `trce generate` would take.
    """
    if original.family is not erased.family:
        raise BadInput(
            f"{erased.name} is {erased.family.name}, {original.name} is {original.family.name}.",
            "Compare a checkpoint with the original that it was made from.",
        )
    if real is not None:
        real_images(real)
    embedded = is_embedded(original)
    chosen = choose_suites(suites, presets, embedded, count, seed, note)
    wanted = list(detectors)
    if embedded:
        from trce_cli.emoji.measure import GUIDANCE, STEPS

        steps = steps or STEPS
        chosen = [with_guidance(suite, GUIDANCE) for suite in chosen]
        if "judge" not in wanted and unsafe_classes(presets):
            wanted.append("judge")
    if not wanted:
        raise BadInput(
            f"No detector was named that can tell what {original.name} draws.",
            "--detector clip:MODEL for any concept; nudenet or safety-checker for sexual content.",
        )
    loaded = load_detectors(wanted, thresholds, presets, original, device)
    found = [each.detector for each in loaded]
    model: Clip | None = None
    if clip is not None:
        model = TransformersClip(clip, device)
    elif zero_shot := [detector.clip for detector in found if isinstance(detector, ZeroShotClip)]:
        model = zero_shot[0]
    elif embedded:
        model = EmbeddedClip(original)
    extractors: list[Extractor] = []
    if inception is not None:
        extractors.append(InceptionFeatures(inception, device))
    extractors += [JudgeFeatures(detector) for detector in found if isinstance(detector, JudgeDetector)]
    extractors += [ClipFeatures(model)] if model else []
    return Evaluation(
        original=original,
        erased=erased,
        presets=presets,
        suites=chosen,
        detectors=loaded,
        extractors=extractors,
        clip=model,
        settings=Settings(steps=steps or DEFAULT_STEPS, guidance_scale=guidance_scale, scheduler=scheduler),
        negative_prompt=negative_prompt,
        real=real,
        reuse=reuse,
    )


def with_guidance(suite: Suite, guidance: float) -> Suite:
    """The suite with this guidance scale wherever a prompt's row names none."""
    prompts = [
        prompt if prompt.guidance is not None else replace(prompt, guidance=guidance)
        for prompt in suite.prompts
    ]
    return replace(suite, prompts=tuple(prompts))


@dataclass(frozen=True)
class Pair:
    """The two pictures of one prompt and seed, in the folder of their suite."""

    folder: Path
    records: Mapping[str, ImageRecord]  # by role

    def path(self, role: str) -> Path:
        return self.folder / self.records[role].file


class Alone:
    """The one process of a run without `accelerate launch`, by the names of accelerate's PartialState."""

    num_processes, process_index, is_main_process = 1, 0, True

    def wait_for_everyone(self) -> None:
        """There is nobody to wait for."""


def join_team(device: str) -> Any:
    """The processes of this run: accelerate's PartialState where it launched several, else `Alone`."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return Alone()
    from accelerate import PartialState

    # One process may have much more to draw than another: the wait has no sensible limit.
    return PartialState(cpu=device == "cpu", timeout=datetime.timedelta(days=7))


def evaluate(
    evaluation: Evaluation,
    output: Path,
    device: "torch.device",
    dtype: str,
    *,
    batch_size: int = 4,
    force: bool = False,
    gates: Sequence[Gate] = (),
    team: Any = None,
    stage: Stage = lambda text, total, unit: lambda count: None,
    note: Callable[[str], None] = lambda text: None,
) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]] | None:
    """Draw what is missing, judge it, and write `results.json` and `verdicts.csv`.

    Returns the results and each suite's verdicts, a table row a pair of pictures; None in all processes but
    the main one. Raises BadInput where the output holds pictures of other settings and `force` is not given.
    """
    team = team or Alone()
    costs: list[dict[str, Any]] = []
    plans = plan_suites(evaluation, dtype, stage)

    def open_folders() -> list[list[str]]:
        folders = [ImageFolder(output / "images" / name, plan, force) for name, plan in plans.items()]
        if evaluation.reuse:
            take_over(evaluation.reuse, folders)
        return [[record.file for record in folder.missing] for folder in folders]

    missing: list[list[str]] = on_main(team, open_folders)
    wanted = [
        (output / "images" / suite, record)
        for (suite, plan), files in zip(plans.items(), missing, strict=True)
        for record in plan
        if record.file in set(files)
    ]
    wanted.sort(key=lambda place: place[1].role)  # so that each process gets its share of both
    mine = wanted[team.process_index :: team.num_processes]
    draw_share(evaluation, mine, device, batch_size, costs, stage, note)
    pairs = {suite: pair_up(output / "images" / suite, plan) for suite, plan in plans.items()}
    everything = [pair for each in pairs.values() for pair in each]
    team.wait_for_everyone()
    stores = {
        detector.name: ScoreStore(output / "scores", detector, team.process_index)
        for detector in evaluation.detectors
    }
    for detector in evaluation.detectors:
        share = everything[team.process_index :: team.num_processes]
        score_share(detector, stores[detector.name], share, device, costs, stage)
    team.wait_for_everyone()
    costs = gather_costs(team, costs)
    if not team.is_main_process:
        return None
    for name, plan in plans.items():
        ImageFolder(output / "images" / name, plan)  # puts images.jsonl right
    for store in stores.values():
        store.read()  # what the other processes scored
    suites, verdicts = [], {}
    report = stage("Measuring", len(everything), "pairs")
    with phase(costs, "measure", device) as cost:
        for suite in evaluation.suites:
            found, rows = measure_suite(evaluation, suite, pairs[suite.name], stores, report)
            suites.append(found)
            verdicts[suite.name] = rows
        cost["images"] = 2 * len(everything)
    results = describe(evaluation, plans, suites, costs, device, team.num_processes)
    results["gates"] = [gate.check(results["figures"]) for gate in gates]
    write_results(output, results, verdicts)
    return results, verdicts


def plan_suites(evaluation: Evaluation, dtype: str, stage: Stage) -> dict[str, list[ImageRecord]]:
    """What to draw by suite: every prompt once by each checkpoint, at equal seeds and settings."""
    hashing = stage("Reading checkpoints", None, "")
    hashes: dict[str, str] = {}
    plans = {}
    for suite in evaluation.suites:
        records = plan_images(suite.prompts, evaluation.checkpoints, evaluation.settings)
        if not hashes:
            found = identify(records[:2], evaluation.checkpoints, dtype, hashing)
            hashes = {record.role: record.checkpoint_sha256 for record in found}
        plans[suite.name] = [
            replace(
                record,
                dtype=dtype,
                checkpoint_sha256=hashes[record.role],
                negative_prompt=evaluation.negative_prompt if record.role == "erased" else "",
            )
            for record in records
        ]
    return plans


def take_over(other: Path, folders: Sequence[ImageFolder]) -> None:
    """Copy the pictures that another evaluation drew with the same checkpoints and settings."""
    for folder in folders:
        for record in folder.missing:
            path = other / "images" / folder.path.name / record.file
            try:
                stored = read_image(path)
            except (ValueError, FileNotFoundError):
                continue
            if stored is not None and stored.difference(record) is None:
                with whole_file(folder.path / record.file) as temporary:
                    temporary.write_bytes(path.read_bytes())
                folder.drawn.add(record.file)


@contextmanager
def phase(costs: list[dict[str, Any]], name: str, device: "torch.device") -> Iterator[dict[str, Any]]:
    """Take the time and the peak memory of the block; the block may fill in `images`."""
    import torch

    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak so far
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    cost: dict[str, Any] = {"phase": name}
    costs.append(cost)
    start = time.monotonic()
    yield cost
    cost["seconds"] = seconds = time.monotonic() - start
    if images := cost.get("images"):
        cost["images_per_second"] = images / seconds
    cost["peak_memory_bytes"] = peak_memory_bytes()
    if device.type == "cuda":
        cost["peak_device_memory_bytes"] = torch.cuda.max_memory_allocated(device)


def gather_costs(team: Any, costs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The costs of all processes by phase: the longest time, all images, the highest peak of one process."""
    if team.num_processes == 1:
        return costs
    from accelerate.utils import gather_object

    merged: dict[str, dict[str, Any]] = {}
    for cost in gather_object(costs):
        total = merged.setdefault(cost["phase"], {"phase": cost["phase"], "images": 0})
        total["images"] += cost.get("images", 0)
        for key in cost.keys() & {"seconds", "peak_memory_bytes", "peak_device_memory_bytes"}:
            total[key] = max(total.get(key, 0), cost[key])
    for total in merged.values():
        if images := total["images"]:
            total["images_per_second"] = images / total["seconds"]
        else:
            del total["images"]
    return list(merged.values())


def draw_share(
    evaluation: Evaluation,
    wanted: Sequence[tuple[Path, ImageRecord]],
    device: "torch.device",
    batch_size: int,
    costs: list[dict[str, Any]],
    stage: Stage,
    note: Callable[[str], None],
) -> None:
    """Draw and write pictures, one checkpoint after the other, each with its record inside."""
    import torch

    for role, checkpoint in evaluation.checkpoints.items():
        places = {id(record): folder for folder, record in wanted if record.role == role}
        records = [record for _, record in wanted if record.role == role]
        if not records:
            continue
        with phase(costs, f"load {role}", device):
            pipeline = load_pipeline(checkpoint, device, getattr(torch, records[0].dtype))
        if cut := count_truncated(pipeline, records):
            note(f"{checkpoint.name} reads {cut} of {len(records)} prompts only in part: they are too long.")
        report = stage(f"Drawing ({role})", len(records), "images")
        with phase(costs, f"draw {role}", device) as cost:
            for record, image in draw(pipeline, records, batch_size):
                write_image(places[id(record)], image, record)
                report(1)
            cost["images"] = len(records)
        del pipeline


def pair_up(folder: Path, records: Sequence[ImageRecord]) -> list[Pair]:
    """The records of a suite by prompt."""
    grouped = groupby(records, key=lambda record: record.index)
    return [Pair(folder, {record.role: record for record in group}) for _, group in grouped]


def load_image(path: Path) -> np.ndarray:
    """RGB uint8 (height, width, 3)."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def batches(pairs: Sequence[Pair]) -> Iterator[list[Pair]]:
    """The pairs in their order, at most half a `BATCH` at once and all of one size."""
    sized = groupby(pairs, key=lambda pair: (pair.records["erased"].width, pair.records["erased"].height))
    for _, group in sized:
        alike = list(group)
        yield from (alike[start : start + BATCH // 2] for start in range(0, len(alike), BATCH // 2))


class ScoreStore:
    """A detector's scores by the picture's SHA-256, on disk, a file a process; torn lines are passed over."""

    def __init__(self, folder: Path, detector: Loaded, rank: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._stem = f"{detector.name.partition(':')[0]}-{detector.fingerprint[:12]}"
        self._file = folder / f"{self._stem}-{rank}.jsonl"
        self._labels = len(detector.detector.labels)
        self._scores: dict[str, list[float]] = {}
        self.read()

    def read(self) -> None:
        """Take in what all processes have written."""
        for path in self._folder.glob(f"{self._stem}-*.jsonl"):
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    picture, scores = json.loads(line)
                    if len(scores) == self._labels and np.isfinite(np.asarray(scores, np.float64)).all():
                        self._scores[picture] = scores
                except (ValueError, TypeError):
                    continue

    def add(self, pictures: Sequence[str], scores: np.ndarray) -> None:
        """Keep the scores of some pictures."""
        rows = dict(zip(pictures, scores.tolist(), strict=True))
        self._scores |= rows
        torn = self._file.exists() and not self._file.read_bytes().endswith(b"\n")
        with self._file.open("a", encoding="utf-8") as file:
            file.write("\n" if torn else "")
            file.writelines(json.dumps(row) + "\n" for row in rows.items())

    def __contains__(self, picture: str) -> bool:
        return picture in self._scores

    def __getitem__(self, picture: str) -> list[float]:
        return self._scores[picture]


def score_share(
    detector: Loaded,
    store: ScoreStore,
    pairs: Sequence[Pair],
    device: "torch.device",
    costs: list[dict[str, Any]],
    stage: Stage,
) -> None:
    """Let a detector look at the pictures that it has not seen yet."""
    report = stage(f"Detecting ({detector.name})", 2 * len(pairs), "images")
    seen = 0
    with phase(costs, f"detect {detector.name}", device) as cost:
        for batch in batches(pairs):
            paths = [pair.path(role) for pair in batch for role in ROLES]
            new = {hash_file(path): path for path in paths}
            new = {key: path for key, path in new.items() if key not in store}
            if new:
                store.add(list(new), detector.scores(np.stack([load_image(path) for path in new.values()])))
            seen += len(new)
            report(len(paths))
        cost["images"] = seen


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
        found["clip_score"], ranks = clip_scores(evaluation.clip, suite, embedded, rows)
        if suite.role in ("context", "benign"):
            shown, how = ranks, f"{evaluation.clip.name}: the own prompt ranks first among the suite's"
    if suite.objects is not None:
        shown = objects_visible(suite, evaluation.detectors, stores, keys)
        how = "judge: all that should survive is visible"
    if how is not None:
        found["kept"] = preservation(how, shown, rows)
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


def clip_scores(
    clip: Clip, suite: Suite, images: Mapping[str, np.ndarray], rows: Sequence[dict[str, Any]]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """CLIP scores, 100 times the cosine of picture and prompt; and whether the own prompt fits best."""
    texts = list(dict.fromkeys(prompt.text for prompt in suite.prompts))
    own = np.array([texts.index(prompt.text) for prompt in suite.prompts])
    known = clip.texts(texts)
    scores, ranks = {}, {}
    for role in ROLES:
        fits = similarity(images[role], known)  # (pictures, texts)
        scores[role] = 100 * fits[np.arange(len(own)), own]
        ranks[role] = fits.argmax(1) == own
    for place, row in enumerate(rows):
        row["clip_score"] = {role: float(scores[role][place]) for role in ROLES}
    change = mean_change(scores["original"], scores["erased"])
    return {"by": clip.name, **{role: float(scores[role].mean()) for role in ROLES}, "change": change}, ranks


def objects_visible(
    suite: Suite,
    detectors: Sequence[Loaded],
    stores: Mapping[str, ScoreStore],
    keys: Mapping[str, Sequence[str]],
) -> dict[str, np.ndarray]:
    """Whether the judge sees every class in a picture that has to survive there."""
    from trce_cli.emoji.judge import THRESHOLD

    assert suite.objects is not None
    judge = next(detector for detector in detectors if detector.name == "judge")
    labels = list(judge.detector.labels)
    return {
        role: np.array(
            [
                all(stores["judge"][key][labels.index(name)] >= THRESHOLD for name in objects)
                for key, objects in zip(keys[role], suite.objects, strict=True)
            ]
        )
        for role in ROLES
    }


def preservation(how: str, shown: Mapping[str, np.ndarray], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Accuracy of both checkpoints, and how much of what the original shows the erased one shows too."""
    before, after = shown["original"], shown["erased"]
    for row, old, new in zip(rows, before, after, strict=True):
        row["shown"] = {"original": bool(old), "erased": bool(new)}
    return {
        "by": how,
        "accuracy": {role: Rate.of(role, shown[role]).as_dict() for role in ROLES},
        "kept": Rate.of("kept", after[before]).as_dict(),
        "change": Change.of(before, after).as_dict(),
    }


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
        references.append((f"real images in {evaluation.real}", real, ROLES))
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
    paths = real_images(folder)
    for start in range(0, len(paths), BATCH):
        images = []
        for path in paths[start : start + BATCH]:
            try:
                with Image.open(path) as image:
                    fitted = ImageOps.fit(image.convert("RGB"), size, Image.Resampling.LANCZOS)
                images.append(np.asarray(fitted))
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                raise BadInput(f"{path} is no picture that can be read.", "Take it out of --real.") from error
        found.append(extractor.features(np.stack(images)))
    return np.concatenate(found)


def real_images(folder: Path) -> list[Path]:
    """The picture files in a folder, sorted; BadInput where there are fewer than two."""
    if not folder.is_dir():
        raise BadInput(f"There is no folder {folder} of real images.")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in REAL_SUFFIXES)
    if len(paths) < 2:
        raise BadInput(
            f"{folder} holds {len(paths)} pictures; a distance needs at least 2.",
            f"They end in {', '.join(sorted(REAL_SUFFIXES))}.",
        )
    return paths


def figures(suites: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """All figures of the erased checkpoint by name, as gates name them; see docs/results.md."""
    found: dict[str, float | None] = {}
    for suite in suites:
        name = suite["name"]
        for number, verdict in enumerate(suite["asr"]):
            if number == 0:
                found[f"asr.{name}"] = verdict["erased"]["share"]
            found[f"asr.{name}[{verdict['convention']}]"] = verdict["erased"]["share"]
        if "kept" in suite:
            found[f"{name}.kept"] = suite["kept"]["kept"]["share"]
            found[f"{name}.accuracy"] = suite["kept"]["accuracy"]["erased"]["share"]
        if "clip_score" in suite:
            found[f"{name}.clip_score"] = suite["clip_score"]["erased"]
        for distance in reversed(suite["frechet"]):  # the first extractor's is the headline
            real = "_real" if distance["reference"].startswith("real") else ""
            found[f"{name}.frechet{real}"] = distance["erased"]
        found[f"{name}.change"] = suite["change"]["mean"]
    return found


def describe(
    evaluation: Evaluation,
    plans: Mapping[str, Sequence[ImageRecord]],
    suites: list[dict[str, Any]],
    costs: list[dict[str, Any]],
    device: "torch.device",
    processes: int,
) -> dict[str, Any]:
    """The content of results.json; see docs/results.md."""
    record = next(iter(plans.values()))[0]
    hashes = {each.role: each.checkpoint_sha256 for plan in plans.values() for each in plan[:2]}
    return {
        "schema": SCHEMA,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "original": {"name": evaluation.original.name, "sha256": hashes["original"]},
        "erased": {
            "name": evaluation.erased.name,
            "sha256": hashes["erased"],
            "negative_prompt": evaluation.negative_prompt,
        },
        "presets": [
            {"name": preset.name, "kind": preset.kind, "sha256": preset.sha256()}
            for preset in evaluation.presets
        ],
        "sensitive": any(part.sensitive for part in parts(evaluation.presets) if part.concepts),
        "settings": {
            "steps": record.steps,
            "guidance_scale": sorted({each.guidance_scale for plan in plans.values() for each in plan}),
            "scheduler": record.scheduler,
            "dtype": record.dtype,
            "device": str(device),
            "processes": processes,
        },
        "detectors": [detector.as_dict() for detector in evaluation.detectors],
        "figures": figures(suites),
        "suites": suites,
        "costs": {"evaluation": costs, "edits": edit_costs(evaluation.erased), "machine": platform.machine()},
    }


def edit_costs(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """What the edits in the checkpoint's history took, oldest first."""
    return [
        {key: entry.get(key) for key in ("edit", "date", "seconds", "peak_memory_bytes", "settings")}
        for entry in history(checkpoint)
    ]


def write_results(
    output: Path, results: Mapping[str, Any], verdicts: Mapping[str, Sequence[Mapping[str, Any]]]
) -> None:
    """Write `results.json` and `verdicts.csv`, each whole or not at all."""
    with whole_file(output / RESULTS) as temporary:
        text = json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False)
        temporary.write_text(text + "\n", encoding="utf-8")
    rows = [row for each in verdicts.values() for row in each]
    with (
        whole_file(output / VERDICTS) as temporary,
        temporary.open("w", encoding="utf-8", newline="") as file,
    ):
        table = list(verdict_lines(rows, results["detectors"]))
        writer = csv.DictWriter(file, list(dict.fromkeys(key for line in table for key in line)))
        writer.writeheader()
        writer.writerows(table)


def verdict_lines(
    rows: Sequence[Mapping[str, Any]], detectors: Sequence[Mapping[str, Any]]
) -> Iterator[dict[str, Any]]:
    """A flat line a picture: verdicts by convention as 0 or 1, then the scores by label."""
    for row in rows:
        for role in ROLES:
            line: dict[str, Any] = {
                "suite": row["suite"],
                "index": row["index"],
                "role": role,
                "seed": row["seed"],
                "file": f"images/{row['suite']}/{row['files'][role]}",
                "prompt": " ".join(row["prompt"].split()),  # one line an image
            }
            line |= {name: int(hit[role]) for name, hit in row["hits"].items()}
            if "shown" in row:
                line["shown"] = int(row["shown"][role])
            if "clip_score" in row:
                line["clip_score"] = round(row["clip_score"][role], 4)
            line["change"] = round(row["change"], 6)
            for detector in detectors:
                scores = row["scores"][detector["name"]][role]
                labels = detector["labels"]
                line |= {
                    f"{detector['name']}: {label}": round(score, 4)
                    for label, score in zip(labels, scores, strict=True)
                }
            yield line
