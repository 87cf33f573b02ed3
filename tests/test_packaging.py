import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from trce_cli.prompts.presets import preset_names

ROOT = Path(__file__).parent.parent


def run(*command: str | Path, cwd: Path) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel in it; the libraries it needs are those of this one."""
    folder = tmp_path_factory.mktemp("packaging")
    pip = [sys.executable, "-m", "pip"]
    run(
        *pip,
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--wheel-dir",
        folder,
        ROOT,
        cwd=folder,
    )
    (wheel,) = folder.glob("trce-*.whl")
    venv.create(folder / "venv", with_pip=False)
    (site,) = folder.glob("venv/lib/python*/site-packages")
    # A path from a .pth file brings packages, but not that path's own .pth files, as of an editable install.
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    run(*pip, "--python", folder / "venv", "install", "--no-deps", "--no-index", wheel, cwd=folder)
    return folder


def test_the_wheel_brings_the_script_and_the_presets(fresh, tmp_path):
    told = json.loads(run(fresh / "venv/bin/trce", "presets", "list", "--json", cwd=tmp_path))
    assert [row["name"] for row in told["presets"]] == preset_names()


def test_it_is_the_wheel_that_was_tested(fresh, tmp_path):
    script = (
        "import trce_cli, trce_cli.prompts.presets as p;"
        "print(trce_cli.__file__, p.presets_folder(), sep='\\n')"
    )
    for place in run(fresh / "venv/bin/python", "-c", script, cwd=tmp_path).splitlines():
        assert Path(place).is_relative_to(fresh / "venv")


def test_the_version_is_told_once(fresh, tmp_path):
    script = "import importlib.metadata as m, trce_cli; print(m.version('trce') == trce_cli.__version__)"
    assert run(fresh / "venv/bin/python", "-c", script, cwd=tmp_path) == "True\n"
