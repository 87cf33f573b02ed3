"""The files of a tokenizer, checked before a library reads them, and before anything of them is hashed."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from trce_cli.errors import BadInput
from trce_cli.system.foreign import SMALL, check_small, read_json
from trce_cli.system.paths import inside

MAX_FILE: Final = 64 << 20  # bytes of one of them
_CONFIG: Final = "tokenizer_config.json"
_SPECIAL: Final = "special_tokens_map.json"
_WHOLE: Final = "tokenizer.json"
# What a vocabulary may lie in: without one the libraries make a tokenizer that knows no word.
_VOCABULARIES: Final = ((_WHOLE,), ("vocab.json", "merges.txt"), ("spiece.model",))
AGAIN: Final = "Fetch the checkpoint's whole tokenizer again."
_ARGUMENTS: Final = {  # of the tokenizers' classes, which take them from the configuration all the same
    "gguf_file", "tokenizer_object", "tokenizer_padding", "tokenizer_truncation",
    "_json_padding", "_json_truncation",
}  # fmt: skip
_OF_TOKEN: Final = {"content", "single_word", "lstrip", "rstrip", "normalized", "special", "id", "__type"}


def check_files(folder: Path) -> None:
    """Of a tokenizer's folder, in that of a checkpoint: raise BadInput where it is not there or has no
    vocabulary, and for a file that a library would wait for, that has no end, or that it would print as is.
    """
    if not folder.is_dir():
        raise BadInput(f"There is no tokenizer in {folder}.", AGAIN)
    for path in sorted(folder.iterdir()):
        if not path.name.startswith(".") and not path.is_dir():
            check_small(inside(folder.parent, f"{folder.name}/{path.name}"), MAX_FILE)
    if not any(all((folder / name).is_file() for name in names) for names in _VOCABULARIES):
        listed = ", ".join(" with ".join(names) for names in _VOCABULARIES)
        raise BadInput(f"{folder} holds no tokenizer, which lies in one of: {listed}.", AGAIN)
    told = {name: _read(folder / name) for name in (_SPECIAL, _CONFIG) if (folder / name).is_file()}
    config = told.get(_CONFIG, {})
    for key in _ARGUMENTS & config.keys():
        raise BadInput(f"{folder / _CONFIG} has {key}, which is no part of a configuration.")
    # What stands in this one counts only where the configuration is silent: it may be large.
    if "added_tokens_decoder" not in config and (folder / _WHOLE).is_file():
        whole = _read(folder / _WHOLE, MAX_FILE)
        told[_WHOLE] = {"added_tokens": whole.get("added_tokens")}
    for name, one in told.items():
        for token in _tokens(one, name == _SPECIAL):
            for key in token.keys() - _OF_TOKEN:
                raise BadInput(f"{folder / name} has a special token with the unknown key {key[:40]!r}.")
    if _WHOLE in told and (not isinstance(whole.get("model"), dict) or told[_WHOLE]["added_tokens"] is None):
        raise BadInput(f"{folder / _WHOLE} is no tokenizer: it has no model and added_tokens.", AGAIN)


def _read(path: Path, size: int = SMALL) -> dict[str, Any]:
    try:
        return read_json(path, size)
    except BadInput as error:
        raise BadInput(error.message, error.hint or AGAIN) from None


def _tokens(told: Any, are_inside: bool = False) -> Iterator[dict[str, Any]]:
    """What the library makes special tokens of. It prints keys of theirs that it does not know, as they are.

    are_inside: whether the dictionaries in `told`, which is one or a list, are tokens.
    """
    for key, value in told.items() if isinstance(told, dict) else enumerate(told):
        plural = str(key).endswith("_tokens")
        if isinstance(value, dict):
            if (are_inside and not plural) or "__type" in value or str(key).endswith("_token"):
                yield value
            yield from _tokens(value, key == "added_tokens_decoder")
        elif isinstance(value, list):
            yield from _tokens(value, plural)
