"""`results.json` and `verdicts.csv`; docs/results.md explains every key."""

import datetime
import platform
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trce_cli.checkpoint.bases import public_name
from trce_cli.checkpoint.checkpoint import Checkpoint
from trce_cli.checkpoint.provenance import history
from trce_cli.evaluate.measure import figures
from trce_cli.evaluate.question import Evaluation
from trce_cli.evaluate.scores import ROLES
from trce_cli.evaluate.survivals.run import AFTER, returns
from trce_cli.evaluate.survivals.run import figures as survived
from trce_cli.evaluate.verdicts import verdict
from trce_cli.images.record import ImageRecord
from trce_cli.prompts.suites import parts
from trce_cli.system.machine import versions
from trce_cli.system.whole import write_json, write_table

if TYPE_CHECKING:
    import torch

SCHEMA = 1
RESULTS, VERDICTS, SURVIVALS = "results.json", "verdicts.csv", "survivals.csv"


def describe(
    evaluation: Evaluation,
    plans: Mapping[str, Sequence[ImageRecord]],
    suites: list[dict[str, Any]],
    survivals: list[dict[str, Any]],
    costs: list[dict[str, Any]],
    device: "torch.device",
    processes: int,
) -> dict[str, Any]:
    """The content of results.json; see docs/results.md."""
    record = next(iter(plans.values()))[0]
    hashes = {each.role: each.checkpoint_sha256 for plan in plans.values() for each in plan[:2]}
    told: dict[str, Any] = {
        "schema": SCHEMA,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "original": {"name": public_name(evaluation.original.name), "sha256": hashes["original"]},
        "erased": {
            "name": public_name(evaluation.erased.name),
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
            "clip_skip": record.clip_skip,
            "dtype": record.dtype,
            "device": str(device),
            "processes": processes,
        },
        "detectors": [detector.as_dict() for detector in evaluation.detectors],
        "figures": figures(suites) | survived(survivals),
        "suites": suites,
        "survivals": survivals,
        "returns": returns(survivals),
        "costs": {"evaluation": costs, "edits": edit_costs(evaluation.erased), "machine": platform.machine()},
    }
    return told | {"verdict": verdict(told)}


def edit_costs(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """What the edits in the checkpoint's history took, oldest first."""
    return [
        {key: entry.get(key) for key in ("edit", "date", "seconds", "peak_memory_bytes", "settings")}
        for entry in history(checkpoint)
    ]


def write_results(
    output: Path,
    results: Mapping[str, Any],
    verdicts: Mapping[str, Sequence[Mapping[str, Any]]],
    treated: Mapping[str, Sequence[Mapping[str, Any]]],
) -> None:
    """Write `results.json`, `verdicts.csv` and, where something was treated, `survivals.csv`.

    Each whole or not at all. verdicts: rows by suite; treated: by the state of a treatment.
    """
    write_json(output / RESULTS, results)
    rows = [row for each in verdicts.values() for row in each]
    write_table(output / VERDICTS, list(verdict_lines(rows, results["detectors"])))
    lines = [
        {AFTER: state, **line, "file": f"{AFTER}/{state}/{line['file'].removeprefix('images/')}"}
        for state, told in treated.items()
        for line in verdict_lines(told, results["detectors"])
        if line["role"] == "erased"
    ]
    if lines:
        write_table(output / SURVIVALS, lines)


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
