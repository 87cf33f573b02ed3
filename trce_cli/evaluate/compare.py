"""Evaluations side by side: one table of their headline figures, and which of them none beats."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Final

from trce_cli.errors import BadInput
from trce_cli.evaluate.results import RESULTS, SCHEMA
from trce_cli.maths.statistics import pareto


def read_results(path: Path) -> dict[str, Any]:
    """The results.json of an evaluation; BadInput where it is none."""
    file = path / RESULTS if path.is_dir() else path
    try:
        results: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if results["schema"] != SCHEMA:
            raise ValueError(f"its schema is {results['schema']!r}, not {SCHEMA}")
        compare_results([results])
    except OSError as error:
        raise BadInput(f"{file} cannot be read: {error.strerror}.") from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise BadInput(
            f"{file} is no results.json of `trce evaluate`: {str(error)[:120] or type(error).__name__}.",
            "Give the file that an evaluation wrote.",
        ) from error
    return results


def compare_results(evaluations: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Several evaluations in one table: columns, a row each, and what stands in the way of comparing them.

    harm: mean attack success of the attack suites and own files that all have; benefit: mean share kept of
    the context and benign suites that all have. A row is on the Pareto front where none has less harm and
    more benefit. Originals get a row of their own.
    """
    rows = [row_of(each, "erased") for each in evaluations]
    originals = {each["original"]["sha256"]: row_of(each, "original") for each in evaluations}
    rows += originals.values()
    common = set.intersection(*(set(row["figures"]) for row in rows))
    columns = list(dict.fromkeys(name for row in rows for name in row["figures"]))
    columns.sort(key=lambda name: (name.endswith(".clip_score"), not name.startswith("asr.")))
    roles = {suite["name"]: suite["role"] for each in evaluations for suite in each["suites"]}
    harms = [name for name in common if name[:4] == "asr." and roles[name[4:]] in ("attack", "own")]
    benefits = [name for name in common if name.endswith(".kept")]
    for row in rows:
        row["harm"], row["benefit"] = (
            fmean(row["figures"][name] for name in names) if names else None for names in (harms, benefits)
        )
    edited = [row for row in rows if row["harm"] is not None and row["benefit"] is not None]
    for row, best in zip(edited, pareto([(row["harm"], row["benefit"]) for row in edited]), strict=True):
        row["pareto"] = best
    return {
        "columns": columns,
        "rows": rows,
        "harm": sorted(harms),
        "benefit": sorted(benefits),
        "remarks": [
            remark
            for remark, said in _COMPARED.items()
            if len({json.dumps(said(e)) for e in evaluations}) > 1
        ],
    }


# What is said where evaluations differ, and in what.
_DRAWN: Final = ("steps", "guidance_scale", "scheduler", "dtype")
_COMPARED: Final[Mapping[str, Callable[[Mapping[str, Any]], Any]]] = {
    "They were measured against different originals.": lambda e: e["original"]["sha256"],
    "Their headline figures are of different detectors.": lambda e: e["detectors"][0]["fingerprint"],
    "Their headline figures are of different thresholds or labels.": lambda e: sorted(
        {suite["asr"][0]["convention"] for suite in e["suites"]}
    ),
    "They looked for the concepts of different presets.": lambda e: [p["sha256"] for p in e["presets"]],
    "They asked different suites, or different numbers of prompts.": lambda e: [
        (suite["name"], suite["prompts"]) for suite in e["suites"]
    ],
    "They were drawn with different steps, guidance scales, schedulers or dtypes.": lambda e: [
        e["settings"].get(name) for name in _DRAWN
    ],
}


def row_of(results: Mapping[str, Any], role: str) -> dict[str, Any]:
    """One checkpoint's line in a comparison, with its headline figures."""
    found: dict[str, float | None] = {}
    for suite in results["suites"]:
        name = suite["name"]
        found[f"asr.{name}"] = suite["asr"][0][role]["share"]
        if kept := suite.get("kept"):
            found[f"{name}.kept"] = kept["kept"]["share"] if role == "erased" else 1.0
        if score := suite.get("clip_score"):
            found[f"{name}.clip_score"] = score[role]
    told = results[role]
    label = Path(told["name"]).name or told["name"]
    label += f", negative prompt {told['negative_prompt']!r}" if told.get("negative_prompt") else ""
    return {
        "label": label if role == "erased" else f"{label} (original)",
        "role": role,
        "sha256": told["sha256"],
        "figures": {name: value for name, value in found.items() if value is not None},
        "pareto": False,
    }
