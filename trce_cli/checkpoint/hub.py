"""What hub ids, files in repositories, and the addresses of their pages lead to: files in the hub's cache."""

import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote, urlsplit

from trce_cli.errors import BadInput, first_line

NAME: Final = r"[\w.-]+"
_ID = re.compile(rf"{NAME}(/{NAME})?")
_FILE = re.compile(rf"({NAME}/{NAME})/(.+\.safetensors)")
_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
SHOWN: Final = 8  # files of a repository that an error names


@dataclass(frozen=True)
class Repository:
    """A repository by its id, the revision that its address names, and the file that is meant, if one is."""

    id: str
    revision: str | None = None
    file: str | None = None


def repository(name: str) -> Repository | None:
    """What a name that is no local path means on the hub; None where it means nothing there.

    owner/name; owner/name/folder/file.safetensors; or the address of either's page, in which a revision may
    stand. BadInput for an address of another site.
    """
    if "://" in name:
        return _of_address(name)
    if found := _FILE.fullmatch(name):
        return Repository(found[1], None, found[2])
    return Repository(name) if _ID.fullmatch(name) else None


def _of_address(address: str) -> Repository:
    parts = urlsplit(address)
    own = urlsplit(os.environ.get("HF_ENDPOINT", "")).netloc
    path = [unquote(part) for part in parts.path.split("/") if part]
    if parts.netloc not in (*_HOSTS, own) or parts.scheme not in ("http", "https"):
        raise BadInput(
            f"{address[:200]!r} is no page of the hub, and other addresses are not fetched.",
            "Download the file, and give its path.",
        )
    if len(path) == 2:
        return Repository("/".join(path))
    if len(path) >= 4 and path[2] in ("blob", "resolve", "tree"):
        file = "/".join(path[4:]) or None
        return Repository("/".join(path[:2]), path[3], file)
    raise BadInput(
        f"{address[:200]!r} is no page of a model or of a file of one.",
        "Give owner/name, owner/name/file.safetensors, or the address of such a page.",
    )


def fetched(
    name: str,
    asked: Repository,
    revision: str | None,
    variant: str | None,
    without: Collection[str] = frozenset(),
) -> Path:
    """The folder or file, fetched where it is not in the cache. BadInput where it cannot be had.

    without: patterns of files that are left where they are.
    """
    if asked.revision is not None and revision not in (None, asked.revision):
        raise BadInput(f"{name} names the revision {asked.revision}, and --revision is {revision}.")
    revision = revision or asked.revision
    if asked.file is not None:
        return _file(name, asked.id, asked.file, revision)
    weights = f"*/*.{variant}*.safetensors" if variant else "*/*.safetensors"
    ignored = [] if variant else ["*.fp16.*", "*.fp16-*", "*.bf16.*", "*.non_ema.*", "*.non_ema-*"]
    folder = _asked(
        name,
        "snapshot_download",
        asked.id,
        revision=revision,
        allow_patterns=["*.json", "*.txt", "*.jinja", "*.md", "LICENSE*", weights],
        ignore_patterns=[*ignored, *without],
    )
    if not (folder / "model_index.json").is_file() and (held := _held(asked.id, revision)):
        more = f" and {len(held) - SHOWN} more" if len(held) > SHOWN else ""
        raise BadInput(
            f"{asked.id} is no diffusers folder: it has no model_index.json. It holds "
            f"{', '.join(held[:SHOWN])}{more}.",
            f"Name the file that is meant, for example {asked.id}/{held[0]}.",
        )
    return folder


def _file(name: str, repository: str, file: str, revision: str | None) -> Path:
    if not file.endswith(".safetensors"):
        raise BadInput(
            f"{name} is no .safetensors file; loading a pickle can run code, so only these are read.",
            "Name the safetensors form of this checkpoint.",
        )
    return _asked(name, "hf_hub_download", repository, file, revision=revision)


def _asked(name: str, function: str, *args: Any, **options: Any) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(getattr(huggingface_hub, function)(*args, **options))
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        raise BadInput(
            f"{name} is no local path, and cannot be had from the hub: {first_line(error)}",
            "Check the name, the network, HF_TOKEN for gated repositories, and HF_HUB_OFFLINE.",
        ) from error


def _held(repository: str, revision: str | None) -> list[str]:
    """The safetensors files of a repository; none where it cannot be asked."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        siblings = HfApi().model_info(repository, revision=revision).siblings or []
    except (HfHubHTTPError, OSError, ValueError):
        return []
    return sorted(each.rfilename for each in siblings if each.rfilename.endswith(".safetensors"))


def commit(path: Path) -> str | None:
    """The commit of a folder or file in the hub's cache, which its snapshot is named by."""
    parts = path.parts
    if "snapshots" not in parts[:-1]:
        return None
    place = len(parts) - 1 - parts[::-1].index("snapshots")
    return parts[place + 1] if len(parts) > place + 1 else None
