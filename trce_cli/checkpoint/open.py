"""Checkpoints by the names that users give them: a path, a hub id, or `emoji`."""

import re
from collections.abc import Collection
from pathlib import Path

from trce_cli.checkpoint.checkpoint import PICKLE_SUFFIXES, WEIGHT_SUFFIXES, Checkpoint
from trce_cli.checkpoint.checks import UNPACKED
from trce_cli.checkpoint.folder import open_folder
from trce_cli.checkpoint.single_file import open_single_file
from trce_cli.errors import BadInput, first_line
from trce_cli.families.registry import FAMILIES
from trce_cli.prompts.home import EMBEDDED
from trce_cli.system.paths import expanded

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def open_checkpoint(
    name: str, revision: str | None = None, variant: str | None = None, config: str | Path | None = None
) -> Checkpoint:
    """Open `emoji`, a diffusers folder, a single `.safetensors` file or a hub id, and check it.

    `revision` and `variant` (for example `fp16`) choose among what a hub repository or a folder holds.
    `config` is a diffusers folder, or the hub id of one, with the configurations and tokenizers for a single
    file that is built differently from its family's published base; weights in it are looked at for parts
    that the file does not hold. Raises `BadInput` in one sentence for everything that is wrong with it; no
    weight is read.
    """
    embedded = {home.name: home.folder for home in EMBEDDED}
    path = embedded.get(name) or _resolve(name, revision, variant)
    if path.is_dir():
        if path.parent.name == "snapshots":  # of the hub's cache: its name is the commit
            revision = path.name
        return open_folder(name, path, variant, revision)
    if path.suffix == ".safetensors":
        return open_single_file(name, path, _config(config) if config else None)
    if path.suffix in PICKLE_SUFFIXES:
        raise BadInput(
            f"{path} is a PyTorch pickle; loading one can run code, so only safetensors are read.",
            "Get the safetensors form of this checkpoint.",
        )
    if path.suffix in (".gguf", ".ggml"):
        raise BadInput(
            f"{path} is quantized ({path.suffix}), and weights in this form are not edited.",
            UNPACKED,
        )
    raise BadInput(f"{path} is neither a diffusers folder nor a .safetensors file.")


def _config(name: str | Path) -> Path:
    """The folder of configurations; of a hub id all but the denoiser, which a single file holds itself."""
    return _resolve(str(name), None, None, {f"{family.denoiser}/*.safetensors" for family in FAMILIES})


def _resolve(
    name: str, revision: str | None, variant: str | None, without: Collection[str] = frozenset()
) -> Path:
    """An existing path is a path; what looks like one but is missing is an error; all else is a hub id."""
    path = expanded(name)
    try:
        if path.exists():
            return path
    except OSError as error:  # longer than a name may be, or in a folder that may not be looked into
        raise BadInput(f"{name[:100]!r} cannot be opened: {error.strerror}.") from error
    looks_like_path = name.startswith(("/", ".", "~")) or name.count("/") > 1 or "\\" in name
    if looks_like_path or path.suffix in WEIGHT_SUFFIXES:
        raise BadInput(
            f"There is no file or folder {name}.", "Check the path; a hub id has the form owner/name."
        )
    if not _HUB_ID.fullmatch(name):
        raise BadInput(
            f"{name!r} is neither an existing path nor a hub id.", "A hub id has the form owner/name."
        )
    return _from_hub(name, revision, variant, without)


def _from_hub(name: str, revision: str | None, variant: str | None, without: Collection[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    weights = f"*/*.{variant}*.safetensors" if variant else "*/*.safetensors"
    ignored = [] if variant else ["*.fp16.*", "*.fp16-*", "*.bf16.*", "*.non_ema.*", "*.non_ema-*"]
    try:
        folder = snapshot_download(
            name,
            revision=revision,
            allow_patterns=["*.json", "*.txt", "*.jinja", "*.md", "LICENSE*", weights],
            ignore_patterns=[*ignored, *without],
        )
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        raise BadInput(
            f"{name} is no local path, and cannot be had from the hub: {first_line(error)}",
            "Check the name, the network, HF_TOKEN for gated repositories, and HF_HUB_OFFLINE.",
        ) from error
    return Path(folder)
