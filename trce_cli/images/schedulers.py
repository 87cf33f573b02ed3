"""Schedulers by the names that users know, in any spelling."""

from collections.abc import Collection

from trce_cli.checkpoint.checkpoint import Checkpoint
from trce_cli.errors import BadInput

ALIASES = {
    "dpm": "dpmsolver++",
    "dpm++": "dpmsolver++",
    "dpm++-2m": "dpmsolver++",
    "dpmsolver": "dpmsolver++",
    "euler-ancestral": "euler-a",
    "plms": "pndm",
}


def scheduler_name(name: str, known: Collection[str]) -> str:
    """A scheduler's canonical name from any spelling; BadInput with all known names for another one."""
    key = name.strip().lower().replace("_", "-").replace(" ", "-")
    key = ALIASES.get(key, key)
    if key not in known:
        raise BadInput(f"There is no scheduler {name!r}.", f"Schedulers: {', '.join(known)}.")
    return key


def own_scheduler(checkpoint: Checkpoint) -> str:
    """The name of the scheduler that the checkpoint comes with; its class for one that has no other name."""
    entry = checkpoint.config["model_index"].get("scheduler")
    if not isinstance(entry, list) or not isinstance(entry[-1], str):
        raise BadInput(f"The model_index.json of {checkpoint.name} names no scheduler.")
    short = {class_name: name for name, class_name in checkpoint.family.schedulers.items()}
    return short.get(entry[-1], entry[-1])
