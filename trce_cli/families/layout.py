"""A transformer's weights by their names in diffusers and in an original single file, by tables (pure)."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from trce_cli.families.base import Stored

PREFIX: Final = "model.diffusion_model."  # what some tools put before the names in a single file


@dataclass(frozen=True)
class Blocks:
    """A list of blocks that are alike.

    name: of the list in the file. plain: its modules by diffusers' names and the file's. stacked: by
    diffusers' names the module of the file in which several are stacked, which of its equal pieces from the
    first on it is, and how many.
    """

    name: str
    plain: Mapping[str, str]
    stacked: Mapping[str, tuple[str, tuple[int, int], int]]


@dataclass(frozen=True)
class Layout:
    """All weights; what no table names has the same name in both.

    outer: modules outside of blocks by diffusers' names and the file's. blocks: by diffusers' name of the
    list. norm_leaf: what the file calls the weight of a norm of queries or keys.
    """

    outer: Mapping[str, str]
    blocks: Mapping[str, Blocks]
    norm_leaf: str = "weight"

    def stored(self, key: str, swapped: bool = False) -> Stored:
        """Where the file keeps a weight; swapped: whether the halves of its rows are in the other order."""
        kind, number, rest = (*key.split(".", 2), "", "")[:3]
        module, _, leaf = key.rpartition(".")
        if kind not in self.blocks:
            return Stored(f"{self.outer.get(module, module)}.{leaf}", swapped=swapped)
        blocks, module = self.blocks[kind], rest.rpartition(".")[0]
        if module in blocks.stacked:
            theirs, piece, span = blocks.stacked[module]
            return Stored(f"{blocks.name}.{number}.{theirs}.{leaf}", piece, span)
        leaf = self.norm_leaf if ".norm_" in module else leaf
        return Stored(f"{blocks.name}.{number}.{blocks.plain.get(module, module)}.{leaf}", swapped=swapped)

    def keys_in(self, name: str) -> list[str]:
        """The weights, by diffusers' names, in a tensor of the file; the inverse of `stored`."""
        outer, number, rest = (*name.split(".", 2), "", "")[:3]
        kind = next((ours for ours, blocks in self.blocks.items() if blocks.name == outer), None)
        module, _, leaf = name.rpartition(".")
        if kind is None:
            return [f"{_inverse(self.outer, module)}.{leaf}"]
        blocks, module = self.blocks[kind], rest.rpartition(".")[0]
        stacked = [ours for ours, (theirs, _, _) in blocks.stacked.items() if theirs == module]
        leaf = "weight" if leaf == self.norm_leaf else leaf
        return [f"{kind}.{number}.{ours}.{leaf}" for ours in stacked or [_inverse(blocks.plain, module)]]


def _inverse(table: Mapping[str, str], name: str) -> str:
    return next((ours for ours, theirs in table.items() if theirs == name), name)


def lora_name(key: str) -> str | None:
    """The name of a linear layer in a LoRA: diffusers' path, which its loader and ComfyUI take; None of norms
    and of what is no weight.
    """
    module, _, leaf = key.rpartition(".")
    if leaf != "weight" or re.search(r"\.norm_(added_)?[qk]$", module):
        return None
    return f"transformer.{module}"
