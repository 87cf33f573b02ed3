"""The pure modules know equations and names of weights, and nothing of commands, pipelines or files."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "trce_cli"
PURE = sorted(path for pattern in ("maths/[!_]*.py", "families/*/names.py") for path in PACKAGE.glob(pattern))
FORBIDDEN = {"typer", "rich", "diffusers", "transformers", "safetensors", "accelerate", "PIL"}
FILES = {"pathlib", "os", "io", "shutil", "tempfile", "mmap"}


def test_there_are_pure_modules() -> None:
    assert {"closed_form.py", "contrastive.py", "names.py"} <= {path.name for path in PURE}


@pytest.mark.parametrize("path", PURE, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_a_pure_module_loads_no_command_line_no_pipeline_and_no_files(path: Path) -> None:
    module = ".".join(("trce_cli", *path.relative_to(PACKAGE).with_suffix("").parts))
    script = f"""if True:
        import sys, {module}
        ours = [name for name in sys.modules if name.startswith(("trce_cli.system.p", "trce_cli.system.w"))]
        print(*sorted({FORBIDDEN!r} & set(sys.modules)), *ours)
    """
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.split() == []
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    imported = {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    imported |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    assert not imported & FILES
