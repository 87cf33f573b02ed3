"""What lies whole on disk, taken to a repository of the hub."""

import os
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from trce_cli.checkpoint.card import FOLDER
from trce_cli.checkpoint.measured import CARD, PICTURE
from trce_cli.errors import BadInput, TrceError, first_line
from trce_cli.system.foreign import read_text
from trce_cli.system.whole import whole

if TYPE_CHECKING:
    from trce_cli.checkpoint.checkpoint import Checkpoint

# What is handed out, by its ending: never pickles, code or whatever else lies in a folder.
ENDINGS: Final = (".safetensors", ".json", ".txt", ".md", ".jinja", ".model", ".png", ".csv", ".jsonl")
_OWN: Final = (".gitattributes",)  # what the hub itself puts into a new repository
_HINT: Final = "Log in with `hf auth login`, or set HF_TOKEN to a token that may write."


@dataclass(frozen=True)
class Target:
    """A repository that is written to. name: owner/name. public: for everybody to see."""

    name: str
    public: bool = False

    def check(self) -> None:
        """Raise BadInput, before any work, where nothing could be pushed.

        That is for the name, the token, the network and what is there: a repository that exists is refused,
        but for an empty one that is as public as is asked for.
        """
        from huggingface_hub import HfApi, get_token
        from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
        from huggingface_hub.utils import validate_repo_id

        try:
            validate_repo_id(self.name)
        except HFValidationError as error:
            raise self._wrong_name() from error
        if self.name.count("/") != 1:
            raise self._wrong_name()
        if not get_token():
            raise BadInput(f"Pushing to {self.name} needs a token of the hub, and there is none.", _HINT)
        try:
            account = HfApi().whoami()
        except Exception as error:
            raise self._failed("cannot be pushed to", error) from error
        token = account.get("auth", {}).get("accessToken", {}) if isinstance(account, Mapping) else {}
        if token.get("role") == "read":
            raise BadInput(
                f"The token of {account.get('name')} may only read, not push to {self.name}.", _HINT
            )
        try:
            there = HfApi().model_info(self.name)
        except RepositoryNotFoundError:
            return
        except Exception as error:
            raise self._failed("cannot be pushed to", error) from error
        held = [each.rfilename for each in there.siblings or [] if each.rfilename not in _OWN]
        if held:
            raise BadInput(
                f"The repository {self.name} exists already and holds {len(held)} files, such as {held[0]}.",
                "Choose another name; what others rely on is not replaced.",
            )
        if there.private is self.public:
            visible = (
                "private, and --public is given" if there.private else "public, and --public is not given"
            )
            hint = "Leave --public out." if self.public else "Give --public, or choose another name."
            raise BadInput(f"The repository {self.name} exists already and is {visible}.", hint)

    def push(self, files: Mapping[str, Path | bytes], message: str, beside: Path, bars: bool) -> str:
        """Make the repository and upload files, a name there -> a file or its content; returns its address.

        Large files go as the library sends them. TrceError where that fails: then what was to go lies, as
        links, in a folder beside the output `beside`, and the hint says how it is sent again. bars: whether
        the library may draw its own.
        """
        from huggingface_hub import HfApi
        from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

        (enable_progress_bars if bars else disable_progress_bars)()
        folder = beside.with_name(f".{beside.name}-to-hub")
        with whole(folder) as fresh:
            for name, content in files.items():
                place = fresh / name
                place.parent.mkdir(parents=True, exist_ok=True)
                if isinstance(content, bytes):
                    place.write_bytes(content)
                else:
                    place.symlink_to(content.resolve())
        visible = "--no-private" if self.public else "--private"
        line = f"hf upload {self.name} {shlex.quote(str(folder))} . {visible}"
        hint = f"What was written is whole and stays. To push it again: {line}"
        try:
            url = HfApi().create_repo(self.name, private=not self.public, exist_ok=True)
            HfApi().upload_folder(repo_id=self.name, folder_path=folder, commit_message=message)
        except KeyboardInterrupt:
            stopped = TrceError(f"Interrupted; {self.name} does not hold everything.", hint)
            stopped.exit_code = 130
            raise stopped from None
        except Exception as error:
            failed = self._failed("does not hold what was written", error)
            raise TrceError(failed.message, hint) from error
        shutil.rmtree(folder)
        return str(url)

    def _wrong_name(self) -> BadInput:
        return BadInput(
            f"{self.name[:200]!r} cannot name a repository of the hub.",
            "Give --push-to-hub owner/name: letters, digits, '-', '_' and '.', 96 at most.",
        )

    def _failed(self, what: str, error: Exception) -> BadInput:
        """What the hub or the network said, in one sentence."""
        status = getattr(getattr(error, "response", None), "status_code", None)
        if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
            reason, hint = "HF_HUB_OFFLINE is set", "Unset it to push."
        elif status == 401:
            reason, hint = "the hub does not accept the token", _HINT
        elif status == 403:
            reason, hint = "the token may not write there", _HINT
        elif status is not None:
            told = getattr(error, "server_message", None) or f"the hub answered with {status}"
            reason, hint = first_line(Exception(told))[:200].rstrip("."), "Try again later."
        else:
            reason = f"the hub cannot be reached ({first_line(error)[:120].rstrip('.')})"
            hint = "Check the network and HF_ENDPOINT, or leave --push-to-hub out."
        return BadInput(f"{self.name} {what}: {reason}.", hint)


def handed_out(folder: Path) -> dict[str, Path]:
    """The files of a folder that are pushed, by their names there."""
    found: dict[str, Path] = {}
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(each for each in folders if not each.startswith("."))
        for name in sorted(each for each in names if not each.startswith(".")):
            path = Path(place, name)
            if path.is_file() and (name.endswith(ENDINGS) or name.startswith(("LICENSE", "NOTICE"))):
                found[path.relative_to(folder).as_posix()] = path
    return found


def carded(checkpoint: "Checkpoint", place: str) -> dict[str, Path | bytes]:
    """What of a diffusers folder is pushed, a name there -> a file or its content: what belongs to the
    checkpoint, and its card, in which `place` is where it is loaded from.
    """
    known = {*checkpoint.files, PICTURE}
    files = {name: path for name, path in handed_out(checkpoint.path).items() if name in known}
    text = read_text(checkpoint.path / CARD).replace(FOLDER, place)
    return {**files, CARD: text.encode()}
