"""Files in repositories of the hub and the addresses of their pages, by a stand-in of its interface."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

import tiny
from maps import random_map
from trce_cli.checkpoint.card import _hub_id
from trce_cli.checkpoint.hub import Repository, commit, repository
from trce_cli.errors import BadInput

COMMIT = "a" * 40


@pytest.fixture(scope="module")
def hub(
    tiny_sd1: Path, tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Any]]:
    """A server with repositories of someone, and what is asked of it.

    mix: a single file. half: a folder of fp16 weights alone. pickled, bare: of pickles, with and without an
    index; partly: of a pickled U-Net. foreign: of a pipeline that is not known. edits: a map for half.
    """
    root = tmp_path_factory.mktemp("hub")
    mix = root / "mix"
    mix.mkdir()
    tiny.single_file("sdxl", tiny_sdxl, mix / "mix v1.safetensors")
    (mix / "README.md").write_text("a card")
    half = Path(shutil.copytree(tiny_sd1, root / "half"))
    pickled, partly, foreign = (
        Path(shutil.copytree(half, root / name)) for name in ("pickled", "partly", "foreign")
    )
    for path in (partly / "unet").glob("*.safetensors"):
        path.rename(path.with_suffix(".bin"))
    for path in half.rglob("*.safetensors"):
        path.rename(path.with_suffix(".fp16.safetensors"))
    for path in pickled.rglob("*.safetensors"):
        path.rename(path.with_suffix(".bin"))
    index = json.loads((foreign / "model_index.json").read_text())
    (foreign / "model_index.json").write_text(
        json.dumps(index | {"_class_name": "Other", "unet": ["x", "Y"]})
    )
    (root / "bare").mkdir()
    (root / "bare/v1.ckpt").write_text("no checkpoint")
    (root / "edits").mkdir()
    random_map(tiny_sd1).save(root / "edits/cats.safetensors")
    seen: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET(body=False)

        def do_GET(self, body: bool = True) -> None:
            seen.append(f"{self.command} {self.path}")
            path = unquote(self.path.split("?")[0])
            if found := re.match(r"/api/models/someone/(\w+)", path):
                files = sorted(each for each in (root / found[1]).rglob("*") if each.is_file())
                names = [each.relative_to(root / found[1]).as_posix() for each in files]
                told: Any = [
                    {"type": "file", "path": name, "size": each.stat().st_size, "oid": "0" * 40}
                    for name, each in zip(names, files, strict=True)
                ]
                if "/tree/" not in path:
                    siblings = [{"rfilename": name} for name in names]
                    name = f"someone/{found[1]}"
                    told = {"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings}
                if files:
                    self.answer(json.dumps(told).encode(), body)
                    return
            found = re.match(r"/someone/(\w+)/resolve/[^/]+/(.+)", path)
            if found and (root / found[1] / found[2]).is_file():
                self.answer((root / found[1] / found[2]).read_bytes(), body)
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


def weights(hub: dict[str, Any], since: int) -> list[str]:
    """The files of weights that were fetched since."""
    return [each for each in hub["seen"][since:] if each.startswith("GET /someone") and "safetensors" in each]


def test_the_only_variant_is_found_and_an_edit_on_the_hub_is_put_on_it(
    hub: dict[str, Any], tmp_path: Path
) -> None:
    line = ["apply", f"{hub['url']}/someone/edits/blob/main/cats.safetensors", "someone/half"]
    done = run(hub, tmp_path, *line, "-o", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (tmp_path / "out/unet").glob("*.safetensors")] == [
        "diffusion_pytorch_model.fp16.safetensors"
    ]
    history = json.loads((tmp_path / "out/trce.json").read_text())["history"]
    assert [each["file"] for each in history[-1]["edits"]] == ["cats.safetensors"]
    told = run(hub, tmp_path, "inspect", "someone/half", "--edit", "someone/edits/cats.safetensors", "--json")
    assert json.loads(told.stdout)["fits"] is True
    absent = run(hub, tmp_path, "inspect", "someone/half", "--variant", "bf16")
    assert absent.returncode == 2
    assert "Variants found: fp16." in absent.stderr


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("pickled", "only as pickles (text_encoder/model.bin"),
        ("bare", "only as pickles (v1.ckpt)"),
        ("partly", "has its unet only as a pickle (unet/diffusion_pytorch_model.bin)"),
        ("foreign", "of a family that is not known: its pipeline is Other"),
    ],
)
def test_what_is_refused_is_not_fetched_first(
    hub: dict[str, Any], tmp_path: Path, name: str, said: str
) -> None:
    since = len(hub["seen"])
    found = run(hub, tmp_path, "inspect", f"someone/{name}")
    assert found.returncode == 2
    assert said in found.stderr
    assert weights(hub, since) == []


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
