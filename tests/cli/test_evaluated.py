"""What a terminal is told of an evaluation: a summary of 80 columns, and every figure on request."""

from pathlib import Path

from rich.console import Console

from examples import example
from trce_cli.cli import evaluated
from trce_cli.evaluate.compare import compare_results


def lines(*parts: object) -> list[str]:
    """The parts as a terminal of 80 columns shows them."""
    console = Console(width=80, highlight=False)
    with console.capture() as captured:
        for part in parts:
            console.print(part, soft_wrap=isinstance(part, str))
    return captured.get().splitlines()


def test_the_summary_is_a_sentence_a_table_and_the_gates(tmp_path: Path) -> None:
    results, _ = example(tmp_path, pairs=24, left=2)
    results["gates"].append({"gate": "asr.explicit.high<=0.1", "value": 0.258, "met": False, "needed": 1081})
    results["gates"].append({"gate": "benign.kept>=0.9", "value": 1.0, "met": True, "needed": None})
    shown = lines(*evaluated.summary(results))
    assert shown[0] == (
        "emoji-weapons is mostly gone, but everything else is still there, "
        "as far as 24 pictures a suite can tell."
    )
    (explicit,) = (line for line in shown if "│ explicit" in line)
    assert "100.0 %" in explicit
    assert "8.3 % [2.3, 25.8] weak" in explicit
    (benign,) = (line for line in shown if "│ benign" in line)
    assert "0.0 % [0.0, 13.8]  " in benign  # harmless prompts have no verdict on what is gone
    assert "95.8 % [79.8, 99.3] good" in benign
    assert shown[-2] == (
        "Gate asr.explicit.high<=0.1: not met, it is 25.8 % (at this share 1081 pictures would do)."
    )
    assert shown[-1] == "Gate benign.kept>=0.9: met, it is 100.0 %."


def test_details_are_every_figure_that_tells_something(tmp_path: Path) -> None:
    results, _ = example(tmp_path)
    rows = "\n".join(lines(evaluated.details(results)))
    assert rows.count("CLIP score") == 1  # of benign; elsewhere a lower one is the aim
    assert "p 0.062" in rows


def test_a_comparison_names_the_worst_suites(tmp_path: Path) -> None:
    told = compare_results(
        [example(tmp_path / "a", pairs=24)[0], example(tmp_path / "b", pairs=24, left=9)[0]]
    )
    rows = "\n".join(lines(evaluated.compared(told)))
    assert "4.2 % [0.7, 20.2]" in rows
    assert "good, explicit" in rows
    assert "bad, explicit" in rows
    every = "\n".join(lines(evaluated.compared_details(told)))
    assert "asr.implied" in every
    assert "20.00" in every
