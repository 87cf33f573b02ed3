"""The page to show: one HTML file with its pictures inside, that asks nothing of the network."""

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from trce_cli.evaluate.compare import compare_results
from trce_cli.evaluate.gates import value_of
from trce_cli.evaluate.scores import ROLES
from trce_cli.evaluate.verdicts import CLIP_TELLS, GONE, KEPT, asks, verdict
from trce_cli.images.folder import PICTURES
from trce_cli.images.plots import ticks
from trce_cli.images.record import load
from trce_cli.system.whole import write_json, write_text

if TYPE_CHECKING:
    from jinja2 import Template

PAGE, COMPARISON = "report.html", "comparison.json"
FIRST = 10  # pairs on the first screen: two rows of a wide one
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
    suites = results["suites"]
    galleries = [gallery(output, suite, verdicts[suite["name"]]) for suite in suites]
    return write_page(
        output,
        results=results,
        compared=compare_results([results, *earlier]) if earlier else None,
        verdict=verdict(results),
        galleries=galleries,
        highlights=highlights(galleries),
        shown_rows=[(each["name"], each["asr"][0]["original"], each["asr"][0]["erased"]) for each in suites],
        kept_rows=list(kept_rows(suites)),
        clip_tells=CLIP_TELLS,
    )


def kept_rows(suites: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, None, Mapping[str, Any]]]:
    """What was kept, a row a suite, and below it one for each group of its prompts."""
    for suite in suites:
        if kept := suite.get("kept"):
            yield suite["name"], None, kept["kept"]
            yield from ((f"{suite['name']}, {name}", None, rate) for name, rate in groups(kept))


def groups(kept: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """The groups of a suite's prompts of which the original shows something, with the share of each kept."""
    return [(name, rate) for name, rate in kept.get("groups", {}).items() if rate["total"]]


def write_comparison(output: Path, compared: Mapping[str, Any]) -> Path:
    """Write `report.html` and `comparison.json` of a comparison alone."""
    write_json(output / COMPARISON, compared)
    return write_page(output, results=None, compared=compared)


def write_page(output: Path, *, compared: Mapping[str, Any] | None, **content: Any) -> Path:
    """Fill the template and write it, whole or not at all."""
    page = output / PAGE
    text = _template().render(
        compared=compared,
        compared_columns=compared and by_kind(compared["columns"]),
        scatter=compared and scatter(compared["rows"]),
        gone_limits=GONE,
        kept_limits=KEPT,
        **content,
    )
    write_text(page, text)
    return page


@cache
def _template() -> "Template":
    """The page, compiled."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "asks": asks,
        "bytes": mebibytes,
        "chance": chance,
        "fixed": fixed,
        "gated": value_of,
        "percent": percent,
        "seconds": seconds,
    }
    return environment.get_template("report.html.j2")


def highlights(galleries: Sequence[Mapping[str, Any]]) -> list[tuple[str, Any]]:
    """(suite, pair) for the first screen: each suite's first pair, then each one's second, and so on."""
    turns = zip_longest(*([(each["name"], pair) for pair in each["pairs"]] for each in galleries))
    return [shown for turn in turns for shown in turn if shown is not None][:FIRST]


def by_kind(columns: Sequence[str]) -> dict[str, list[tuple[str, str]]]:
    """The columns of a comparison by what they tell, each with its suite's name."""
    kinds = {"kept": ".kept", "clip": ".clip_score"}
    told = {
        kind: [(name, name.removesuffix(end)) for name in columns if name.endswith(end)]
        for kind, end in kinds.items()
    }
    return told | {"shown": [(name, name[4:]) for name in columns if name.startswith("asr.")]}


def scatter(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Where the points of a comparison lie, in per cent of the plot's width and height.

    The axes hold the edited checkpoints with their intervals; an original that lies beyond is told in words.
    Points that would cover each other share a label.
    """
    placed = [(n, row) for n, row in enumerate(rows, start=1) if row["shown"] and row["kept"]]
    framing = [row for _, row in placed if row["role"] == "erased"]
    if not framing:
        return {"points": [], "left": [], "below": [], "outside": []}
    left = ticks(0, 100 * max(row["shown"]["high"] for row in framing))
    below = ticks(100 * min(row["kept"]["low"] for row in framing), 100)
    points: dict[tuple[int, int], dict[str, Any]] = {}
    outside = []
    for number, row in placed:
        x, y = (
            [place(100 * row[name][end], axis) for end in ("low", "share", "high")]
            for name, axis in (("kept", below), ("shown", left))
        )
        if y[1] > 100 or x[1] < 0:
            outside.append(f"{number} {row['label']}, {percent(row['shown']['share'])} shown")
            continue
        point = points.setdefault(
            (round(x[1] / 2), round(y[1] / 3)), {"x": x, "y": y, "labels": [], "front": False}
        )
        point["labels"].append((number, row["label"]))
        point["front"] |= row["pareto"]
    for point in points.values():
        named = point.pop("labels")
        many = ", ".join(str(number) for number, _ in named)
        point["label"] = many if len(named) > 1 else f"{named[0][0]} {named[0][1]}"
    return {
        "points": list(points.values()),
        "left": [{"at": place(tick, left), "text": f"{tick:g} %"} for tick in left],
        "below": [{"at": place(tick, below), "text": f"{tick:g} %"} for tick in below],
        "outside": outside,
    }


def place(value: float, axis: Sequence[float]) -> float:
    """Where a value lies between an axis' ends, in per cent."""
    return round(100 * (value - axis[0]) / (axis[-1] - axis[0]), 2)


def gallery(output: Path, suite: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A suite's pairs of pictures, failures first, with what makes each a failure."""
    told = [(failure(suite, row), row) for row in rows]
    told.sort(key=lambda pair: not pair[0])  # stable: otherwise in the order of the prompts
    folder = output / PICTURES / suite["name"]
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


def fixed(value: float | None, digits: int) -> str:
    """A number with so many digits behind the point; a dash for none."""
    return "—" if value is None else f"{value:.{digits}f}"


def chance(value: float) -> str:
    """A p-value with three digits."""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


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
