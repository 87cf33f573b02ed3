import errno
import io
import json
import sys
from pathlib import Path

import pytest
import typer
from PIL import Image
from rich.table import Table
from safetensors import SafetensorError

from trce_cli.cli.console import Console, run_app
from trce_cli.errors import BadInput, TrceError, refusing, refusing_library


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def failing_app(error: BaseException) -> typer.Typer:
    app = typer.Typer(pretty_exceptions_enable=False)

    @app.command()
    def fail() -> None:
        raise error

    return app


# --- how a command ends


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (TrceError("It broke.", "Mend it."), 1, ["Error: It broke.\n", "Hint: Mend it.\n"]),
        (BadInput("3 is odd."), 2, ["Error: 3 is odd.\n"]),
        (KeyboardInterrupt(), 130, ["Interrupted"]),
        (OSError(errno.ENOSPC, "full", "/x/y"), 1, ["No space", "/x/y"]),
        (OSError(errno.EACCES, "no"), 1, ["Permission"]),
        (OSError(errno.EMFILE, "no", "/x/y"), 1, ["Too many files", "/x/y"]),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "/x/y"), 1, ["No such", "/x/y"]),
        (MemoryError(), 1, ["memory"]),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9"), 1, ["The memory ran out"]),
        (Image.DecompressionBombError("too many pixels"), 2, ["too many pixels"]),
        (SafetensorError("a header"), 2, ["a header"]),
        (RuntimeError("Symlink loop from '/x'"), 2, ["Symlink loop"]),
        (ValueError("embedded null byte"), 2, ["null byte"]),
        (FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']"), 1, ["TMPDIR"]),
        (typer.Exit(3), 3, []),
    ],
)
def test_an_error_becomes_a_sentence_and_an_exit_status(capsys, error, status, words):
    assert run_app(failing_app(error), []) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    assert [word for word in words if word not in err] == []


@pytest.mark.parametrize(
    "error", [RuntimeError("a bug"), OSError(errno.ECHILD, "a bug"), ValueError("a bug")]
)
def test_a_bug_keeps_its_traceback(error):
    with pytest.raises(type(error), match="a bug"):
        run_app(failing_app(error), [])


def test_the_memory_of_a_device_running_out_is_no_bug(capsys):
    import torch

    assert run_app(failing_app(torch.OutOfMemoryError("CUDA out of memory")), []) == 1
    assert "--batch-size" in capsys.readouterr().err


def test_a_failure_is_told_as_json_where_that_is_asked_for(capsys):
    app = typer.Typer(pretty_exceptions_enable=False)

    @app.command()
    def fail(json: bool = False, late: bool = False) -> None:
        if late:
            Console(json).result({"figure": 1})
        raise TrceError("It broke.", "Mend it.")

    assert run_app(app, ["--json"]) == 1
    out, err = capsys.readouterr()
    told = {"message": "It broke.", "hint": "Mend it.", "exit_code": 1}
    assert json.loads(out) == {"error": told}
    assert err == "Error: It broke.\nHint: Mend it.\n"

    assert run_app(app, ["--json", "--late"]) == 1
    assert json.loads(capsys.readouterr().out) == {"figure": 1}  # one value, and it stands there already
    assert run_app(app, ["--json", "--no-such-option"]) == 2
    wrong = json.loads(capsys.readouterr().out)["error"]
    assert wrong["exit_code"] == 2
    assert wrong["message"].startswith("No such option: --no-such-option")
    assert run_app(app, []) == 1
    assert capsys.readouterr().out == ""


def test_quiet_does_not_silence_an_answer(capsys):
    Console(quiet=True).answer("the answer")
    Console(quiet=True, json=True).answer("the answer")
    assert capsys.readouterr() == ("the answer\n", "")


def test_success_and_wrong_usage(capsys):
    app = typer.Typer()
    app.command()(lambda: None)
    assert run_app(app, []) == 0
    assert run_app(app, ["--no-such-option"]) == 2
    assert "--no-such-option" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "said"), [(int, "must be a whole number, not 'x'"), (float, "must be a number, not 'x'")]
)
def test_values_of_options_are_refused_in_our_own_words(kind, said, capsys):
    app = typer.Typer(rich_markup_mode=None)

    def command(count=0):
        raise AssertionError("it ran")

    command.__annotations__ = {"count": kind}
    app.command()(command)
    assert run_app(app, ["--count", "x"]) == 2
    told = capsys.readouterr().err
    assert said in told
    assert "--count" in told


def test_what_a_library_raises_about_a_file_is_bad_input():
    class Panic(BaseException):  # as Rust's are
        pass

    for error in (Panic("it overflowed."), ValueError("it overflowed\nat line 3"), OverflowError()):
        with (
            pytest.raises(BadInput, match=r"The file x: (it overflowed|OverflowError)\.$"),
            refusing("The file x"),
        ):
            raise error
    for error in (MemoryError(), KeyboardInterrupt(), SystemExit(3), TrceError("ours")):
        with pytest.raises(type(error)), refusing("The file x"):
            raise error


def test_what_a_library_raises_is_bad_input_and_what_our_own_code_raises_a_bug():
    with pytest.raises(BadInput, match=r"^It failed: Expecting"), refusing_library("It failed"):
        json.loads("{")
    with pytest.raises(TypeError), refusing_library("It failed"):
        Console().note(None)
    with pytest.raises(KeyboardInterrupt), refusing_library("It failed"):
        raise KeyboardInterrupt


@pytest.mark.parametrize("how", ["note", "warn", "show"])
def test_foreign_text_is_escaped_and_cut_wherever_it_is_printed(capsys, how):
    hostile = "a\x1b[31m\x9b\u202e\ud800[bold]:knife:" + "b" * 100_000
    getattr(Console(), how)(hostile)
    text = "".join(capsys.readouterr())
    assert r"a\x1b[31m\x9b\u202e\ud800[bold]:knife:" in text
    assert len(text) < 5000


def test_foreign_text_is_escaped_and_cut_in_every_part_of_a_table(capsys):
    hostile = "a\x1b[31m[bold]:knife:\x07" + "b" * 100_000
    table = Table(hostile, "other", title=hostile, caption=hostile)
    table.add_row(hostile, "first\nsecond")
    Console().show(table)
    out = capsys.readouterr().out
    assert out.replace("\n", "").isprintable()
    assert "[bold]:knife:" in out
    assert len(out) < 50_000


def test_a_long_message_is_cut_in_the_middle(capsys):
    run_app(failing_app(BadInput("It begins. " + "x" * 10_000 + " It ends.")), [])
    err = capsys.readouterr().err
    assert len(err) < 600
    assert "It begins" in err
    assert "It ends" in err


@pytest.mark.parametrize("columns", ["0", "1", "-1", "x", "²", "1" * 30])
def test_any_width_shows_an_error_and_the_cells(capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    assert run_app(failing_app(BadInput("It is wrong.")), []) == 2
    assert capsys.readouterr().err == "Error: It is wrong.\n"
    table = Table("one", "two")
    table.add_row("1", "2")
    Console().show(table)
    if columns != "1":
        assert "two" in capsys.readouterr().out


def test_names_from_outside_cannot_break_or_colour_a_line(capsys):
    run_app(failing_app(BadInput("There is no 'a\n\x1b[31mb[bold]'.")), [])
    assert capsys.readouterr().err == "Error: There is no 'a\\n\\x1b[31mb[bold]'.\n"


# --- where output goes


@pytest.mark.parametrize(
    ("json_", "quiet", "out", "err"),
    [
        (False, False, ["shown"], ["noted", "warned"]),
        (True, False, ["result"], ["noted", "warned", "shown"]),
        (False, True, [], ["warned"]),
        (True, True, ["result"], ["warned"]),
    ],
)
def test_each_kind_of_output_has_its_place(capsys, json_, quiet, out, err):
    console = Console(json=json_, quiet=quiet)
    console.note("noted")
    console.warn("warned")
    console.show("shown")
    console.result({"result": 1})
    streams = capsys.readouterr()
    words = ["noted", "warned", "shown", "result"]
    assert [word for word in words if word in streams.out] == [word for word in words if word in out]
    assert [word for word in words if word in streams.err] == [word for word in words if word in err]


def test_a_result_is_one_strict_json_value(capsys):
    Console(json=True).result(
        {"nan": float("nan"), "inf": [float("inf"), 1.5], "path": Path("/x"), "on": True, "é": None}
    )
    told = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert told == {"nan": None, "inf": [None, 1.5], "path": "/x", "on": True, "é": None}


def test_what_has_no_place_in_a_result_is_a_bug():
    with pytest.raises(TypeError, match="object"):
        Console(json=True).result({"x": object()})


def test_no_line_is_wrapped_in_a_pipe(capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    table = Table("one", "two")
    table.add_row("a " * 50 + "end", "b")
    Console().show(table)
    Console().show("c " * 200 + "end")
    out = capsys.readouterr().out
    assert "a " * 50 + "end" in out
    assert "c " * 200 + "end" in out


@pytest.mark.parametrize("columns", ["10", "40"])
def test_a_narrow_terminal_is_no_reason_to_fail(capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    table = Table("one", "two", "three")
    table.add_row("a long text", "another long text", "and one more")
    Console().show(table)
    assert max(map(len, capsys.readouterr().out.splitlines())) <= int(columns)


def test_no_color_is_heeded(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(sys, "stderr", Terminal())
    Console().warn("x")
    assert "\x1b[1;33m" in sys.stderr.getvalue()
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys, "stderr", Terminal())
    Console().warn("x")
    assert "33m" not in sys.stderr.getvalue()


# --- progress


def run_tasks(console: Console) -> None:
    with console.progress() as progress:
        encode = progress.task("Encoding", total=4, unit="prompts")
        for _ in range(4):
            encode(detail="so far")
        solve = progress.task("Solving")
        solve()


def test_progress_is_shown_on_a_terminal(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("COLUMNS", "120")
    run_tasks(Console())
    shown = sys.stderr.getvalue()
    assert "Encoding" in shown
    assert "4/4" in shown
    assert "Solving" in shown


def test_progress_is_silent_with_quiet_and_where_it_is_short(capsys, monkeypatch):
    run_tasks(Console())
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys, "stderr", Terminal())
    run_tasks(Console(quiet=True))
    assert sys.stderr.getvalue() == ""
