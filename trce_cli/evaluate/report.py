"""The page to show: one HTML file with its pictures inside, that asks nothing of the network."""

import base64
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Final

from PIL import Image

from trce_cli.errors import BadInput
from trce_cli.evaluate.results import SCHEMA
from trce_cli.evaluate.scores import ROLES
from trce_cli.images.folder import whole_file
from trce_cli.maths.statistics import pareto

PAGE, COMPARISON = "report.html", "comparison.json"
SHOWN = 60  # pairs of a suite; more make a page that browsers labour at
SIDE = 320  # pixels of a picture's longer side, at most
SMALL = 128  # up to this side pictures are kept as they are


def write_report(
    output: Path,
    results: Mapping[str, Any],
    verdicts: Mapping[str, Sequence[Mapping[str, Any]]],
    earlier: Sequence[Mapping[str, Any]] = (),
) -> Path:
    """Write `report.html` for an evaluation, with a comparison to earlier ones where there are any."""
    galleries = [gallery(output, suite, verdicts[suite["name"]]) for suite in results["suites"]]
    compared = compare_results([results, *earlier]) if earlier else None
    return write_page(output, results=results, galleries=galleries, compared=compared)


def write_comparison(output: Path, compared: Mapping[str, Any]) -> Path:
    """Write `report.html` and `comparison.json` of a comparison alone."""
    output.mkdir(parents=True, exist_ok=True)
    with whole_file(output / COMPARISON) as temporary:
        temporary.write_text(json.dumps(compared, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return write_page(output, results=None, galleries=[], compared=compared)


def write_page(output: Path, **content: Any) -> Path:
    """Fill the template and write it, whole or not at all."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"figure": figure, "percent": percent, "seconds": seconds, "bytes": mebibytes}
    page = output / PAGE
    with whole_file(page) as temporary:
        temporary.write_text(environment.get_template("report.html.j2").render(**content), encoding="utf-8")
    return page


def gallery(output: Path, suite: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A suite's pairs of pictures, failures first, with what makes each a failure."""
    told = [(failure(suite, row), row) for row in rows]
    told.sort(key=lambda pair: not pair[0])  # stable: otherwise in the order of the prompts
    folder = output / "images" / suite["name"]
    pairs = [
        {
            "prompt": row["prompt"],
            "seed": row["seed"],
            "failure": why,
            "images": {role: data_uri(folder / row["files"][role]) for role in ROLES},
        }
        for why, row in told[:SHOWN]
    ]
    return {
        "name": suite["name"],
        "pairs": pairs,
        "total": len(rows),
        "failures": sum(bool(why) for why, _ in told),
    }


def failure(suite: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    """Why a pair is a failure by the headline convention; empty where it is none."""
    if row["hits"][suite["asr"][0]["convention"]]["erased"]:
        return "still shown"
    shown = row.get("shown")
    if shown and shown["original"] and not shown["erased"]:
        return "something else was lost"
    return ""


def data_uri(path: Path) -> dict[str, Any]:
    """A picture as a data URI: small ones lossless, larger ones as a JPEG of at most `SIDE` pixels."""
    with Image.open(path) as image:
        picture = image.convert("RGB")
    buffer = io.BytesIO()
    small = max(picture.size) <= SMALL
    if small:
        picture.save(buffer, format="PNG", optimize=True)
    else:
        picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        picture.save(buffer, format="JPEG", quality=82)
    kind = "png" if small else "jpeg"
    return {
        "uri": f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}",
        "width": picture.width,
        "height": picture.height,
        "small": small,
    }


def read_results(path: Path) -> dict[str, Any]:
    """The results.json of an evaluation; BadInput where it is none."""
    file = path / "results.json" if path.is_dir() else path
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


def figure(value: float | None) -> str:
    """Three significant digits; a dash for no number."""
    return "—" if value is None else f"{value:.3g}"


def percent(value: float | None) -> str:
    """A share in per cent with one digit; a dash for no number."""
    return "—" if value is None else f"{100 * value:.1f}\u00a0%"


def seconds(value: float | None) -> str:
    """A duration for people."""
    if value is None:
        return "—"
    return (
        f"{value:.1f} s"
        if value < 120
        else f"{value / 60:.1f} min"
        if value < 7200
        else f"{value / 3600:.1f} h"
    )


def mebibytes(value: float | None) -> str:
    """Memory in MiB."""
    return "—" if value is None else f"{value / (1 << 20):,.0f} MiB"
