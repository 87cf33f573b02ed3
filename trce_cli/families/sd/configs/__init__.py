"""What a single file lacks: the configurations and tokenizers of the known families' published bases."""

import gzip
import json
import secrets
import shutil
from pathlib import Path

from trce_cli.system.cache import cache_folder


def folder(family_key: str) -> Path:
    """A diffusers folder without weights for the family, made in the user's cache where it is not there yet.

    It is what `from_single_file(config=...)` asks for. A damaged entry is replaced.
    """
    content = _content(family_key)
    target = cache_folder() / "configs" / family_key
    if not all(
        (target / name).is_file() and (target / name).read_bytes() == content[name] for name in content
    ):
        fresh = target.with_name(f"{family_key}-{secrets.token_hex(4)}")
        for name, data in content.items():
            (fresh / name).parent.mkdir(parents=True, exist_ok=True)
            (fresh / name).write_bytes(data)
        shutil.rmtree(target, ignore_errors=True)
        fresh.rename(target)
    return target


def _content(family_key: str) -> dict[str, bytes]:
    here = Path(__file__).parent
    tables = json.loads((here / f"{family_key}.json").read_text(encoding="utf-8"))
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
