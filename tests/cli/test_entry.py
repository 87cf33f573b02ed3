"""The process as a whole: streams that are not there, signals at any moment."""

import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = [sys.executable, "-m", "trce_cli"]
WRONG = [*COMMAND, "presets", "show", "no-such-preset"]


def run(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", script, "trce", *COMMAND], capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize(
    ("script", "status", "err"),
    [
        ('"$@" presets list >&-', 0, ""),
        ('"$@" presets list <&- >&- 2>&-', 0, ""),
        ('"$@" presets list 1< /dev/null 2< /dev/null', 0, ""),
        ('"$@" --version 1< /dev/null', 0, ""),
        ('"$@" presets list > /dev/full', 1, "No space"),
        ('"$@" presets list > /dev/full 2>&1', 1, ""),
        ('"$@" presets show nothing 2>&-', 2, ""),
        ('"$@" presets show nothing 2> /dev/full', 2, ""),
        ('"$@" presets show nothing > /dev/full', 2, "no preset"),
        ('COLUMNS=0 "$@" presets show nothing', 2, "no preset"),
        ('"$@" no-such-command 2> /dev/full', 2, ""),
        ('"$@" presets show nothing 2>&1 >/dev/null | true; exit ${PIPESTATUS[0]}', 2, ""),
    ],
)
def test_streams_that_are_closed_or_full_change_no_exit_status(script: str, status: int, err: str) -> None:
    done = run(script)
    assert done.returncode == status
    assert err in done.stderr
    assert "Traceback" not in done.stderr


def test_what_is_left_in_the_end_is_not_collected() -> None:
    """It takes seconds where torch and Gradio are loaded: Ctrl-C would seem to be ignored."""
    code = "import gc; from trce_cli.__main__ import main; main(); print(gc.get_freeze_count() > 1000)"
    done = subprocess.run([sys.executable, "-c", code, "--version"], capture_output=True, text=True)
    assert done.stdout.endswith("True\n")


def test_a_closed_stream_is_not_taken_for_an_output(tmp_path: Path) -> None:
    done = run(f'cd {tmp_path} && "$@" presets new x.toml >&- 2>&-')
    assert done.returncode == 0
    assert (tmp_path / "x.toml").read_text().startswith("#")


def test_ctrl_c_during_the_imports(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(
        WRONG,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # a runner in the background ignores it
    )
    assert (done.returncode, done.stderr) == (130, "Error: Interrupted.\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_at_the_interpreter_s_end_is_no_traceback(number: signal.Signals) -> None:
    script = (
        f"import atexit, os, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        f"atexit.register(os.kill, os.getpid(), {number:d}); "
        "from trce_cli.__main__ import main; sys.argv[1:] = ['presets', 'list']; sys.exit(main())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (-number, "")
    assert done.stdout


STOPPED = """
import os, sys
from pathlib import Path
import typer
import trce_cli.system.entry
trce_cli.system.entry.begin()
from trce_cli.cli.console import Console, run_app
from trce_cli.system.whole import whole
app = typer.Typer()
@app.command()
def work():
    with Console().progress() as progress:
        progress.task("At work", 3)
        with whole(Path(sys.argv[1])) as fresh:
            fresh.write_text("half")
            os.kill(os.getpid(), int(sys.argv[2]))
            raise AssertionError("went on")
sys.exit(run_app(app, []))
"""


LOST = """
import os, signal, sys, time
import trce_cli.system.entry
signal.signal(signal.SIGINT, signal.default_int_handler)
trce_cli.system.entry.begin()
import typer
from trce_cli.cli.console import run_app
app = typer.Typer()
def work_for(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass
class Gone:
    def __del__(self):
        os.kill(os.getpid(), int(sys.argv[1]))
        work_for(0.01)
def caught():
    try:
        os.kill(os.getpid(), int(sys.argv[1]))
        work_for(0.01)
    except BaseException:
        pass
@app.command()
def work():
    try:
        Gone() if sys.argv[2] == "gone" else caught()
        work_for(20)
        print("went on")
    finally:
        work_for(2)  # longer than until a signal that was lost is raised again
        print("cleaned up")
sys.exit(run_app(app, []))
"""


@pytest.mark.parametrize("where", ["gone", "caught"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_comes_to_nothing_is_raised_again(number: signal.Signals, where: str) -> None:
    line = [sys.executable, "-c", LOST, f"{number:d}", where]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (128 + number, "cleaned up\n")
    assert done.stderr == ("Error: Interrupted.\n" if number == signal.SIGINT else "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_terminal_and_disk_in_order(tmp_path: Path, number: signal.Signals) -> None:
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", STOPPED, tmp_path / "out", str(int(number))],
        stderr=follower,
        env=os.environ | {"TERM": "xterm"},
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # a runner under nohup ignores one of them
    )
    os.close(follower)
    shown = b""
    try:
        while block := os.read(leader, 4096):
            shown += block
    except OSError:  # the other end is closed
        pass
    os.close(leader)
    assert process.wait(60) == 128 + number
    assert list(tmp_path.iterdir()) == []
    assert shown.rfind(b"\x1b[?25h") > shown.rfind(b"\x1b[?25l") >= 0
    assert b"Traceback" not in shown


def test_nohup_is_heeded() -> None:
    script = (
        "import signal, trce_cli.system.entry as entry; entry.begin(); print(signal.getsignal(signal.SIGHUP))"
    )
    done = run(f"trap '' HUP; {sys.executable} -c '{script}'")
    assert str(int(signal.SIG_IGN)) in done.stdout or "SIG_IGN" in done.stdout
