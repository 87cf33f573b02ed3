"""What MkDocs does beside its own: links work on the site as they do in the repository.

A link from a page to a file or folder of the repository leads to a page of its text, README and changelog are
pages, and so is each notebook.
"""

import ast
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = {"README.md": "start.md", "CHANGELOG.md": "changelog.md"}  # of the repository, pages of the site
LINK = re.compile(r"(?<=\]\()([^)#\s]+)")
LANGUAGES = {".py": "python", ".toml": "toml", ".md": "markdown"}
FENCE = "`" * 8


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are not in docs/."""
    for name, uri in PAGES.items():
        files.append(File.generated(config, uri, content=relinked((ROOT / name).read_text("utf-8"), ROOT)))
    for notebook in sorted(DOCS.glob("*.ipynb")):
        files.append(File.generated(config, f"{notebook.stem}.md", content=relinked(prose(notebook), DOCS)))
    for path in linked():
        if not path.is_relative_to(DOCS) and str(path.relative_to(ROOT)) not in PAGES:
            files.append(File.generated(config, page_of(path), content=shown(path)))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Links of the pages in docs/; those of others were made when they were."""
    return markdown if page.file.generated_by else relinked(markdown, DOCS)


def linked() -> Iterator[Path]:
    """Every file and folder that a page links to."""
    texts = [(page.read_text("utf-8"), DOCS) for page in sorted(DOCS.glob("*.md"))]
    texts += [(prose(notebook), DOCS) for notebook in sorted(DOCS.glob("*.ipynb"))]
    texts += [((ROOT / name).read_text("utf-8"), ROOT) for name in PAGES]
    found = (target(link, folder) for text, folder in texts for link in LINK.findall(text))
    yield from sorted({path for path in found if path is not None})


def target(link: str, folder: Path) -> Path | None:
    """What a link of a text in the folder leads to; None where that is nothing of the repository."""
    path = Path(os.path.normpath(folder / link))
    return path if path.is_relative_to(ROOT) and path != ROOT and path.exists() else None


def relinked(markdown: str, folder: Path) -> str:
    """A text that lies in the folder, with its links as those of a page at the top of the site."""

    def link(found: re.Match[str]) -> str:
        path = target(found[1], folder)
        return found[1] if path is None else page_of(path)

    return LINK.sub(link, markdown)


def page_of(path: Path) -> str:
    """Where the site has a file or folder of the repository."""
    name = path.relative_to(ROOT).as_posix()
    if name in PAGES:
        return PAGES[name]
    if path.is_relative_to(DOCS):
        return path.relative_to(DOCS).as_posix().replace(".ipynb", ".md")
    return f"source/{name}.md"


def shown(path: Path) -> str:
    """The page of a file: its text; of a folder: what its modules are."""
    title = f"---\nsearch:\n  exclude: true\n---\n\n# {path.relative_to(ROOT).as_posix()}\n\n"
    if path.is_file():
        language = LANGUAGES.get(path.suffix, "text")
        return f"{title}{FENCE}{language}\n{path.read_text('utf-8')}\n{FENCE}\n"
    rows = [
        f"| `{each.relative_to(path).as_posix()}` | {purpose(each)} |" for each in sorted(path.rglob("*.py"))
    ]
    return title + "\n".join(["| module | what it is |", "|---|---|", *rows]) + "\n"


def purpose(module: Path) -> str:
    """The first line of a module's docstring, safe in a table."""
    first = (ast.get_docstring(ast.parse(module.read_text("utf-8"))) or "").partition("\n")[0]
    return first.replace("|", "\\|").replace("<", "&lt;")


def prose(notebook: Path) -> str:
    """A notebook as Markdown: its text, its code, and what it printed."""
    parts = []
    for cell in json.loads(notebook.read_text("utf-8"))["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
        printed = [
            "".join(each["text"]) for each in cell.get("outputs", ()) if each["output_type"] == "stream"
        ]
        parts += [f"```text\n{text.rstrip()}\n```" for text in printed]
    return "\n\n".join(parts) + "\n"
