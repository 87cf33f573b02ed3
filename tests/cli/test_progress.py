"""How far a command is: meters by a clock of the tests' own, bars in narrow terminals, lines in log files."""

import io
import re
import signal

import pytest
import typer
from rich.console import Console as RichConsole

from trce_cli.cli.console import run_app
from trce_cli.cli.options import goes_on
from trce_cli.cli.progress import Lines, Meter, Progress, bars, clock, spoken


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_rate_is_of_what_was_done_and_not_of_what_was_there():
    now = Clock()
    meter = Meter(1000, "images", now)
    meter.advance(900)  # found on disk
    now.now = 0.5
    meter.advance(1)
    assert (meter.rate, meter.left, meter.speed()) == (None, None, "")
    for _ in range(10):
        now.now += 2
        meter.advance(1)
    assert meter.rate == pytest.approx(0.5)
    assert meter.left == pytest.approx((1000 - 911) / 0.5)
    now.now += 10  # nothing is told of in these
    assert meter.left == pytest.approx((1000 - 911) / 0.5 - 10)
    assert meter.count() == "911/1000"


def test_a_rate_is_of_late():
    now = Clock()
    meter = Meter(None, "steps", now)
    for step in range(400):
        now.now += 0.5 if step < 200 else 5
        meter.advance(1)
    assert meter.rate == pytest.approx(0.2, rel=0.01)
    assert (meter.left, meter.count()) == (None, "")


def test_the_first_item_already_has_a_rate():
    now = Clock()
    meter = Meter(10, "images", now)
    now.now = 20
    meter.advance(1)
    assert meter.speed() == "20 s each"
    assert meter.sentence("Drawing") == "Drawing: 1/10 images, 20 s each, 3 min left"
    meter = Meter(None, "prompts", now)
    now.now += 2
    meter.advance(3821)
    assert meter.speed() == "1,910 prompts/s"


@pytest.mark.parametrize(
    ("seconds", "told", "ticked"),
    [(3.2, "3 s", "0:03"), (540, "9 min", "9:00"), (11100, "3 h 05 min", "3:05:00")],
)
def test_times_in_words_and_on_a_clock(seconds, told, ticked):
    assert (spoken(seconds), clock(seconds)) == (told, ticked)


def test_a_log_file_gets_a_line_every_so_often(monkeypatch):
    now, lines = Clock(), []
    monkeypatch.setattr("trce_cli.cli.progress.Meter.__init__.__defaults__", (now,))
    progress = Progress(Lines(lines.append, now))
    report = progress.task("Drawing", 400, "images")
    for _ in range(200):
        now.now += 1
        report(1, "all is well")
    assert lines[0] == "Drawing: 15/400 images, 1 images/s, 6 min left; all is well"
    assert [int(re.findall(r"(\d+)/400", line)[0]) for line in lines] == [15, 75, 135, 195]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_line_fits_the_terminal_with_bar_count_and_time(width, monkeypatch):
    now, shown = Clock(), io.StringIO()
    monkeypatch.setattr("trce_cli.cli.progress.Meter.__init__.__defaults__", (now,))
    console = RichConsole(file=shown, width=width, force_terminal=True, _environ={})
    with bars(console) as sink:
        progress = Progress(sink)
        progress.task("Loading what takes no time")
        report = progress.task("Drawing what the original makes of the prompts", 12000, "images")
        now.now = 20
        report(100, "loss 0.0123 (contrast 0.0123, regulariser 1.2e-05, retention 3.4e-05) " * 3)
        shown.truncate(0)
        shown.seek(0)
        sink._progress.refresh()
        last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.getvalue()).replace("\r", "\n").splitlines()
        (line,) = [line for line in last if "100/12000" in line]
        (below,) = [line for line in last if "loss" in line]
    assert max(map(len, last)) <= width
    assert "━━━" in line
    assert "39:40 left" in line
    assert ("5 images/s" in line) == (width >= 80)
    assert below.rstrip().endswith("…")


def test_a_task_that_comes_again_takes_the_place_of_the_last():
    with bars(RichConsole(file=io.StringIO(), width=80, force_terminal=True, _environ={})) as sink:
        progress = Progress(sink)
        for _ in range(50):
            progress.task("Measuring", 2)(2)
            progress.task("Drawing", 2)(1)
        assert [task.description for task in sink._progress.tasks] == ["Measuring", "Drawing"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_can_go_on_says_so_when_it_is_stopped(number, capsys):
    app = typer.Typer(pretty_exceptions_enable=False)

    @app.command()
    @goes_on
    def work(steps: int = 3) -> None:
        assert steps == 3
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    assert run_app(app, []) == 128 + number
    err = capsys.readouterr().err
    assert err == "Error: Interrupted.\nHint: Run the same line to go on where it was.\n"
