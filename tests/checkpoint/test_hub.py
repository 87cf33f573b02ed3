"""Files in repositories of the hub and the addresses of their pages, by a stand-in of its interface."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import tiny
from trce_cli.checkpoint.card import _hub_id
from trce_cli.checkpoint.hub import Repository, commit, repository
from trce_cli.errors import BadInput

COMMIT = "a" * 40


@pytest.fixture(scope="module")
def hub(tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """A server with one repository, someone/mix, of a single file, and what is asked of it."""
    files = tmp_path_factory.mktemp("hub")
    tiny.single_file("sdxl", tiny_sdxl, files / "mix v1.safetensors")
    (files / "README.md").write_text("a card")
    seen: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET(body=False)

        def do_GET(self, body: bool = True) -> None:
            seen.append(f"{self.command} {self.path}")
            path = self.path.split("?")[0]
            if path.startswith("/api/models/someone/mix"):
                names = [{"rfilename": each.name} for each in sorted(files.iterdir())]
                tree = [
                    {"type": "file", "path": each.name, "size": each.stat().st_size, "oid": "0" * 40}
                    for each in sorted(files.iterdir())
                ]
                if "/tree/" in path:
                    self.answer(json.dumps(tree).encode(), body)
                    return
                told = {"id": "someone/mix", "modelId": "someone/mix", "sha": COMMIT, "siblings": names}
                self.answer(json.dumps(told).encode(), body)
                return
            if path.startswith("/someone/mix/resolve/"):
                file = files / path.split("/")[-1].replace("%20", " ")
                if file.is_file():
                    self.answer(file.read_bytes(), body)
                    return
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def answer(self, content: bytes, body: bool) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield {"url": f"http://127.0.0.1:{server.server_port}", "seen": seen}
    server.shutdown()


def run(hub: dict[str, Any], home: Path, *line: Any) -> subprocess.CompletedProcess[str]:
    told = {"HF_ENDPOINT": hub["url"], "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "COLUMNS": "200"}
    told |= {"HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    command = [sys.executable, "-m", "trce_cli", *map(str, line)]
    return subprocess.run(command, env=os.environ | told, capture_output=True, text=True, timeout=120)


def test_a_file_in_a_repository_is_fetched_once_and_edited(
    hub: dict[str, Any], tiny_sdxl: Path, tmp_path: Path
) -> None:
    name = "someone/mix/mix v1.safetensors"
    found = run(hub, tmp_path, "inspect", name, "--config", tiny_sdxl, "--json")
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["family"] == "SDXL"
    before = len(hub["seen"])
    page = f"{hub['url']}/someone/mix/blob/main/mix%20v1.safetensors"
    (tmp_path / "p.toml").write_text(
        'name = "p"\ndescription = "p"\nkind = "object"\n[[concepts]]\nunsafe = "a knife"\nsafe = "a spoon"\n'
    )
    line = ["map", page, "-p", tmp_path / "p.toml", "--config", tiny_sdxl, "-o", tmp_path / "out.safetensors"]
    made = run(hub, tmp_path, *line, "--max-collateral", 1000)
    assert made.returncode == 0, made.stderr
    assert not any(each.startswith("GET /someone") for each in hub["seen"][before:])  # from the cache
    assert (tmp_path / "out.safetensors").is_file()


def test_a_repository_without_a_folder_is_told_what_it_holds(hub: dict[str, Any], tmp_path: Path) -> None:
    found = run(hub, tmp_path, "inspect", "someone/mix")
    assert found.returncode == 2
    assert "It holds mix v1.safetensors." in found.stderr
    assert "someone/mix/mix v1.safetensors" in found.stderr


def test_what_is_not_there_is_one_sentence(hub: dict[str, Any], tmp_path: Path) -> None:
    for name in ("someone/mix/other.safetensors", "nobody/none/file.safetensors", "nobody/none"):
        found = run(hub, tmp_path, "inspect", name)
        assert found.returncode == 2, found.stdout
        assert "cannot be had from the hub" in found.stderr
        assert "Traceback" not in found.stderr


PAGE = "https://huggingface.co/owner/some.model"


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("owner/some.model", Repository("owner/some.model")),
        (PAGE, Repository("owner/some.model")),
        (f"{PAGE}/tree/fp16", Repository("owner/some.model", "fp16")),
        ("owner/some.model/a/b.safetensors", Repository("owner/some.model", None, "a/b.safetensors")),
        (f"{PAGE}/blob/main/a%20b.safetensors", Repository("owner/some.model", "main", "a b.safetensors")),
        (
            f"{PAGE}/resolve/v1/c.safetensors?download=true",
            Repository("owner/some.model", "v1", "c.safetensors"),
        ),
        ("owner/some.model/folder", None),
        ("no such thing", None),
    ],
)
def test_names_and_addresses(name: str, meant: Repository | None) -> None:
    assert repository(name) == meant
    if meant is not None:
        assert _hub_id(name) == "owner/some.model"


@pytest.mark.parametrize(
    "name",
    [
        "https://example.org/owner/name/blob/main/a.safetensors",
        "https://huggingface.co/",
        f"{PAGE}/discussions/3",
    ],
)
def test_other_addresses_are_not_fetched(name: str) -> None:
    with pytest.raises(BadInput, match="is no page"):
        repository(name)


def test_the_commit_is_that_of_the_snapshot() -> None:
    assert commit(Path(f"/c/models--a--b/snapshots/{COMMIT}/x/y.safetensors")) == COMMIT
    assert commit(Path("/data/y.safetensors")) is None
