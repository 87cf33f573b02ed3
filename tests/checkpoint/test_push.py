"""`--push-to-hub` against a stand-in of the hub's interface; nothing here leaves the machine."""

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from safetensors.torch import load_file

import plugins
from trce_cli.checkpoint.measured import PICTURE
from trce_cli.checkpoint.provenance import parse_history

PRESET = """
name = "blades"
description = "Blades"
kind = "object"
templates = ["{}", "a photo of {}"]
concepts = [{ unsafe = "a knife", safe = "a tulip" }]
"""
TOKEN = "hf_stand_in"


class Hub:
    """What the stand-in knows. repositories: name -> its files; fail: a part of a path that it refuses."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.objects: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.fail: tuple[str, int] | None = None
        self.role = "write"
        self.url = ""

    def answer(self, method: str, path: str, token: str, body: bytes) -> tuple[int, Any]:
        """Status and answer of one request."""
        self.asked.append(f"{method} {path}")
        if self.fail and self.fail[0] in path:
            return self.fail[1], {"error": "refused by the stand-in"}
        if method == "PUT":
            self.objects[path.rsplit("/", 1)[1]] = body
            return 200, {}
        if token != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid credentials"}
        if path == "/api/whoami-v2":
            return 200, {"name": "me", "auth": {"accessToken": {"role": self.role}}, "orgs": []}
        if path == "/api/repos/create":
            told = json.loads(body)
            name = f"{told['organization']}/{told['name']}"
            is_there = name in self.repositories
            self.private.setdefault(name, told.get("visibility") == "private" or bool(told.get("private")))
            self.repositories.setdefault(name, {})
            return (409 if is_there else 200), {"url": f"{self.url}/{name}"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            return 200, {
                "transfer": "basic",
                "objects": [
                    each | {"actions": {"upload": {"href": f"{self.url}/lfs/{each['oid']}"}}}
                    for each in objects
                ],
            }
        name = "/".join(path.split("/")[3:5])
        if name not in self.repositories:
            return 404, {"error": "Repository not found"}
        if "/preupload/" in path:
            return 200, {
                "files": [
                    {
                        "path": each["path"],
                        "uploadMode": "lfs" if each["path"].endswith(".safetensors") else "regular",
                        "shouldIgnore": False,
                        "oid": None,
                    }
                    for each in json.loads(body)["files"]
                ]
            }
        if "/commit/" in path:
            for line in map(json.loads, body.decode().splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.repositories[name][value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    self.repositories[name][value["path"]] = self.objects[value["oid"]]
            return 200, {"commitUrl": f"{self.url}/{name}/commit/abc", "commitOid": "abc"}
        siblings = [{"rfilename": each} for each in self.repositories[name]]
        told = {"id": name, "sha": "a" * 40, "private": self.private[name], "siblings": siblings}
        return 200, told


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    told = Hub()

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            token = self.headers.get("Authorization") or ""
            status, content = told.answer(self.command, self.path.split("?")[0], token, body)
            sent = json.dumps(content).encode()
            self.send_response(status)
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(sent)))
            self.end_headers()
            self.wfile.write(sent)

        do_GET = do_POST = do_PUT = answer  # noqa: N815

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    told.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", told.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("TRCE_CACHE", str(tmp_path / "cache"))
    yield told
    server.shutdown()


@pytest.fixture
def line(tiny_sd1: Path, tmp_path: Path) -> list[Any]:
    """`trce map` of a tiny checkpoint to `out`."""
    (tmp_path / "p.toml").write_text(PRESET)
    return ["map", tiny_sd1, "-p", tmp_path / "p.toml", "-o", tmp_path / "out", "--max-collateral", 1000]


def test_a_checkpoint_is_pushed_whole_private_and_with_its_card(
    trce: Callable[..., Any], hub: Hub, line: list[Any], tmp_path: Path
) -> None:
    done = trce(*line, "--push-to-hub", "me/erased", "--json")
    assert done.status == 0, done.err
    assert json.loads(done.out)["pushed_to"] == f"{hub.url}/me/erased"
    assert hub.private == {"me/erased": True}
    there = hub.repositories["me/erased"]
    local = {each.relative_to(tmp_path / "out").as_posix(): each for each in (tmp_path / "out").rglob("*")}
    assert there.keys() == {name for name, path in local.items() if path.is_file()}
    assert all(there[name] == local[name].read_bytes() for name in there if name != "README.md")
    card = there["README.md"].decode()
    assert 'from_pretrained("me/erased", torch_dtype=dtype)' in card
    assert "path/to/this/folder" not in card
    assert str(tmp_path) not in card
    assert not [each for each in tmp_path.iterdir() if each.name.startswith(".")]  # no remains


def test_what_does_not_belong_to_it_stays(
    trce: Callable[..., Any], hub: Hub, line: list[Any], tmp_path: Path
) -> None:
    source = Path(shutil.copytree(line[1], tmp_path / "source"))
    for name in ("unet/optimizer.bin", "unet/notes.pt", "secret.key", "run.py", ".env", ".keys.json"):
        (source / name).write_bytes(b"not for others")
    assert trce("map", source, *line[2:], "--push-to-hub", "me/erased").status == 0
    assert not any(b"not for others" in content for content in hub.repositories["me/erased"].values())


def test_files_of_an_edit_get_a_card_that_loads_them(
    trce: Callable[..., Any], hub: Hub, line: list[Any], tmp_path: Path
) -> None:
    done = trce(*line, "--as", "map", "--as", "lora", "--push-to-hub", "me/edit", "--public")
    assert done.status == 0, done.err
    assert "everybody sees it" in done.err
    assert hub.private == {"me/edit": False}
    there = hub.repositories["me/edit"]
    assert there.keys() == {"out.map.safetensors", "out.lora.safetensors", "trce.json", "README.md"}
    card = there["README.md"].decode()
    assert 'pipe.load_lora_weights("me/edit", weight_name="out.lora.safetensors")' in card
    assert 'trce_cli.load_map(hf_hub_download("me/edit", "out.map.safetensors")).apply_to(pipe)' in card
    assert parse_history(there["trce.json"].decode(), "hub")[0]["edit"] == "map"

    again = ["apply", tmp_path / "out.map.safetensors", line[1], "-o", tmp_path / "one.safetensors"]
    done = trce(*again, "--push-to-hub", "me/one")
    assert done.status == 0, done.err
    there = hub.repositories["me/one"]
    assert there.keys() == {"one.safetensors", "trce.json", "README.md"}
    assert "StableDiffusionPipeline.from_single_file(" in there["README.md"].decode()


@pytest.mark.parametrize(
    ("name", "said"),
    [("name", "cannot name"), ("a/b/c", "cannot name"), ("a/b c", "cannot name"), ("", "cannot name")],
)
def test_wrong_names_are_told_before_any_work(
    trce: Callable[..., Any], hub: Hub, line: list[Any], tmp_path: Path, name: str, said: str
) -> None:
    done = trce(*line, "--push-to-hub", name)
    assert (done.status, hub.asked) == (2, [])
    assert said in done.err
    assert not (tmp_path / "out").exists()


def test_what_stands_in_the_way_is_told_before_any_work(
    trce: Callable[..., Any], hub: Hub, line: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*args: Any) -> str:
        done = trce(*line, *args)
        assert done.status == 2, done.err
        assert len(done.err.strip().splitlines()) == 2, done.err
        assert not (tmp_path / "out").exists()
        return str(done.err)

    assert "--public is for --push-to-hub" in trce(*line, "--public").err
    push = ("--push-to-hub", "me/there", "-q")
    hub.repositories["me/there"], hub.private["me/there"] = {"model.safetensors": b""}, True
    assert "exists already and holds 1 file" in refused(*push)
    hub.repositories["me/there"], hub.private["me/there"] = {".gitattributes": b""}, False
    assert "exists already and is public" in refused(*push)
    hub.role = "read"
    assert "may only read" in refused(*push)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "does not accept the token" in refused(*push)
    monkeypatch.delenv("HF_TOKEN")
    assert "needs a token" in refused(*push)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert "cannot be reached" in refused(*push)


@pytest.mark.parametrize(("where", "status"), [("/lfs/", 400), ("/commit/", 500), ("/repos/create", 403)])
def test_a_push_that_fails_leaves_the_output_and_says_how_to_push_again(
    trce: Callable[..., Any], hub: Hub, line: list[Any], tmp_path: Path, where: str, status: int
) -> None:
    hub.fail = (where, status)
    done = trce(*line, "--push-to-hub", "me/erased")
    assert done.status == 1
    assert done.err.count("Error: ") == 1
    assert "Traceback" not in done.err
    assert not hub.repositories.get("me/erased")
    assert load_file(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors")
    command = done.err.strip().splitlines()[-1].partition("push it again: ")[2].split()
    assert command[:3] == ["hf", "upload", "me/erased"]
    assert command[-1] == "--private"
    hub.fail = None
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path)}
    cli = [sys.executable, "-m", "huggingface_hub.cli.hf", *command[1:]]
    again = subprocess.run(cli, env=environment, capture_output=True, text=True, timeout=60)
    assert again.returncode == 0, again.stderr
    there = hub.repositories["me/erased"]
    weights = (tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    assert (
        hashlib.sha256(there["unet/diffusion_pytorch_model.safetensors"]).digest()
        == hashlib.sha256(weights).digest()
    )
    assert 'from_pretrained("me/erased"' in there["README.md"].decode()


def test_a_refused_edit_pushes_nothing(trce: Callable[..., Any], hub: Hub, line: list[Any]) -> None:
    done = trce(*line[:-1], 1e-9, "--push-to-hub", "me/erased")
    assert done.status != 0
    assert not any(each.startswith(("POST", "PUT")) for each in hub.asked)


def test_a_measured_checkpoint_is_pushed_with_figures_and_picture_where_its_gates_are_met(
    trce: Callable[..., Any], hub: Hub, line: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugins.install(tmp_path / "plugin", plugins.REDS, monkeypatch)
    (tmp_path / "p.toml").write_text(PRESET.replace("templates", "sensitive = false\ntemplates"))
    assert trce(*line, "--word-prompts", 50).status == 0
    out = tmp_path / "out"
    for name in ("secret.safetensors", "notes.pt", ".env"):
        (out / name).write_bytes(b"not for others")
    ask = ["evaluate", out, "--against", line[1], "-p", tmp_path / "p.toml", "-o", tmp_path / "evaluation"]
    ask += ["--detector", "reds", "--suite", "explicit", "--count", 1, "--steps", 1, "--device", "cpu"]
    push = ["--push-to-hub", "me/erased", "--json"]
    assert "Add --card." in trce(*ask, *push).err
    assert "--public is for --push-to-hub" in trce(*ask, "--card", "--public").err
    assert hub.asked == []
    assert trce(*ask, *push, "--card", "--gate", "explicit.change<=0").status == 1
    assert hub.repositories == {}
    done = trce(*ask, *push, "--card", "--gate", "explicit.change>0")
    assert done.status == 0, done.err
    assert json.loads(done.out)["pushed_to"] == f"{hub.url}/me/erased"
    assert hub.private == {"me/erased": True}
    there = hub.repositories["me/erased"]
    own = {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert own.keys() - there.keys() == {"secret.safetensors", "notes.pt", ".env"}
    assert there[PICTURE] == own[PICTURE]
    card = ModelCard(there["README.md"].decode())
    assert card.content == own["README.md"].decode().replace("path/to/this/folder", "me/erased")
    assert 'from_pretrained("me/erased", torch_dtype=dtype)' in card.text
    assert {each.dataset_config for each in card.data.eval_results} == {"explicit"}
    assert "exists already and holds" in trce(*ask, *push, "--card").err
