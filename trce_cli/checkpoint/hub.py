"""What hub ids, files in repositories, and the addresses of their pages lead to: files in the hub's cache."""

import os
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any, Final
from urllib.parse import unquote, urlsplit

from trce_cli.checkpoint.checkpoint import PICKLE_SUFFIXES
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
    check: Callable[[Path], object] = lambda folder: None,
    without: Collection[str] = frozenset(),
) -> Path:
    """The folder or file, fetched where it is not in the cache. BadInput where it cannot be had.

    Of a folder its texts come first, and nothing else does where `check` raises BadInput for them or the list
    of its files says that it is no use. variant: of the weights; where a part has none, and without one, the
    plain ones are taken, else the only ones there are. without: patterns of files that are left where they
    are.
    """
    if asked.revision is not None and revision not in (None, asked.revision):
        raise BadInput(f"{name} names the revision {asked.revision}, and --revision is {revision}.")
    revision = revision or asked.revision
    if asked.file is not None:
        return _file(name, asked.id, asked.file, revision)
    held = _held(asked.id, revision)
    if held is None:  # no network: the cache has it, or says what is wrong
        return _asked(
            name,
            "snapshot_download",
            asked.id,
            revision=revision,
            allow_patterns=[*_TEXTS, "*/*.safetensors"],
            ignore_patterns=[*without],
        )
    _check_held(asked.id, held)
    folder = _asked(name, "snapshot_download", asked.id, revision=revision, allow_patterns=list(_TEXTS))
    check(folder)
    wanted = [
        file for file in _weights(asked.id, held, variant) if not any(fnmatch(file, each) for each in without)
    ]
    if wanted:
        _asked(name, "snapshot_download", asked.id, revision=revision, allow_patterns=wanted)
    return folder


_TEXTS: Final = ("*.json", "*.txt", "*.jinja", "*/spiece.model", "*.md", "LICENSE*")


def _check_held(repository: str, held: Sequence[str]) -> None:
    """Raise BadInput where these files of a repository are no diffusers folder with weights to read."""
    readable = [file for file in held if file.endswith(".safetensors")]
    pickles = [file for file in held if PurePosixPath(file).suffix in PICKLE_SUFFIXES]
    if not readable and pickles:
        raise _pickled(f"{repository} has its weights only as pickles", pickles)
    if "model_index.json" not in held:
        what = f"It holds {_some(readable)}." if readable else "It holds no weights."
        raise BadInput(
            f"{repository} is no diffusers folder: it has no model_index.json. {what}",
            f"Name the file that is meant, for example {repository}/{readable[0]}." if readable else None,
        )
    for part in _NEEDED:
        files = [file for file in pickles if file.startswith(f"{part}/")]
        if files and not any(file.startswith(f"{part}/") for file in readable):
            raise _pickled(f"{repository} has its {part} only as a pickle", files)


_NEEDED: Final = ("unet", "transformer", "text_encoder")  # parts that are read of every folder that has them


def _pickled(what: str, files: Sequence[str]) -> BadInput:
    return BadInput(
        f"{what} ({_some(files)}); loading one can run code, so only safetensors are read.",
        "Look for its safetensors form, often in another revision or repository.",
    )


def _some(files: Sequence[str]) -> str:
    more = f" and {len(files) - SHOWN} more" if len(files) > SHOWN else ""
    return f"{', '.join(files[:SHOWN])}{more}"


def _weights(repository: str, held: Sequence[str], variant: str | None) -> list[str]:
    """The files of weights to fetch, of each folder those of one variant."""
    folders: dict[str, dict[str, list[str]]] = {}
    for file in held:
        folder, _, name = file.rpartition("/")
        if folder and "/" not in folder and name.endswith(".safetensors"):
            label = re.sub(r"-\d{5}-of-\d{5}", "", name.removesuffix(".safetensors")).partition(".")[2]
            folders.setdefault(folder, {}).setdefault(label, []).append(file)
    labels = {label for found in folders.values() for label in found}
    if variant and variant not in labels:
        known = ", ".join(sorted(label or "plain" for label in labels))
        raise BadInput(
            f"{repository} has no weights of the variant {variant!r}.", f"Variants found: {known}."
        )
    wanted: list[str] = []
    for folder, found in folders.items():
        label = next((one for one in (variant, "") if one in found), next(iter(found)))
        if label and label != variant and len(found) > 1:
            raise BadInput(
                f"The {folder} of {repository} has only variants: {', '.join(sorted(found))}.",
                "Name one with --variant.",
            )
        wanted += found[label]
    return wanted


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
        why = first_line(error).removeprefix("Got: ")
        raise BadInput(
            f"{name} is no local path, and cannot be had from the hub: {why}",
            "Check the name, the network, HF_TOKEN for gated repositories, and HF_HUB_OFFLINE.",
        ) from error


def _held(repository: str, revision: str | None) -> list[str] | None:
    """The files of a repository; None where it cannot be asked."""
    from huggingface_hub import HfApi

    try:
        siblings = HfApi().model_info(repository, revision=revision).siblings or []
    except Exception:  # of its HTTP client as well, which is another from release to release
        return None
    return sorted(each.rfilename for each in siblings)


def commit(path: Path) -> str | None:
    """The commit of a folder or file in the hub's cache, which its snapshot is named by."""
    parts = path.parts
    if "snapshots" not in parts[:-1]:
        return None
    place = len(parts) - 1 - parts[::-1].index("snapshots")
    return parts[place + 1] if len(parts) > place + 1 else None
