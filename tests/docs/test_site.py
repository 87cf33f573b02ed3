"""docs/ as a site, built strictly without a network, and the notebook that is a part of it."""

import json
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "docs/walkthrough.ipynb"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site as `make docs` builds it."""
    pytest.importorskip("material", reason="MkDocs Material is not installed: pip install 'trce[docs]'")
    folder = tmp_path_factory.mktemp("site")
    line = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_every_page_is_there_and_loads_nothing_from_elsewhere(site: Path) -> None:
    pages = {f"{path.stem}.html" for path in (ROOT / "docs").glob("*.md")}
    assert pages | {"start.html", "changelog.html", "walkthrough.html"} <= {
        p.name for p in site.glob("*.html")
    }
    loaded = re.compile(
        r"<(?:script|img|source|iframe)[^>]* src=\"?([^\"\s>]+)|<link[^>]* href=\"?([^\"\s>]+)"
    )
    for page in site.rglob("*.html"):
        for addresses in loaded.findall(page.read_text("utf-8")):
            assert not "".join(addresses).startswith(("http:", "https:", "//")), page


def test_every_link_leads_to_a_file_of_the_site(site: Path) -> None:
    for page in site.glob("[!4]*.html"):  # the page of what is not there knows its server alone
        for link in re.findall(r'href="([^"#?]+)', page.read_text("utf-8")):
            if not re.match(r"[a-z]+:", link):
                assert (page.parent / unquote(link)).exists(), f"{page.name}: {link}"
    assert "def solve" in re.sub(
        "<[^>]+>", "", (site / "source/trce_cli/maths/closed_form.py.html").read_text()
    )
    assert "walkthrough.html" in (site / "index.html").read_text()


def test_the_notebook_is_committed_bare() -> None:
    told = NOTEBOOK.read_text("utf-8")
    for cell in json.loads(told)["cells"]:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
    assert not re.search(r"/(home|root|work|tmp|Users)/", told)


def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    import nbformat

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    where = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=where).execute()
    printed = "".join(each.get("text", "") for cell in notebook.cells for each in cell.get("outputs", ()))
    assert "good: " in printed
    assert "explicit: a weapon in" in printed
    assert any(
        "image/png" in each.get("data", ()) for cell in notebook.cells for each in cell.get("outputs", ())
    )
    assert not list(tmp_path.iterdir())
