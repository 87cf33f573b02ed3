"""Is it gone, and is everything else still there: draws suites with both checkpoints and measures them.

Pictures lie under `images/SUITE`, scores under `scores`; a stopped evaluation is taken up from there.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trce_cli.checkpoint.same_model import same_weights
from trce_cli.evaluate.costs import gather_costs, phase
from trce_cli.evaluate.gates import Gate
from trce_cli.evaluate.measure import measure_suite
from trce_cli.evaluate.question import Evaluation
from trce_cli.evaluate.results import describe, write_results
from trce_cli.evaluate.scores import ScoreStore, pair_up, score_share
from trce_cli.evaluate.survivals.base import Subject
from trce_cli.evaluate.survivals.run import draw_rounds, measure_rounds, plan_rounds
from trce_cli.evaluate.survivals.settings import SurvivalSettings
from trce_cli.images.draw import draw
from trce_cli.images.folder import ImageFolder
from trce_cli.images.plan import identify, plan_images
from trce_cli.images.record import ImageRecord, read_image, write_image
from trce_cli.system.foreign import read_bytes
from trce_cli.system.processes import Alone, on_main
from trce_cli.system.progress import Task, no_task
from trce_cli.system.whole import make_inside, write_bytes

if TYPE_CHECKING:
    import torch

MAX_PICTURE = 1 << 28  # bytes


def evaluate(
    evaluation: Evaluation,
    output: Path,
    device: "torch.device",
    dtype: str,
    *,
    force: bool = False,
    gates: Sequence[Gate] = (),
    after: SurvivalSettings = SurvivalSettings(),  # noqa: B008 - frozen
    team: Any = None,
    task: Task = no_task,
    note: Callable[[str], None] = lambda text: None,
) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]] | None:
    """Draw what is missing, judge it, and write `results.json` and `verdicts.csv`.

    after: the treatments after which the erased checkpoint is asked again. Returns the results and each
    suite's verdicts, a table row a pair of pictures; None in all processes but the main one. Raises BadInput
    where the output holds pictures of other settings and `force` is not given.
    """
    team = team or Alone()
    costs: list[dict[str, Any]] = []
    plans = plan_suites(evaluation, dtype, task, note)

    def open_folders() -> list[list[str]]:
        places = {name: make_inside(output, "images", name) for name in plans}
        folders = [ImageFolder(places[name], plan, force) for name, plan in plans.items()]
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
    draw_share(evaluation, mine, device, costs, task, note)
    pairs = {suite: pair_up(output / "images" / suite, plan) for suite, plan in plans.items()}
    everything = [pair for each in pairs.values() for pair in each]
    team.wait_for_everyone()
    rounds = plan_rounds(evaluation, after, plans, output)
    draw_rounds(Subject(evaluation, device, dtype, task), rounds, output, team, costs, force)
    stores = {
        detector.name: ScoreStore(make_inside(output, "scores"), detector, team.process_index)
        for detector in evaluation.detectors
    }
    looked = everything + [pair for each in rounds for pair in each.every]
    for detector in evaluation.detectors:
        share = looked[team.process_index :: team.num_processes]
        score_share(detector, stores[detector.name], share, device, costs, task)
    team.wait_for_everyone()
    costs = gather_costs(team, costs)
    if not team.is_main_process:
        return None
    for name, plan in plans.items():
        ImageFolder(output / "images" / name, plan)  # puts images.jsonl right
    for store in stores.values():
        store.read()  # what the other processes scored
    suites, verdicts = [], {}
    report = task("Measuring", len(everything), "pairs")
    with phase(costs, "measure", device) as cost:
        for suite in evaluation.suites:
            found, rows = measure_suite(evaluation, suite, pairs[suite.name], stores, report)
            suites.append(found)
            verdicts[suite.name] = rows
        cost["images"] = 2 * len(everything)
        survivals, treated = measure_rounds(evaluation, rounds, stores, verdicts)
    results = describe(evaluation, plans, suites, survivals, costs, device, team.num_processes)
    results["gates"] = [gate.check(results["figures"]) for gate in gates]
    write_results(output, results, verdicts, treated)
    return results, verdicts


def plan_suites(
    evaluation: Evaluation, dtype: str, task: Task, note: Callable[[str], None] = lambda text: None
) -> dict[str, list[ImageRecord]]:
    """What to draw by suite: every prompt once by each checkpoint, at equal seeds and settings."""
    hashing = task("Reading checkpoints", None, "")
    hashes: dict[str, str] = {}
    plans = {}
    for suite in evaluation.suites:
        records = plan_images(suite.prompts, evaluation.checkpoints, evaluation.settings)
        if not hashes:
            found = identify(records[:2], evaluation.checkpoints, dtype, hashing)
            hashes = {record.role: record.checkpoint_sha256 for record in found}
            one, other = evaluation.erased.name, evaluation.original.name
            same = len(set(hashes.values())) == 1 or same_weights(evaluation.original, evaluation.erased)
            if same and not evaluation.negative_prompt:
                which = "itself" if one == other else f"{other}, whose weights are the same"
                note(f"{one} is compared with {which}: nothing was erased in between.")
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
                write_bytes(folder.path / record.file, read_bytes(path, MAX_PICTURE))
                folder.drawn.add(record.file)


def draw_share(
    evaluation: Evaluation,
    wanted: Sequence[tuple[Path, ImageRecord]],
    device: "torch.device",
    costs: list[dict[str, Any]],
    task: Task,
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
            pipeline = checkpoint.pipe(device, getattr(torch, records[0].dtype))
        _, cut = checkpoint.family.truncated(checkpoint, [record.prompt for record in records])
        if cut:
            note(f"{checkpoint.name} reads {cut} of {len(records)} prompts only in part: they are too long.")
        report = task(f"Drawing ({role})", len(records), "images")
        with phase(costs, f"draw {role}", device) as cost:
            for record, image in draw(checkpoint.family, pipeline, records):
                write_image(places[id(record)], image, record)
                report(1)
            cost["images"] = len(records)
        del pipeline
