import subprocess
import sys

import pytest

FORBIDDEN = {"typer", "rich", "diffusers", "transformers", "trce_cli.cli.app", "trce_cli.cli.console"}


@pytest.mark.parametrize(
    "module",
    [
        "prompts.pairs",
        "maths.closed_form",
        "maths.contrastive",
        "maths.statistics",
        "evaluate.gates",
        "prompts.suites",
        "evaluate.attacks.ring_a_bell",
        "evaluate.attacks.unlearn_diff",
    ],
)
def test_a_pure_module_loads_no_command_line_and_no_pipeline(module):
    script = f"import sys, trce_cli.{module}; print(*sorted({FORBIDDEN!r} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.split() == []
