"""Is it gone, and is everything else still there: draws suites with both checkpoints and measures them.

Pictures lie under `images/SUITE`, scores under `scores`; a stopped evaluation is taken up from there.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trce_cli.checkpoint.same_model import same_weights
from trce_cli.evaluate.costs import gather_costs, merge_costs, phase
from trce_cli.evaluate.gates import Gate
from trce_cli.evaluate.measure import measure_suite
from trce_cli.evaluate.question import Evaluation
from trce_cli.evaluate.results import describe, write_results
from trce_cli.evaluate.scores import ScoreStore, pair_up, score_share
from trce_cli.evaluate.survivals.base import Subject
from trce_cli.evaluate.survivals.run import draw_rounds, measure_rounds, plan_rounds
from trce_cli.evaluate.survivals.settings import SurvivalSettings
from trce_cli.images.draw import draw
from trce_cli.images.folder import PICTURES, SCORES, ImageFolder, look_into
from trce_cli.images.plan import identify, identity, plan_images
from trce_cli.images.record import ImageRecord, write_image
from trce_cli.system.processes import on_main
from trce_cli.system.progress import Task, no_task
from trce_cli.system.shards import ALL, Share, begin, complete, digest, finish
from trce_cli.system.whole import make_inside

if TYPE_CHECKING:
    import torch


def evaluate(
    evaluation: Evaluation,
    output: Path,
    device: "torch.device",
    dtype: str,
    *,
    force: bool = False,
    gates: Sequence[Gate] = (),
    after: SurvivalSettings = SurvivalSettings(),  # noqa: B008 - frozen
    share: Share = ALL,
    task: Task = no_task,
    note: Callable[[str], None] = lambda text: None,
) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]] | None:
    """Draw what is missing, judge it, and write `results.json` and `verdicts.csv`.

    after: the treatments after which the erased checkpoint is asked again. Returns the results and each
    suite's verdicts, a table row a pair of pictures; None in all processes but the main one, and where
    `share` is a part. Raises BadInput where the output holds pictures of other settings and `force` is not
    given, and where shards that are to be merged are not whole.
    """
    team = share.team
    costs: list[dict[str, Any]] = []
    plans = plan_suites(evaluation, dtype, task, note)

    run = identity(record for plan in plans.values() for record in plan) | {
        "detectors": digest([detector.as_dict() for detector in evaluation.detectors]),
        "treatments": digest(after.model_dump()),
    }

    def take_up() -> list[Path]:
        if share.merged:
            costs.extend(complete(share.merged, run))
        begin(output, share, run, force)
        return open_folders(evaluation, plans, output, share, force)

    absent = {*on_main(team, take_up)}
    pieces = [(output / PICTURES / suite, record) for suite, plan in plans.items() for record in plan]
    pieces.sort(key=lambda place: place[1].role)  # so that each process gets its share of both
    pieces = [*share.of_shard(pieces)]
    wanted = [(folder, record) for folder, record in pieces if folder / record.file in absent]
    stores = {
        detector.name: ScoreStore(make_inside(output, SCORES), detector, share.name)
        for detector in evaluation.detectors
    }
    draw_share(evaluation, share.mine(wanted), device, costs, task, note)
    pairs = {suite: pair_up(output / PICTURES / suite, plan) for suite, plan in plans.items()}
    team.wait_for_everyone()
    rounds = plan_rounds(evaluation, after, plans, output)
    draw_rounds(Subject(evaluation, device, dtype, task), rounds, output, share, costs, force)
    looked = [folder / record.file for folder, record in pieces]
    looked += [pair.path("erased") for each in rounds for pair in share.of_shard(each.every)]
    for detector in evaluation.detectors:
        store = stores[detector.name]
        for other in share.merged:
            store.take_over(other / SCORES)
        score_share(detector, store, share.mine(looked), device, costs, task)
    team.wait_for_everyone()
    costs = gather_costs(team, costs)
    if share.merged:
        costs = merge_costs(costs)
    if not team.is_main_process:
        return None
    if share.is_part:
        finish(output, share, run, costs)
        return None
    for name, plan in plans.items():
        ImageFolder(output / PICTURES / name, plan)  # puts images.jsonl right
    for store in stores.values():
        store.read()  # what the other processes scored
    suites, verdicts, count = [], {}, sum(map(len, pairs.values()))
    report = task("Measuring", count, "pairs")
    with phase(costs, "measure", device) as cost:
        for suite in evaluation.suites:
            found, rows = measure_suite(evaluation, suite, pairs[suite.name], stores, report)
            suites.append(found)
            verdicts[suite.name] = rows
        cost["images"] = 2 * count
        survivals, treated = measure_rounds(evaluation, rounds, stores, verdicts)
    results = describe(evaluation, plans, suites, survivals, costs, device, team.num_processes)
    results["gates"] = [gate.check(results["figures"]) for gate in gates]
    write_results(output, results, verdicts, treated)
    return results, verdicts


def open_folders(
    evaluation: Evaluation,
    plans: Mapping[str, Sequence[ImageRecord]],
    output: Path,
    share: Share,
    force: bool,
) -> list[Path]:
    """Make each suite's folder, take over what was drawn elsewhere, and tell which pictures are missing.

    Raises BadInput as `evaluate` does.
    """
    places = {name: make_inside(output, PICTURES, name) for name in plans}
    folders = [ImageFolder(places[name], plan, force) for name, plan in plans.items()]
    for other in [*([evaluation.reuse] if evaluation.reuse else []), *share.merged]:
        for folder in folders:
            folder.take_over(other / PICTURES / folder.path.name)
    for folder in folders if share.merged else ():
        folder.check_whole()
    return [folder.path / record.file for folder in folders for record in folder.missing]


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
            note_same(evaluation, note, len(set(hashes.values())) == 1)
        plans[suite.name] = [
            replace(record, checkpoint_sha256=hashes[record.role])
            for record in settled(evaluation, records, dtype)
        ]
    return plans


def settled(evaluation: Evaluation, records: Iterable[ImageRecord], dtype: str) -> list[ImageRecord]:
    """A suite's plan with all that its pictures depend on but the hashes of checkpoints."""
    steered = {"erased": evaluation.negative_prompt}
    return [replace(record, dtype=dtype, negative_prompt=steered.get(record.role, "")) for record in records]


def check_unmixed(evaluation: Evaluation, output: Path, dtype: str, force: bool) -> None:
    """Raise BadInput where the output holds pictures of other settings; reads no weights, writes nothing."""
    for suite in evaluation.suites:
        records = plan_images(suite.prompts, evaluation.checkpoints, evaluation.settings)
        look_into(output / PICTURES / suite.name, settled(evaluation, records, dtype), force)


def note_same(evaluation: Evaluation, note: Callable[[str], None], is_hash_same: bool = False) -> None:
    """Say so where both checkpoints are the same, and nothing else tells them apart."""
    one, other = evaluation.erased, evaluation.original
    if not evaluation.negative_prompt and (is_hash_same or same_weights(other, one)):
        which = "itself" if one.name == other.name else f"{other.name}, whose weights are the same"
        note(f"{one.name} is compared with {which}: nothing was erased in between.")


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
