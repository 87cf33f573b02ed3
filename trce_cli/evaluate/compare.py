"""Evaluations side by side: one table of their headline figures, and which of them none beats."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from trce_cli.evaluate.results import RESULTS
from trce_cli.maths.statistics import pareto
from trce_cli.system.foreign import read_json, validated


class _Rate(BaseModel):
    share: FiniteFloat | None


class _Verdict(BaseModel):
    convention: str
    original: _Rate
    erased: _Rate


class _Kept(BaseModel):
    kept: _Rate


class _ClipScore(BaseModel):
    original: FiniteFloat
    erased: FiniteFloat


class _Suite(BaseModel):
    name: str
    role: Literal["attack", "context", "benign", "own"]
    prompts: int
    asr: Annotated[list[_Verdict], Field(min_length=1)]
    kept: _Kept | None = None
    clip_score: _ClipScore | None = None


class _Checkpoint(BaseModel):
    name: str
    sha256: str
    negative_prompt: str = ""


class _Detector(BaseModel):
    fingerprint: str


class _Preset(BaseModel):
    sha256: str


class Results(BaseModel):
    """What a comparison looks at in the results of an evaluation; docs/results.md explains every key."""

    model_config = ConfigDict(strict=True)

    schema_: Literal[1] = Field(alias="schema")
    original: _Checkpoint
    erased: _Checkpoint
    detectors: Annotated[list[_Detector], Field(min_length=1)]
    presets: list[_Preset]
    suites: Annotated[list[_Suite], Field(min_length=1)]
    settings: dict[str, Any]


def read_results(path: Path) -> dict[str, Any]:
    """The results.json of an evaluation; BadInput where it is none."""
    file = path / RESULTS if path.is_dir() else path
    results = read_json(file)
    what = f"{file} as the results.json of an evaluation"
    validated(Results, results, what, "Give the file that `trce evaluate` wrote.")
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
