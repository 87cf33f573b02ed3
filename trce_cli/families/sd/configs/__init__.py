"""What a single file lacks: the configurations and tokenizers of the known families' published bases."""

import gzip
import json
from functools import cache
from pathlib import Path
from typing import Any

from trce_cli.system.cache import cached_folder


def folder(family_key: str) -> Path:
    """A diffusers folder without weights for the family: what `from_single_file(config=...)` asks for."""
    return cached_folder(f"configs/{family_key}", _content(family_key))


def tables(family_key: str) -> dict[str, dict[str, Any]]:
    """The configurations by part, and `model_index`, as they are shipped."""
    parts = {"unet": "denoiser", "model_index.json": "model_index"}
    found = _tables(family_key)
    return {parts.get(part := name.partition("/")[0], part): table for name, table in found.items()}


def _tables(family_key: str) -> dict[str, dict[str, Any]]:
    path = Path(__file__).parent / f"{family_key}.json"
    found: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return found


@cache
def _content(family_key: str) -> dict[str, bytes]:
    here = Path(__file__).parent
    tables = _tables(family_key)
    files = {name: json.dumps(table, indent=2).encode() for name, table in tables.items()}
    merges = gzip.decompress((here / "clip_merges.txt.gz").read_bytes())
    vocab = json.dumps(clip_vocabulary(merges.decode().splitlines()[1:]), ensure_ascii=False).encode()
    for name in tables:
        if name.endswith("/tokenizer_config.json"):
            part = name.partition("/")[0]
            files |= {f"{part}/vocab.json": vocab, f"{part}/merges.txt": merges}
    return files


def clip_vocabulary(merges: list[str]) -> dict[str, int]:
    """Token -> id of CLIP's vocabulary, which follows from its merges."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that stand for themselves
    others = [byte for byte in range(256) if byte not in printable]
    letters = [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(others))]
    tokens = letters + [letter + "</w>" for letter in letters] + ["".join(pair.split(" ")) for pair in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {token: index for index, token in enumerate(tokens)}
