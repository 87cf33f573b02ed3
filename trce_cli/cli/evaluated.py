"""How an evaluation is told in a terminal: a sentence and a short table, and on request every figure."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from trce_cli.cli.console import Console
from trce_cli.evaluate.gates import value_of
from trce_cli.evaluate.verdicts import CLIP_TELLS, GONE, KEPT, bounded, share, verdict

if TYPE_CHECKING:
    from rich.table import Table

LEGEND = (
    f"Still shown: good up to {GONE.good:.0%}, weak up to {GONE.weak:.0%}; "
    f"kept: good from {KEPT.good:.0%}, weak from {KEPT.weak:.0%}.\n"
    "In brackets 95 % intervals; --details shows every figure."
)


def show(console: Console, results: Mapping[str, Any], with_details: bool) -> None:
    """Tell the results, with every figure where that is asked for."""
    for part in summary(results):
        console.show(part)
    if with_details:
        console.show(details(results))


def summary(results: Mapping[str, Any]) -> Iterator["Table | str"]:
    """The verdict in a sentence, a line a suite, and the gates."""
    from rich.table import Table

    yield verdict(results)["sentence"]
    table = Table("suite", "original", "still shown", "kept")
    for suite in results["suites"]:
        before, after = suite["asr"][0]["original"], suite["asr"][0]["erased"]
        kept = suite["kept"]["kept"] if "kept" in suite else None
        table.add_row(
            suite["name"],
            share(before),
            f"{bounded(after)} {GONE.word(after['share']) if suite['role'] != 'benign' else ''}".rstrip(),
            f"{bounded(kept)} {KEPT.word(kept['share'])}" if kept and kept["total"] else "",
        )
    yield table
    if results["survivals"]:
        yield survived(results["survivals"])
        yield from (told["sentence"] for told in results["returns"])
    yield LEGEND
    for gate in results["gates"]:
        met = "met" if gate["met"] else "not met"
        yield f"Gate {gate['gate']}: {met}, it is {value_of(gate)}{more(gate)}."


def survived(survivals: Sequence[Mapping[str, Any]]) -> "Table":
    """A line a state of a treatment and suite: what is shown, before and after it, and what is kept."""
    from rich.table import Table

    table = Table("after", "suite", "still shown before", "still shown after", "kept")
    for state in survivals:
        for suite in state["suites"]:
            told, kept = suite["asr"][0], suite["kept"]["treated"] if "kept" in suite else None
            table.add_row(
                state["state"],
                suite["name"],
                share(told["erased"]),
                f"{bounded(told['treated'])}, p {told['change']['p_value']:.2g}",
                bounded(kept) if kept and kept["total"] else "",
            )
    return table


def more(gate: Mapping[str, Any]) -> str:
    """What it takes to meet a gate that a small sample alone does not meet; empty for others."""
    return f" (at this share {gate['needed']} pictures would do)" if gate["needed"] else ""


def details(results: Mapping[str, Any]) -> "Table":
    """The main figures, original beside erased, with intervals."""
    from rich.table import Table

    table = Table("suite", "figure", "original", "erased", "change")
    for suite in results["suites"]:
        for told in suite["asr"]:
            change = told["change"]
            table.add_row(
                suite["name"],
                f"shows it ({told['convention']})",
                rate(told["original"]),
                rate(told["erased"]),
                f"-{change['lost']} +{change['gained']}, p {change['p_value']:.2g}",
            )
        if suite["role"] == "attack":  # the rest is about what should survive
            continue
        if kept := suite.get("kept"):
            accuracy, change = kept["accuracy"], kept["change"]
            table.add_row(
                suite["name"],
                "shows what it should",
                rate(accuracy["original"]),
                rate(accuracy["erased"]),
                f"-{change['lost']} +{change['gained']}, p {change['p_value']:.2g}",
            )
            table.add_row(suite["name"], "of that kept", "", rate(kept["kept"]), "")
            for name, told in kept.get("groups", {}).items():
                table.add_row(suite["name"], f"... of the {name} ones", "", rate(told), "")
        if (score := suite.get("clip_score")) and suite["role"] in CLIP_TELLS:
            table.add_row(
                suite["name"],
                "CLIP score",
                f"{score['original']:.2f}",
                f"{score['erased']:.2f}",
                f"{score['change']['mean']:+.2f}",
            )
        for distance in suite["frechet"]:
            original = distance.get("original")
            table.add_row(
                suite["name"],
                f"Fréchet distance ({distance['features']}) to {distance['reference']}",
                "" if original is None else f"{original:.2f}",
                "" if distance["erased"] is None else f"{distance['erased']:.2f}",
                f"{distance['samples']['drawn']} and {distance['samples']['reference']} images",
            )
    return table


def compared(told: Mapping[str, Any]) -> "Table":
    """A line a checkpoint: its worst suites."""
    from rich.table import Table

    table = Table("checkpoint", "still shown, worst suite", "kept, worst suite", "unbeaten")
    for row in told["rows"]:
        cells = [
            f"{bounded(worst)}\n{worst['verdict']}, {worst['suite']}" if worst else ""
            for worst in (row["shown"], row["kept"])
        ]
        table.add_row(row["label"], *cells, "yes" if row["pareto"] else "")
    return table


def compared_details(told: Mapping[str, Any]) -> "Table":
    """A line a figure, a column a checkpoint."""
    from rich.table import Table

    table = Table("figure", *(row["label"] for row in told["rows"]))
    for name in told["columns"]:
        cells = []
        for row in told["rows"]:
            value, ends = row["figures"].get(name), row["intervals"].get(name)
            if value is None or name.endswith(".clip_score"):
                cells.append("" if value is None else f"{value:.2f}")
            else:
                low, high = ends or (value, value)
                cells.append(bounded({"share": value, "low": low, "high": high}))
        table.add_row(name, *cells)
    return table


def rate(told: Mapping[str, Any]) -> str:
    """`3.5 % [1.7, 7.0] 7/200`"""
    return bounded(told) if told["share"] is None else f"{bounded(told)} {told['hits']}/{told['total']}"
