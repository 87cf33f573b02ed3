import json
import os
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

import trce_cli
from trce_cli.cli.app import app, main

HEAVY = {
    "torch",
    "diffusers",
    "transformers",
    "numpy",
    "accelerate",
    "scipy",
    "PIL",
    "safetensors",
    "huggingface_hub",
}

# What must answer at once: arguments and the exit status. Usage errors of every command are added below.
AT_ONCE = [
    (["--help"], 0),
    (["--version"], 0),
    ([], 2),
    (["presets", "list"], 0),
    (["presets", "list", "--json"], 0),
    (["presets", "show", "unsafe", "--pairs"], 0),
    (["presets", "show", "no-such-preset"], 2),
    (["presets", "check", "/no/such/file.toml"], 2),
    (["no-such-command"], 2),
    (["--no-such-option"], 2),
]


def leaf_commands() -> dict[tuple[str, ...], typer.core.TyperCommand]:
    def walk(command, path):
        if not hasattr(command, "commands"):
            yield path, command
            return
        for name, child in command.commands.items():
            yield from walk(child, (*path, name))

    return dict(walk(typer.main.get_command(app), ()))


def python(*args: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, timeout=120, **options)


def test_help_lists_and_usage_errors_load_nothing_heavy():
    lines = [*AT_ONCE]
    for path in leaf_commands():
        lines += [([*path, "--help"], 0), ([*path, "--no-such-option"], 2)]
    script = f"""
import json, sys
from trce_cli.cli.app import main
for line, status in {lines!r}:
    assert main(line) == status, line
    loaded = {HEAVY!r} & set(sys.modules)
    assert not loaded, (line, loaded)
"""
    done = python("-c", script)
    assert done.returncode == 0, done.stderr[-2000:]


def test_an_option_without_effect_is_told_of_and_taken(tmp_path, capsys):
    line = ["generate", str(tmp_path / "none"), "a hat", "-o", str(tmp_path / "out"), "--batch-size", "4"]
    assert main(line) == 2
    remark, error, *_ = capsys.readouterr().err.splitlines()
    assert remark == "--batch-size has no effect any more: each image is drawn alone."
    assert "none" in error
    assert main([*line, "--quiet"]) == 2
    assert "--batch-size" not in capsys.readouterr().err


@pytest.mark.parametrize("path", leaf_commands(), ids=" ".join)
def test_help_names_every_option_whole_in_a_narrow_terminal(path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    told = CliRunner().invoke(app, [*path, "--help"], prog_name="trce").stdout
    for parameter in leaf_commands()[path].params:
        if isinstance(parameter, typer.core.TyperOption) and not parameter.hidden:
            assert all(f"{option} " in told or f"{option}," in told for option in parameter.opts), told
    assert max(map(len, told.splitlines())) <= 80


def test_the_list_of_commands_cuts_no_line_short(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for path in ([], ["presets"]):
        assert "..." not in CliRunner().invoke(app, [*path, "--help"]).stdout.partition("Commands:")[2]


@pytest.mark.parametrize("path", leaf_commands(), ids=" ".join)
def test_every_command_takes_json_and_quiet_and_explains_itself(path):
    command = leaf_commands()[path]
    options = {option for parameter in command.params for option in parameter.opts}
    assert {"--json", "--quiet"} <= options
    assert command.help
    assert all(parameter.help for parameter in command.params)


@pytest.mark.parametrize("args", [[], ["presets"]])
def test_no_arguments_show_the_help_and_say_what_is_missing(trce, args):
    told = trce(*args)
    assert told.status == 2
    assert "presets" in told.err
    assert "Usage" in told.err
    assert told.err.endswith("\nError: Missing command.\n")


@pytest.mark.parametrize("args", [["apply", "x", "-o"], ["apply", "x", "--strength"], ["presets", "lst"]])
def test_wrong_usage_is_one_error(trce, args):
    told = trce(*args, "--json") if args[-1] == "lst" else trce(*args[:1], "--json", *args[1:])
    (error,) = [line for line in told.err.splitlines() if line.startswith("Error: ")]
    assert json.loads(told.out)["error"]["message"] == error.removeprefix("Error: ")


@pytest.mark.parametrize("asked", ["--install-completion", "--show-completion"])
def test_completion_for_an_unknown_shell_is_an_error(trce, monkeypatch, asked):
    import shellingham

    def unknown():
        raise shellingham.ShellDetectionFailure

    monkeypatch.setattr(shellingham, "detect_shell", unknown)
    told = trce(asked)
    assert told.status == 1
    assert "\nError: Completion is not for this shell.\n" in f"\n{told.err}"


def test_version(trce):
    assert trce("--version").out == f"trce {trce_cli.__version__}\n"


@pytest.mark.parametrize("args", [["presets", "lst"], ["presets", "show"], ["presets", "list", "--jsn"]])
def test_wrong_usage_is_told_on_stderr(trce, args):
    told = trce(*args)
    assert (told.status, told.out) == (2, "")
    assert told.err
    assert "Traceback" not in told.err


def test_the_module_runs_as_the_script_does():
    done = python("-m", "trce_cli", "presets", "list", "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["presets"]


@pytest.mark.parametrize("options", ["", "--json --quiet"])
def test_a_reader_that_stops_early_gets_no_traceback(options):
    # More than a pipe holds, so that the writer is still at it when the reader goes.
    line = f"{sys.executable} -m trce_cli presets show unsafe --pairs {options} | head -1"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_device_is_told():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "trce_cli", "presets", "list"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
        )
    assert done.returncode == 1
    assert done.stderr.startswith("Error: No space")


def test_ctrl_c_exits_with_130():
    script = """
import os, signal, sys
from trce_cli.cli.app import app, main
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs inherit it ignored
@app.command("wait")
def wait() -> None:
    os.kill(os.getpid(), signal.SIGINT)
    signal.pause()
sys.exit(main(["wait"]))
"""
    done = python("-c", script)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "Error: Interrupted.\n")


@pytest.mark.parametrize(
    ("words", "wanted"), [("trce pre", "presets"), ("trce presets show self", "self-harm")]
)
def test_the_shell_completes_commands_and_preset_names(words, wanted):
    environment = {
        **os.environ,
        "_TRCE_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - 1),
    }
    done = python("-X", "importtime", "-m", "trce_cli", env=environment)
    assert wanted in done.stdout.split()
    loaded = {
        line.split("|")[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")
    }
    assert "typer" in loaded
    assert not loaded & HEAVY


def test_output_survives_a_terminal_without_unicode():
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C"}
    done = python("-m", "trce_cli", "presets", "show", "artist-van-gogh", env=environment)
    assert done.returncode == 0, done.stderr[-500:]
