"""What an evaluation measured, in a model card that its owner may have edited: all else in it stays."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from pydantic import BaseModel, ConfigDict

from trce_cli.errors import BadInput
from trce_cli.system.foreign import parse_yaml, validated

CARD: Final = "README.md"
PICTURE: Final = "trce-before-after.png"  # beside the card
UNMEASURED: Final = "How often was not measured when this card was written."
DATASET: Final = "trce-evaluate-"  # how the datasets of our results begin; a suite's name follows

MAX_FRONT_MATTER: Final = 1 << 16  # characters without its model-index; reading YAML is slow
MAX_INDEX: Final = 1 << 18  # characters of a model-index

_START: Final = "<!-- `trce evaluate --card` writes from here anew ... -->"
_END: Final = "<!-- ... to here -->"
_BLOCK: Final = re.compile(f"{re.escape(_START)}.*{re.escape(_END)}", re.DOTALL)
_FRONT: Final = re.compile(r"\A\s*---[ \t]*\n(.*?)^---[ \t]*(?:\n|\Z)", re.DOTALL | re.MULTILINE)
# The key with the lines below it that are indented, items of its list, or empty.
_INDEX: Final = re.compile(r"""^["']?model-index["']?[ \t]*:.*\n(?:(?:[ \t-].*)?\n)*""", re.MULTILINE)


class _Model(BaseModel):
    """A model of a `model-index`; further keys are kept."""

    model_config = ConfigDict(strict=True, extra="allow")

    name: str
    results: list[dict[str, Any]]


def parts_of(card: str) -> tuple[str, str, str]:
    """A card's front matter without its `model-index`, that, and the text below; each may be empty."""
    card = card.removeprefix("\ufeff").replace("\r\n", "\n")
    found = _FRONT.match(card)
    if found is None:
        return "", "", card
    index = _INDEX.search(found[1])
    return _INDEX.sub("", found[1]), index[0] if index else "", card[found.end() :]


def with_figures(card: str, where: str, name: str, results: Sequence[Mapping[str, Any]], told: str) -> str:
    """The card with these results in its `model-index`, and this text where it tells of figures.

    name: of the model, where the card has no `model-index` yet. results: as huggingface_hub has them, of
    datasets that begin with `DATASET`. Those of an earlier evaluation go; results of others, further keys and
    whatever else stands in the text stay. where: what the card is called in errors; BadInput where it cannot
    be read.
    """
    import yaml  # type: ignore[import-untyped]

    front, index, body = parts_of(card)
    hint = "Mend it, or take it away: then a new one is written."
    if len(front) > MAX_FRONT_MATTER or len(index) > MAX_INDEX:
        raise BadInput(f"The front matter of {where} is too long to be read.", hint)
    try:
        models = _models(index, where)
        models = models or [{"name": name, "results": []}]
        models[0]["results"] += results
        front += yaml.safe_dump({"model-index": models}, sort_keys=False, allow_unicode=True)
        whole = parse_yaml(front, f"The front matter of {where}")
    except BadInput as error:
        raise BadInput(error.message, hint) from None
    if not isinstance(whole, dict):
        raise BadInput(f"The front matter of {where} is no table of keys.", hint)
    marks = [body.count(mark) for mark in (_START, _END)]
    block = f"{_START}\n{told}\n{_END}"
    if marks == [1, 1] and _BLOCK.search(body):
        body = _BLOCK.sub(lambda _: block, body)
    elif marks != [0, 0]:
        raise BadInput(f"{where} has only one of the marks around its figures, or several.", hint)
    elif UNMEASURED in body:
        body = body.replace(UNMEASURED, block, 1)
    else:
        body = f"{body.rstrip()}\n\n## Measured\n\n{block}\n"
    return f"---\n{front}---\n{body}"


def _models(index: str, where: str) -> list[dict[str, Any]]:
    """The models of a `model-index`, without results of ours."""
    if not index:
        return []
    table = parse_yaml(index, f"The model-index of {where}")
    models = validated(list[_Model], table["model-index"] or [], f"The model-index of {where}")
    told = [model.model_dump() for model in models]
    for model in told:
        model["results"] = [each for each in model["results"] if not _is_ours(each)]
    return told


def _is_ours(result: Mapping[str, Any]) -> bool:
    dataset = result.get("dataset")
    return isinstance(dataset, Mapping) and str(dataset.get("type")).startswith(DATASET)
