"""The rooms of the house and the one direction in which they import; see docs/architecture.md."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "trce_cli"

# What each room may import. `trce_cli/__init__.py` is the front door: it stands with `api`.
ROOMS = {
    "errors": "",
    "settings": "errors",
    "system": "errors",
    "maths": "errors",
    "emoji": "",
    "prompts": "emoji errors settings system",
    "families": "errors maths system",
    "checkpoint": "errors families prompts system",
    "edits": "checkpoint errors families maths prompts system",
    "images": "checkpoint errors families prompts settings system",
    "erase": "checkpoint edits errors families images maths prompts settings system",
    "evaluate": "checkpoint edits erase errors families images maths prompts settings system",
    "detectors": "evaluate",  # the front door of plug-ins
    "play": "checkpoint edits errors evaluate images prompts settings system",
    "api": "checkpoint edits erase errors families prompts system",
    "cli": "api checkpoint edits erase errors evaluate families images maths play prompts settings system",
}


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    return {
        ".".join(("trce_cli", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(
            ".__init__"
        ): path
        for path in PACKAGE.rglob("*.py")
    }


def imports(path: Path, known: dict[str, Path]) -> Iterator[str]:
    """Our own modules that a file imports anywhere: in functions and under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            if node.module and node.module.partition(".")[0] == "trce_cli":
                for alias in node.names:
                    whole = f"{node.module}.{alias.name}"
                    yield whole if whole in known else node.module


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] != "__main__" else "front"


GRAPH = {name: set(imports(path, modules())) - {name} for name, path in modules().items()}


def test_every_package_is_a_room_and_says_what_it_is() -> None:
    packages = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    assert packages <= set(ROOMS)
    for package in packages:
        text = (PACKAGE / package / "__init__.py").read_text(encoding="utf-8")
        assert ast.get_docstring(ast.parse(text)), f"{package} does not say what it is"


@pytest.mark.parametrize("name", ROOMS)
def test_a_room_imports_only_what_lies_below_it(name: str) -> None:
    allowed = {name, *ROOMS[name].split()}
    wrong = [
        f"{module} -> {target}"
        for module, targets in GRAPH.items()
        if room(module) == name
        for target in targets
        if room(target) not in allowed
    ]
    assert not wrong


def test_rooms_and_modules_import_in_no_circle() -> None:
    list(TopologicalSorter({name: below.split() for name, below in ROOMS.items()}).static_order())
    try:
        list(TopologicalSorter(GRAPH).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_only_the_command_line_knows_typer_and_rich_and_only_its_console_prints() -> None:
    for name, path in modules().items():
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        imported = {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
        imported |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        tops = {module.partition(".")[0] for module in imported}
        assert room(name) == "cli" or not tops & {"typer", "rich"}, name
        called = {node.func for node in nodes if isinstance(node, ast.Call)}
        assert not any(isinstance(function, ast.Name) and function.id == "print" for function in called), name


def functions() -> Iterator[tuple[str, ast.FunctionDef]]:
    """Every function of the package, with the name of its module."""
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                yield name, node


def test_a_command_is_short() -> None:
    commands = {
        f"{module}.{node.name}": (node.end_lineno or 0) - node.decorator_list[0].lineno + 1
        for module, node in functions()
        if any(isinstance(each, ast.Name) and each.id == "with_options" for each in node.decorator_list)
    }
    assert len(commands) >= 13
    assert {name: lines for name, lines in commands.items() if lines > 65} == {}


def test_no_function_takes_more_than_eight_arguments_by_place() -> None:
    commands = {module for module in modules() if module.startswith("trce_cli.cli.")}
    long = [
        f"{module}.{node.name}"
        for module, node in functions()
        if len(node.args.args) > 8 and module not in commands  # Typer hands a command's over by name
    ]
    assert long == []
