"""The page to show: one HTML file with its pictures inside, that asks nothing of the network."""

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from trce_cli.evaluate.compare import compare_results
from trce_cli.evaluate.scores import ROLES
from trce_cli.images.record import load
from trce_cli.system.whole import write_json, write_text

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
    write_json(output / COMPARISON, compared)
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
    write_text(page, environment.get_template("report.html.j2").render(**content))
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
    picture = load(path)
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
