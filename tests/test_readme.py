"""What README and docs tell to type is there: commands with their options, make targets, files."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from trce_cli.cli.app import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands() -> list[list[str]]:
    """The words of every line in a block of shell commands."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```(?:console|sh)\n(.*?)```", page.read_text(), re.DOTALL):
            for line in re.split(r"\n|;|&&", block.replace("\\\n", " ")):
                if words := shlex.split(line, comments=True):
                    found.append(words)
    return found


OURS = [words for words in commands() if words[0] == "trce"]


def parse(group: Any, words: list[str]) -> None:
    """Parse as the command line would, and run nothing."""
    name, *rest = words
    command = group.commands[name]
    if hasattr(command, "commands"):
        parse(command, rest)
    else:
        command.make_context(name, rest)


@pytest.mark.parametrize("words", OURS, ids=" ".join)
def test_commands_are_understood(words: list[str]) -> None:
    parse(typer.main.get_command(app), words[1:])


def test_what_is_wrong_is_found() -> None:
    assert len(OURS) > 30
    with pytest.raises(Exception, match="--nonsense"):
        parse(typer.main.get_command(app), ["map", "emoji", "--nonsense", "-p", "weapons", "-o", "out"])


def test_make_targets_and_files_are_there() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        text = page.read_text()
        assert set(re.findall(r"`make ([a-z]+)`", text)) <= targets
        for link in re.findall(r"\]\(([^)#\s]+)", text):
            assert link.startswith("https://") or (page.parent / link).exists(), f"{page.name}: {link}"
        for script in re.findall(r"python (benchmarks/\w+\.py)", text):
            assert (ROOT / script).is_file()


def test_every_page_is_in_the_navigation_of_the_site() -> None:
    """As `make docs` demands, which takes what not everybody has installed."""
    navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    told = set(re.findall(r": ([\w-]+)\.md$", navigation, re.MULTILINE))
    pages = {page.stem for kind in ("md", "ipynb") for page in (ROOT / "docs").glob(f"*.{kind}")}
    assert told == {*pages, "start", "changelog"}  # README.md and CHANGELOG.md
