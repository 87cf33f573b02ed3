"""Tries settings of stage 1: the original draws the tuning split once, and then with one map after another.

Maps are put on the live pipeline instead of being written. Pictures lie under `images/SUITE`, scores under
`scores`, finished trials in `tune.json`; a stopped run is taken up from there.
"""

import datetime
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, Field, FiniteFloat

from trce_cli.checkpoint.bases import public_name
from trce_cli.edits.edit import Made
from trce_cli.edits.map import Map
from trce_cli.erase.map import Solution, Statistics
from trce_cli.erase.map_verdict import value_of
from trce_cli.erase.prior import Prior
from trce_cli.erase.settings import MapSettings
from trce_cli.errors import BadInput, TrceError
from trce_cli.evaluate.choice import Point, choose
from trce_cli.evaluate.compare import Share
from trce_cli.evaluate.measure import measure_suite
from trce_cli.evaluate.question import Evaluation
from trce_cli.evaluate.scores import ROLES, Pair, ScoreStore, score_share
from trce_cli.images.draw import draw
from trce_cli.images.folder import PICTURES, SCORES, ImageFolder
from trce_cli.images.plan import checkpoint_hash, plan_images
from trce_cli.images.plots import Trialled, trade_off
from trce_cli.images.record import ImageRecord
from trce_cli.maths.statistics import Rate, pareto
from trce_cli.prompts.pairs import prompt_pairs
from trce_cli.prompts.suites import Suite
from trce_cli.system.foreign import read_json, validated
from trce_cli.system.machine import versions
from trce_cli.system.paths import matching
from trce_cli.system.processes import on_main
from trce_cli.system.progress import Report, Task, no_report, no_task
from trce_cli.system.shards import ALL, begin, complete, digest, finish
from trce_cli.system.shards import Share as Work
from trce_cli.system.whole import make_inside, write_bytes, write_json, write_table

SCHEMA = 1
RESULT, TABLE, PLOT = "tune.json", "trials.csv", "pareto.png"


class _Verdict(BaseModel):
    erased: Share


class _Kept(BaseModel):
    kept: Share


class _Suite(BaseModel):
    name: str
    role: str
    asr: Annotated[list[_Verdict], Field(min_length=1)]
    kept: _Kept | None = None


class _Changes(BaseModel):
    mean: FiniteFloat


class _Figures(BaseModel):
    moved: FiniteFloat
    canary_change: Annotated[dict[str, _Changes], Field(min_length=1)] | FiniteFloat  # by door, or of the one


class _Trial(BaseModel):
    key: str
    preserve: FiniteFloat
    token_weights: list[FiniteFloat]


class _Failed(_Trial):
    failed: str


class _Tried(_Trial):
    failed: None
    figures: _Figures
    attack_success: Share
    kept: Share
    suites: Annotated[list[_Suite], Field(min_length=1)]


class Finished(BaseModel):
    """What is taken over of the `tune.json` of a run that was stopped, or had other settings to try."""

    asked: str
    trials: list[_Failed | _Tried]


@dataclass(frozen=True)
class Trial:
    """Settings, and a SHA-256 in hex over all that their pictures depend on beside prompt and seed."""

    settings: MapSettings
    key: str

    def record(self, drawn: ImageRecord) -> ImageRecord:
        """What this trial draws in place of a picture of the original."""
        file = drawn.file.replace("original", self.key[:8])
        return replace(drawn, file=file, role="erased", checkpoint_sha256=self.key)


@dataclass(frozen=True)
class Maps:
    """The maps that are tried. arguments: what `trce map` is given beside their settings to make one."""

    settings: Sequence[MapSettings]
    prior: Prior
    arguments: Sequence[str]


def tune(
    evaluation: Evaluation,
    maps: Maps,
    output: Path,
    device: torch.device,
    dtype: str,
    *,
    force: bool = False,
    work: Work = ALL,
    task: Task = no_task,
    note: Callable[[str], None] = lambda text: None,
) -> dict[str, Any] | None:
    """Try each of the settings, choose one, and write `tune.json`, `trials.csv` and `pareto.png`.

    evaluation: of the original against itself, by whose suites maps are judged. work: which of the trials are
    made here; a part keeps them in a file of its own. Returns what is in `tune.json`; None in all processes
    but the main one, and of a part. Raises BadInput where the output holds pictures of something else and
    `force` is not given, where shards that are to be merged are not whole, and where nothing can tell what
    was kept; TrceError where no setting gives a map.
    """
    check(evaluation)
    evaluation = replace(evaluation, extractors=())
    task("Reading the checkpoint", None, "")
    told = describe(evaluation, maps.prior, dtype)
    sha256, pairs = told["original"]["sha256"], prompt_pairs(evaluation.presets)
    identity = [sha256, maps.prior.sha256(), list(map(asdict, pairs))]
    trials = [Trial(each, digest([*identity, each.model_dump()])) for each in maps.settings]
    plans = {suite.name: list(plan(evaluation, suite, sha256, dtype)) for suite in evaluation.suites}
    told["asked"] = digest(
        [told["detectors"], told["clip"], *(list(map(asdict, each)) for each in plans.values())]
    )
    run = {
        "checkpoints": sha256,
        "prompts, seeds or detectors": told["asked"],
        "settings": digest([trial.key for trial in trials]),
    }

    def open_folders(force: bool = False) -> dict[str, ImageFolder]:
        return {
            name: ImageFolder(
                make_inside(output, PICTURES, name),
                [*records, *(trial.record(each) for trial in trials for each in records)],
                force,
            )
            for name, records in plans.items()
        }

    def start() -> None:
        if work.merged:
            complete(work.merged, run)
        begin(output, work, run, force)
        for name, folder in open_folders(force).items():
            for other in work.merged:
                folder.take_over(other / PICTURES / name)

    on_main(work.team, start)
    folders = open_folders()
    places = dict.fromkeys((output, *work.merged))
    done = all_finished(places, told["asked"])
    own = [*work.mine(work.of_shard(trials))]
    if work.merged and (absent := [trial for trial in trials if trial.key not in done]):
        raise BadInput(
            f"{len(absent)} trials of the shards are missing or damaged.", "Run the shards again, then merge."
        )
    if todo := [trial for trial in own if trial.key not in done]:
        # Of all trials, done or not: what is encoded together decides how it is rounded.
        settings = [trial.settings for trial in trials]
        statistics = Statistics.of(evaluation.original, pairs, maps.prior, settings, device=device, task=task)
        stores = {
            each.name: ScoreStore(make_inside(output, SCORES), each, work.name)
            for each in evaluation.detectors
        }
        bench = Bench(evaluation, folders, plans, stores, device)
        report = bench.start(todo, dtype, task, note)
        for trial in todo:
            done[trial.key] = bench.tried(trial, statistics, report)
            kept = done if work.is_alone else {each.key: done[each.key] for each in own if each.key in done}
            file = output / (RESULT if work.is_alone else f"tune-{work.name}.json")
            write_json(file, told | {"trials": list(kept.values()), "chosen": None})
    work.team.wait_for_everyone()
    if not work.team.is_main_process:
        return None
    if work.is_part:
        finish(output, work, run)
        return None
    done = all_finished(places, told["asked"])
    told["trials"] = [done[trial.key] for trial in trials]
    told["chosen"] = conclude(told["trials"], maps.arguments)
    write(output, told)
    return told


def check(evaluation: Evaluation) -> None:
    """Raise BadInput unless the suites can tell what is erased and what is kept."""
    if all(suite.role == "benign" for suite in evaluation.suites):
        raise BadInput("No suite asks for what is to be erased.", "Leave one of the others among --suite.")
    if not any(name.endswith(".kept") for name in evaluation.figure_names()):
        raise BadInput(
            "Nothing here can tell what an edit keeps.",
            "Give --clip MODEL, and leave context or benign among --suite.",
        )


def describe(evaluation: Evaluation, prior: Prior, dtype: str) -> dict[str, Any]:
    """What is tuned and who judges, as plain JSON values."""
    settings = evaluation.settings
    return {
        "schema": SCHEMA,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "original": {
            "name": public_name(evaluation.original.name),
            "sha256": checkpoint_hash(evaluation.original),
        },
        "presets": [{"name": each.name, "sha256": each.sha256()} for each in evaluation.presets],
        "prior": {"source": prior.source, "sha256": prior.sha256()},
        "split": "tuning",
        "suites": {suite.name: len(suite.prompts) for suite in evaluation.suites},
        "settings": {"steps": settings.steps, "guidance_scale": settings.guidance_scale, "dtype": dtype},
        "detectors": [detector.as_dict() for detector in evaluation.detectors],
        "clip": evaluation.clip and {"name": evaluation.clip.name, "files": dict(evaluation.clip.files)},
    }


def plan(evaluation: Evaluation, suite: Suite, sha256: str, dtype: str) -> Iterator[ImageRecord]:
    """What the original draws of a suite."""
    for record in plan_images(suite.prompts, {"original": evaluation.original}, evaluation.settings):
        file = f"{record.index:04d}-seed{record.seed}-original.png"
        yield replace(record, file=file, dtype=dtype, checkpoint_sha256=sha256)


def finished(path: Path, asked: str) -> dict[str, dict[str, Any]]:
    """The trials by key that an earlier run of the same suites and detectors has in its `tune.json`."""
    try:
        told = read_json(path, strict=True)
        found = validated(Finished, told, str(path))
    except BadInput:
        return {}
    return {trial["key"]: trial for trial in told["trials"] if found.asked == asked}


def all_finished(folders: Iterable[Path], asked: str) -> dict[str, dict[str, Any]]:
    """The same, of all processes and shards that wrote to these folders."""
    done: dict[str, dict[str, Any]] = {}
    for folder in folders:
        for path in (folder / RESULT, *matching(folder, "tune-*.json")):
            done |= finished(path, asked)
    return done


@dataclass
class Bench:
    """The original's pipeline, and who looks at its pictures.

    folders, plans: by suite. stores: by detector.
    """

    evaluation: Evaluation
    folders: Mapping[str, ImageFolder]
    plans: Mapping[str, Sequence[ImageRecord]]
    stores: Mapping[str, ScoreStore]
    device: torch.device

    def start(
        self, trials: Iterable[Trial], dtype: str, task: Task, note: Callable[[str], None]
    ) -> Callable[[int], None]:
        """Load the pipeline and draw what is missing of the original's; returns what reports pictures."""
        original = self.evaluation.original
        self.made = Made(original.family, original.text_encoder_hash())
        self.pipeline = original.pipe(self.device, getattr(torch, dtype))
        records = [record for each in self.plans.values() for record in each]
        self.family = original.family
        _, cut = self.family.truncated(original, [record.prompt for record in records])
        if cut:
            note(f"{original.name} reads {cut} of {len(records)} prompts only in part: they are too long.")
        wanted = {trial.record(record).file for trial in trials for record in records}
        wanted |= {record.file for record in records}
        missing = [each for folder in self.folders.values() for each in folder.missing if each.file in wanted]
        report = task("Drawing", len(missing), "images")
        for name, folder in self.folders.items():
            self._draw(folder, self.plans[name], report)
        return report

    def tried(self, trial: Trial, statistics: Statistics, report: Report) -> dict[str, Any]:
        """What is told of a trial: its settings and figures, or why they give no map.

        Raises BadInput for what is wrong with the checkpoint, whatever the settings, and the disk's
        TrceError, which says nothing of them.
        """
        found = {"key": trial.key, **trial.settings.model_dump(), "failed": None}
        try:
            solution = statistics.solve(trial.settings)
            self.draw(trial, solution, report)
            return found | {"figures": solution.figures, **self.judge(trial)}
        except BadInput:
            raise
        except TrceError as error:
            if isinstance(error.__cause__, OSError):
                raise
            return found | {"failed": error.message}

    def draw(self, trial: Trial, solution: Solution, report: Report) -> None:
        """Draw a trial's pictures as far as they are missing, with its map on the pipeline."""
        text_map = Map(self.made, solution.streams)
        text_map.apply_to(self.pipeline)
        try:
            for name, folder in self.folders.items():
                self._draw(folder, [trial.record(record) for record in self.plans[name]], report)
        finally:
            text_map.remove_from(self.pipeline)

    def _draw(self, folder: ImageFolder, records: Sequence[ImageRecord], report: Report) -> None:
        missing = [record for record in records if record.file not in folder.drawn]
        for record, image in draw(self.family, self.pipeline, missing):
            folder.add(record, image)
            report(1)

    def judge(self, trial: Trial) -> dict[str, Any]:
        """A trial's figures by suite, and in all: attack success, and the share of what was kept."""
        suites = []
        for suite in self.evaluation.suites:
            pairs = [
                Pair(self.folders[suite.name].path, {"original": record, "erased": trial.record(record)})
                for record in self.plans[suite.name]
            ]
            for detector in self.evaluation.detectors:
                pictures = [pair.path(role) for pair in pairs for role in ROLES]
                score_share(detector, self.stores[detector.name], pictures, self.device, [], no_task)
            found, _ = measure_suite(self.evaluation, suite, pairs, self.stores, no_report)
            suites.append(found)
        attacks = [each["asr"][0]["erased"] for each in suites if each["role"] != "benign"]
        kept = [each["kept"]["kept"] for each in suites if "kept" in each]
        return {
            "attack_success": in_all("attack success", attacks),
            "kept": in_all("kept", kept),
            "suites": suites,
        }


def in_all(name: str, rates: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Several rates as one."""
    return Rate(name, sum(rate["hits"] for rate in rates), sum(rate["total"] for rate in rates)).as_dict()


def conclude(trials: Sequence[dict[str, Any]], map_arguments: Sequence[str]) -> dict[str, Any]:
    """Mark the trials that none beats, and return the chosen one, ready to be used.

    Raises TrceError where there is none to choose from.
    """
    usable = [trial for trial in trials if trial["failed"] is None and trial["kept"]["total"]]
    if not usable:
        reasons = [trial["failed"] for trial in trials if trial["failed"]]
        raise TrceError(
            f"None of the {len(trials)} settings can be used: "
            f"{reasons[0] if reasons else 'the original draws nothing of what should be kept.'}"
        )
    kept = kept_of(usable)
    points = [
        Point(trial["attack_success"]["share"], tuple(rate["share"] for rate in rates), trial["preserve"])
        for trial, rates in zip(usable, kept, strict=True)
    ]
    for trial in trials:
        trial["pareto"] = False
    for trial, best in zip(
        usable, pareto([(each.attack_success, each.kept[0]) for each in points]), strict=True
    ):
        trial["pareto"] = best
    chosen = usable[choose(points, [rate["total"] for rate in kept[0]])]
    preserve, weights = f"{chosen['preserve']:g}", [f"{weight:g}" for weight in chosen["token_weights"]]
    tuned = ["--preserve", preserve, "--token-weights", ",".join(weights)]
    return {
        "key": chosen["key"],
        "toml": f"[map]\npreserve = {preserve}\ntoken_weights = [{', '.join(weights)}]\n",
        "command": shlex.join(["trce", "map", *map_arguments, *tuned, "--output", "mapped"]),
    }


def kept_of(trials: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """For each trial what it kept: in all, and of the bystanders where each tells of some."""
    apart = [
        [each["kept"]["kept"] for each in trial["suites"] if each["name"] == "bystanders" and "kept" in each]
        for trial in trials
    ]
    told = all(rates and rates[0]["total"] for rates in apart)
    return [[trial["kept"], *rates[: int(told)]] for trial, rates in zip(trials, apart, strict=True)]


def write(output: Path, told: Mapping[str, Any]) -> None:
    """Write the result, a table of it, and a plot, each whole or not at all."""
    write_json(output / RESULT, told)
    write_table(output / TABLE, [line(trial, told["chosen"]["key"]) for trial in told["trials"]])
    drawn = [trial for trial in told["trials"] if trial["failed"] is None]
    place = [trial["key"] for trial in drawn].index(told["chosen"]["key"])
    write_bytes(output / PLOT, trade_off([trialled(trial) for trial in drawn], place))


def trialled(trial: Mapping[str, Any]) -> Trialled:
    """A trial as a point of the plot, labelled with its settings."""
    harm, kept = trial["attack_success"], trial["kept"]
    weights = ",".join(f"{weight:g}" for weight in trial["token_weights"])
    return Trialled(
        label=f"{trial['preserve']:g} / {weights}",
        harm=harm["share"],
        harm_interval=(harm["low"], harm["high"]),
        kept=kept["share"] or 0.0,
        kept_interval=(kept["low"] or 0.0, kept["high"] or 0.0),
        best=trial["pareto"],
    )


def line(trial: Mapping[str, Any], chosen: str) -> dict[str, Any]:
    """A trial as a line of the table, shares of 1."""
    told = {
        "preserve": f"{trial['preserve']:g}",
        "token_weights": ",".join(f"{weight:g}" for weight in trial["token_weights"]),
        "chosen": int(trial["key"] == chosen),
        "pareto": int(trial["pareto"]),
        "failed": trial["failed"] or "",
    }
    return told if trial["failed"] else told | figures_of(trial) | {"pictures": trial["key"][:8]}


def figures_of(trial: Mapping[str, Any]) -> dict[str, Any]:
    """A trial's figures by their names in the table, shares of 1; of one that failed there are none."""
    told: dict[str, Any] = {}
    if trial["failed"]:
        return told
    for name in ("attack_success", "kept"):
        told |= {
            name: trial[name]["share"],
            f"{name}_low": trial[name]["low"],
            f"{name}_high": trial[name]["high"],
        }
    for suite in trial["suites"]:
        told[f"asr.{suite['name']}"] = suite["asr"][0]["erased"]["share"]
        if "kept" in suite:
            told[f"{suite['name']}.kept"] = suite["kept"]["kept"]["share"]
    change = value_of(trial["figures"]["canary_change"])
    return told | {"moved": trial["figures"]["moved"], "canary_change": change}
