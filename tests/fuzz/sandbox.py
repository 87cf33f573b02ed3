"""Where commands are run on hostile input: a server that is started anew when one of them ends it."""

import contextlib
import json
import os
import select
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import plugins

PATIENCE = 600  # seconds of the wall clock after which a command hangs, on a machine that is busy


@dataclass(frozen=True)
class Done:
    """What a command left: exit status (negative: a signal), streams, CPU seconds, memory it added in bytes,
    and where it was watched its file-system events."""

    args: list[str]
    status: int
    out: str
    err: str
    seconds: float = 0.0
    memory: int = 0
    events: tuple[str, ...] = ()


class Sandbox:
    """Runs command lines of `trce`; cache and home lie in `home`."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self._server: subprocess.Popen[str] | None = None

    def run(self, args: list[str], folder: Path, plan: dict[str, Any] | None = None) -> Done:
        """Run `trce ARGS` in that folder. plan: see `events.watch`; the command then runs in a fork."""
        server = self._server or self._start()
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write(json.dumps({"args": args, "folder": str(folder), "plan": plan}) + "\n")
        server.stdin.flush()
        ready, _, _ = select.select([server.stdout], [], [], PATIENCE)
        line = server.stdout.readline() if ready else ""
        if not line:
            server.kill()
            self._server = None
            return Done(args, server.wait() if ready else -1, "", "" if ready else "it hangs")
        told = json.loads(line)
        return Done(
            args,
            told["status"],
            told["out"],
            told["err"],
            told["seconds"],
            told["memory"],
            tuple(told["events"] or ()),
        )

    def close(self) -> None:
        """End the server."""
        if self._server:
            self._server.kill()
            self._server.wait()
            self._server = None

    def _start(self) -> "subprocess.Popen[str]":
        root = Path(__file__).parents[2]
        self.home.mkdir(parents=True, exist_ok=True)
        environment = {
            **{
                name: value for name, value in os.environ.items() if not name.startswith(("COLUMNS", "LINES"))
            },
            "PYTHONPATH": f"{root}:{root / 'tests'}:{self.home / 'plugins'}",
            "HOME": str(self.home),
            "TRCE_CACHE": str(self.home / "cache"),
            "HF_HOME": str(self.home / "hub"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "MPLCONFIGDIR": str(self.home / "matplotlib"),
            "PYTHONHASHSEED": "0",
        }
        if not (packages := self.home / "plugins").exists():
            plugins.write(packages, plugins.REDS)
        with contextlib.ExitStack() as stack:
            log = stack.enter_context((self.home / "server.log").open("ab"))
            self._server = subprocess.Popen(
                [sys.executable, "-m", "fuzz.server"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
                cwd=self.home,
            )
        return self._server
