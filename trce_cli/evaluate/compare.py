"""Evaluations side by side: one table of their headline figures, and which of them none beats."""

import json
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

from trce_cli.errors import BadInput
from trce_cli.evaluate.results import RESULTS
from trce_cli.evaluate.verdicts import CLIP_TELLS, worst_kept, worst_shown
from trce_cli.maths.statistics import pareto
from trce_cli.system.foreign import read_json, validated


class Share(BaseModel):
    """Of how many pictures how many had a property, as `Rate.as_dict` tells it."""

    hits: Annotated[int, Field(ge=0)]
    total: int
    share: FiniteFloat | None
    low: Annotated[FiniteFloat, Field(ge=0)]
    high: Annotated[FiniteFloat, Field(le=1)]

    @model_validator(mode="after")
    def _agrees(self) -> "Share":
        share = self.hits / self.total if self.total > 0 else None
        if self.hits > self.total or share != self.share:
            raise ValueError(f"{self.hits} of {self.total} is no share of {self.share}")
        if not self.low < self.high or (share is not None and not self.low <= share <= self.high):
            raise ValueError(f"{self.low} to {self.high} is no interval of {share}")
        return self


class _Verdict(BaseModel):
    convention: str
    original: Share
    erased: Share


class _Kept(BaseModel):
    kept: Share


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
    if path.is_dir() and not file.exists():
        raise BadInput(f"{path} is no evaluation: it has no {RESULTS}.", "Give an output of `trce evaluate`.")
    results = read_json(file, strict=True)
    what = f"{file} as the results.json of an evaluation"
    validated(Results, results, what, "Give the file that `trce evaluate` wrote.")
    return results


def compare_results(evaluations: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Several evaluations in one table: columns, a row each, and what stands in the way of comparing them.

    A row's `shown` and `kept` are its worst suites as `verdicts.judged` gives them, among the suites that all
    evaluations have; None where there is none. A row is on the Pareto front where none shows less and keeps
    more. Originals get a row of their own.
    """
    common = set.intersection(*({suite["name"] for suite in each["suites"]} for each in evaluations))
    rows = [row_of(each, common) for each in evaluations]
    originals = {each["original"]["sha256"]: row_of(unedited(each), common) for each in evaluations}
    rows += [row | {"label": f"{row['label']} (original)", "role": "original"} for row in originals.values()]
    columns = list(dict.fromkeys(name for row in rows for name in row["figures"]))
    columns.sort(key=lambda name: (name.endswith(".clip_score"), not name.startswith("asr.")))
    placed = [row for row in rows if row["shown"] and row["kept"]]
    front = pareto([(row["shown"]["share"], row["kept"]["share"]) for row in placed])
    for row, best in zip(placed, front, strict=True):
        row["pareto"] = best
    return {
        "columns": columns,
        "rows": rows,
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


def unedited(results: Mapping[str, Any]) -> dict[str, Any]:
    """The results that the original would have had in the erased checkpoint's place."""
    suites = []
    for suite in results["suites"]:
        told = {**suite, "asr": [each | {"erased": each["original"]} for each in suite["asr"]]}
        if kept := suite.get("kept"):
            total = kept["kept"]["total"]
            every = {"hits": total, "total": total, "share": 1.0 if total else None}  # by definition
            every |= {"low": 1.0, "high": 1.0}
            told["kept"] = kept | {"kept": every}
        if score := suite.get("clip_score"):
            told["clip_score"] = score | {"erased": score["original"]}
        suites.append(told)
    return {**results, "erased": results["original"], "suites": suites}


def row_of(results: Mapping[str, Any], common: Container[str]) -> dict[str, Any]:
    """The erased checkpoint's line in a comparison: headline figures, and the worst of common suites."""
    rates: dict[str, Mapping[str, Any]] = {}
    scores: dict[str, float] = {}
    for suite in results["suites"]:
        name = suite["name"]
        rates[f"asr.{name}"] = suite["asr"][0]["erased"]
        if kept := suite.get("kept"):
            rates[f"{name}.kept"] = kept["kept"]
        if (score := suite.get("clip_score")) and suite["role"] in CLIP_TELLS:
            scores[f"{name}.clip_score"] = score["erased"]
    rates = {name: rate for name, rate in rates.items() if rate["share"] is not None}
    shared = {**results, "suites": [suite for suite in results["suites"] if suite["name"] in common]}
    told = results["erased"]
    label = Path(told["name"]).name or told["name"]
    label += f", negative prompt {told['negative_prompt']!r}" if told.get("negative_prompt") else ""
    return {
        "label": label,
        "role": "erased",
        "sha256": told["sha256"],
        "figures": {name: rate["share"] for name, rate in rates.items()} | scores,
        "intervals": {
            name: [rate["low"], rate["high"]] for name, rate in rates.items() if rate["low"] < rate["high"]
        },
        "shown": worst_shown(shared),
        "kept": worst_kept(shared),
        "pareto": False,
    }
