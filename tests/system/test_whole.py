import errno
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from trce_cli.errors import BadInput, TrceError
from trce_cli.system import whole as module
from trce_cli.system.whole import (
    appending,
    clear_stale,
    make_inside,
    together,
    whole,
    write_bytes,
    write_text,
)


def write(output: Path, replace: bool) -> None:
    """Write a file, while a folder appears in its place."""
    with whole(output, replace) as fresh:
        fresh.write_text("ours")
        output.mkdir()
        (output / "precious").touch()


def write_folder(output: Path, text: str) -> None:
    with whole(output) as fresh:
        fresh.mkdir()
        (fresh / "file").write_text(text)


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@pytest.fixture(params=[True, False], ids=["renameat2", "plain renames"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without the system's conditional renames."""
    if not request.param:
        monkeypatch.setattr(module, "_renameat2", lambda *args: False)


@pytest.mark.usefixtures("system")
@pytest.mark.parametrize("replace", [False, True])
def test_what_appears_while_an_output_is_written_is_not_replaced(tmp_path: Path, replace: bool) -> None:
    with pytest.raises(TrceError, match="Is a directory" if replace else "appeared while"):
        write(tmp_path / "out", replace)
    assert names(tmp_path) == ["out", "out/precious"]


def test_what_is_there_already_is_told_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    write_text(tmp_path / "file", "old")
    for name in ("file", "link"):
        with pytest.raises(BadInput, match="exists already"), whole(tmp_path / name, replace=False):
            pytest.fail("It has begun.")
    assert names(tmp_path) == ["file", "link"]


@pytest.mark.usefixtures("system")
def test_files_and_folders_are_replaced_by_their_kind_only(tmp_path: Path) -> None:
    for text in ("old", "new"):
        write_text(tmp_path / "file", text)
        write_folder(tmp_path / "folder", text)
    assert (tmp_path / "file").read_text() == (tmp_path / "folder/file").read_text() == "new"
    with pytest.raises(TrceError, match="Not a directory"):
        write_folder(tmp_path / "file", "x")
    with pytest.raises(TrceError, match="Is a directory"):
        write_text(tmp_path / "folder", "x")
    assert names(tmp_path) == ["file", "folder", "folder/file"]


def test_nothing_that_was_planted_is_opened(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    out = tmp_path / "out"
    out.mkdir()
    (out / "link").symlink_to(victim)
    (out / "dangling").symlink_to(tmp_path / "nowhere")
    os.mkfifo(out / "pipe")
    for name in ("link", "dangling", "pipe"):
        write_text(out / name, "ours")
        assert (out / name).is_file()
        assert not (out / name).is_symlink()
    assert victim.read_text() == "precious"
    assert names(tmp_path) == ["out", "out/dangling", "out/link", "out/pipe", "victim"]


def test_lines_are_appended_to_our_own_files_only(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "link").symlink_to(victim)
    (tmp_path / "hard").hardlink_to(victim)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("link", "hard", "pipe", "folder"):
        with pytest.raises(BadInput, match="no file of ours"):
            appending(tmp_path / name)
    assert victim.read_text() == "precious"
    for _ in range(2):
        with appending(tmp_path / "own") as file:
            file.write("a line\n")
    assert (tmp_path / "own").read_text() == "a line\n" * 2


def test_folders_are_not_written_to_through_links(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").symlink_to("elsewhere")  # the output itself may be one: its user chose it
    assert make_inside(tmp_path / "out", "a", "b").is_dir()
    (tmp_path / "out/c").symlink_to(tmp_path)
    (tmp_path / "out/d").write_text("")
    for name in ("c", "d"):
        with pytest.raises(BadInput, match="no folder of ours"):
            make_inside(tmp_path / "out", name, "b")
    assert names(tmp_path / "elsewhere") == ["a", "a/b", "c", "d"]


KILLED = """
import os, signal, sys
from pathlib import Path
from trce_cli.system import whole
with whole.whole(Path(sys.argv[1])) as fresh:
    fresh.write_text("half")
    print("writing", flush=True)
    sys.stdin.readline()
"""


def test_what_a_killed_run_left_goes_and_nothing_else(tmp_path: Path) -> None:
    like = [".trce-0123456789abcdef", ".trce-fedcba9876543210", ".out.trce-notes", ".out.tmp"]
    for name in like[:3]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "mark").write_text("a user's")
    (tmp_path / like[1] / "mark").write_text(like[0])  # the mark of another one
    (tmp_path / like[3]).write_text("a user's")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / ".trce-aaaaaaaaaaaaaaaa").symlink_to(like[0])
    before = names(tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        stdin=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        clear_stale(tmp_path)  # it lives
        assert len(names(tmp_path)) == len(before) + 3
        process.send_signal(signal.SIGKILL)
    clear_stale(tmp_path)
    assert names(tmp_path) == before


def fail_at(monkeypatch: pytest.MonkeyPatch, function: str, number: int, error: BaseException) -> None:
    """Let the `number`th call of a function of `os` fail, and all calls of a full disk after it."""
    real, calls = getattr(os, function), iter(range(1000))

    def failing(*args, **options):
        if next(calls) == number:
            raise error
        return real(*args, **options)

    monkeypatch.setattr(os, function, failing)


@pytest.mark.usefixtures("system")
@pytest.mark.parametrize("error", [OSError(errno.EIO, "broken"), KeyboardInterrupt()], ids=["EIO", "Ctrl-C"])
@pytest.mark.parametrize("function", ["mkdir", "open", "write", "rename", "replace", "fstat", "lstat"])
@pytest.mark.parametrize("folder", [True, False])
def test_a_failure_anywhere_leaves_the_old_output_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, error: BaseException, folder: bool
) -> None:
    output = tmp_path / "out"

    def replace(text: str) -> None:
        write_folder(output, text) if folder else write_bytes(output, text.encode())

    def content() -> str:
        return (output / "file" if folder else output).read_text()

    replace("old")
    for number in range(5):
        with monkeypatch.context() as patched:
            fail_at(patched, function, number, error)
            with suppress(TrceError, KeyboardInterrupt):
                replace("new")
        clear_stale(tmp_path)
        assert content() in ("old", "new")
        assert {path.name for path in tmp_path.iterdir()} == {"out"}
        replace("old")


def race(output: Path, text: str) -> None:
    for _ in range(40):
        write_folder(output, text)
        write_text(output.with_name("file"), text)


@pytest.mark.usefixtures("system")
def test_two_that_replace_the_same_do_not_get_in_each_others_way(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    runs = [context.Process(target=race, args=(tmp_path / "out", text)) for text in ("a", "b", "c")]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert [run.exitcode for run in runs] == [0] * 3
    assert (tmp_path / "out/file").read_text() in "abc"
    assert names(tmp_path) == ["file", "out", "out/file"]


def test_a_name_that_is_too_long_is_told_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(TrceError, match="name too long"), whole(tmp_path / ("x" * 300)):
        pytest.fail("the work was begun")
    assert names(tmp_path) == []


@pytest.mark.usefixtures("system")
def test_outputs_take_their_places_together_or_none_does(tmp_path: Path) -> None:
    old, file, folder, beside = (tmp_path / name for name in ("old", "file", "folder", "beside"))
    write_text(old, "old")
    targets = [old, file, folder]

    def changed() -> None:
        raise TrceError("It changed.")

    def make(replace: bool = True, unchanged: Callable[[], None] = lambda: None) -> None:
        with together(targets):
            write_text(old, "new")
            write_folder(folder, "new")
            with whole(file, replace, unchanged) as fresh:
                fresh.write_text("new")
                write_text(beside, "at once")  # none of them
                assert beside.exists()
                assert old.read_text() == "old"
            clear_stale(tmp_path)  # what waits is no other run's to remove
            if not replace:
                file.write_text("a user's")

    with suppress(ZeroDivisionError), together(targets):
        write_text(old, "new")
        raise ZeroDivisionError
    assert names(tmp_path) == ["old"]
    with pytest.raises(TrceError, match="It changed"):
        make(unchanged=changed)
    with pytest.raises(TrceError, match="appeared while"):
        make(replace=False)
    assert names(tmp_path) == ["beside", "file", "old"]
    assert (old.read_text(), file.read_text()) == ("old", "a user's")
    make()
    assert names(tmp_path) == ["beside", "file", "folder", "folder/file", "old"]
    assert {path.read_text() for path in (old, file, folder / "file")} == {"new"}
