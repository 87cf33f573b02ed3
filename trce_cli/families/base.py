"""The contract of a model family: what every family answers, and what it may ask of a checkpoint.

A prompt enters a denoiser in streams of embeddings, such as the `context` of the cross-attention. Each stream
enters through doors, the weights that an edit of text embeddings changes. A slot is a place in a prompt, such
as its end, whose embedding a pair of prompts maps.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Wanted = Mapping[str, Mapping[str, Sequence[int]]]  # stream -> prompt -> positions of its embeddings


@dataclass(frozen=True)
class Door:
    """Where a prompt enters the denoiser: weights that meet the embeddings of one stream.

    name: what figures call it, such as `keys`. weights: diffusers names of the matrices W (out, columns) that
    become W M. width: of the embeddings, which meet the first columns; further ones see something else.
    """

    name: str
    stream: str
    weights: tuple[str, ...]
    width: int


@dataclass(frozen=True)
class Defaults:
    """What a family is used with unless the user says otherwise.

    slots: the slots that are mapped, with their weights; guards measure at these. kohya: the base model as a
    LoRA's metadata names it, `ss_base_model_version`. tags: of model cards.
    """

    guidance: float
    slots: Mapping[str, float]
    kohya: str
    tags: tuple[str, ...]


class Slot(NamedTuple):
    """A slot of a prompt pair: its kind, the position in the unsafe prompt and the matching one in the safe
    one, and how much it counts.
    """

    kind: str
    unsafe: int
    safe: int
    weight: float


class States(NamedTuple):
    """Embeddings of one stream, float32 on the CPU, (rows, width), each distinct one once.

    rows: prompt -> the rows of its wanted positions, in their order.
    """

    embeddings: "Tensor"
    rows: Mapping[str, Sequence[int]]


Batch = Mapping[str, States]  # by stream


class Weights(Protocol):
    """What a family may ask of an opened checkpoint, whatever its layout: names are diffusers' and
    transformers'.

    Parts are those of the diffusers folder: `text_encoder`, `vae`, and the denoiser's own name.
    """

    @property
    def name(self) -> str:
        """The checkpoint as the user gave it."""
        ...

    @property
    def config(self) -> Mapping[str, Mapping[str, Any]]:
        """The configuration of each part, and `model_index` and `scheduler`."""
        ...

    def where(self, part: str) -> Path:
        """The folder or file that errors name."""
        ...

    def folder(self, part: str) -> Path:
        """A folder with a part's files that are no weights, such as a tokenizer's."""
        ...

    def keys(self, part: str) -> Collection[str]:
        """The names of a part's weights, in the order of its file."""
        ...

    def shape(self, part: str, key: str) -> tuple[int, ...]:
        """A weight's shape; nothing is read."""
        ...

    def read(self, part: str, key: str) -> "Tensor":
        """A weight in the file's dtype. BadInput where it is missing."""
        ...

    def map(self, part: str, key: str) -> "Tensor":
        """A weight as pages of its file, to look at and not to change. BadInput where it is missing."""
        ...

    def release(self, part: str) -> None:
        """Give back the memory of all pages of a part that were looked at so far."""
        ...


class Text(Protocol):
    """A family's text encoders: prompts -> the embeddings that enter the denoiser by each stream.

    Nothing is read before it is needed. Every method raises BadInput for damaged encoders or tokenizers.
    """

    @property
    def streams(self) -> Mapping[str, int]:
        """The width of each stream, the family's main one first."""
        ...

    def fingerprint(self, prompts: Collection[str]) -> str:
        """SHA-256 in hex of all that the prompts' embeddings depend on, rounding aside."""
        ...

    def content(self, prompts: Collection[str]) -> Wanted:
        """The positions at which the prompts say something: all but padding and what every prompt has."""
        ...

    def slots(
        self, unsafe: str, safe: str, keyword: str, weights: Mapping[str, float]
    ) -> Mapping[str, list[Slot]]:
        """The slots of a prompt pair by stream; in the main stream those whose kind has a weight above 0.

        keyword: what the unsafe prompt is about.
        """
        ...

    def states(self, wanted: Wanted, report: Callable[[int], None] = ...) -> Iterator[Batch]:
        """The embeddings at the wanted positions, a batch at a time, in an order of its own.

        `report` gets the number of prompts of each batch. TrceError for an embedding that is not finite.
        """
        ...


class Words(Protocol):
    """A pipeline's text encoders as an attack sees them, differentiable in a prompt's first words.

    words: the tokens that are whole words; elsewhere a word is its place in this list. table: their
    embeddings, float32 (words, dim).
    """

    @property
    def words(self) -> Sequence[str]: ...

    @property
    def table(self) -> "Tensor": ...

    def text(self, words: "Tensor") -> str:
        """The words, (length,), as a text that the tokenizer reads as these words."""
        ...

    def ids(self, prompts: Sequence[str]) -> Sequence["Tensor"]:
        """Token ids for each encoder, (prompts, tokens), padded and cut as the pipeline does."""
        ...

    def word_ids(self, words: "Tensor") -> Sequence["Tensor"]:
        """Token ids for each encoder of texts of words, (texts, length), that fit into a prompt."""
        ...

    def __call__(self, ids: Sequence["Tensor"], prefix: "Tensor | None" = None) -> Mapping[str, "Tensor"]:
        """What enters by each stream, in the encoders' dtype.

        prefix: embeddings in place of those of the first words, (prompts, words, dim of `table`).
        """
        ...


class Names(Protocol):
    """The names of the denoiser's weights in the layouts other than diffusers' (pure)."""

    def single_file(self, key: str) -> str:
        """The name in a single file."""
        ...

    def kohya(self, key: str) -> Sequence[str]:
        """The names of a layer of a LoRA, the one that we write first; none for what has no place in one."""
        ...


class Denoiser(Protocol):
    """A denoiser that is loaded, and how it is called and sampled."""

    @property
    def module(self) -> "nn.Module": ...

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(channels, height, width) of a latent image of the size that the denoiser was trained with."""
        ...

    def predict(self, latents: "Tensor", timesteps: "Tensor", told: Mapping[str, "Tensor"]) -> "Tensor":
        """The denoiser's output, float32; told: what enters by each stream, (batch, ...)."""
        ...

    def schedule(self, steps: int) -> Any:
        """The scheduler, set to so many steps."""
        ...


class Family(Protocol):
    """A model family; `families/registry.py` lists them.

    key: as files name it. name: as people do. pipeline: the class of diffusers that draws. denoiser: the part
    that is edited, `unet` or `transformer`. streams: by which prompts enter, the main one first: its figures
    and tensors have plain names. slots: of a prompt, in the order of lists of weights.
    """

    @property
    def key(self) -> str: ...

    @property
    def name(self) -> str: ...

    @property
    def pipeline(self) -> str: ...

    @property
    def denoiser(self) -> str: ...

    @property
    def streams(self) -> tuple[str, ...]: ...

    @property
    def slots(self) -> tuple[str, ...]: ...

    @property
    def defaults(self) -> Defaults: ...

    def claims(self, index: Mapping[str, Any], config: Mapping[str, Any]) -> str | None:
        """Why a diffusers folder with this `model_index.json` and denoiser's configuration is none of the
        family's; None where it is one.
        """
        ...

    def claims_file(self, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
        """The same of a single file with tensors of these shapes."""
        ...

    def doors(self, config: Mapping[str, Any]) -> tuple[Door, ...]:
        """Where prompts enter a denoiser of this configuration: every way there is."""
        ...

    def names(self, config: Mapping[str, Any]) -> Names:
        """The names of a denoiser of this configuration."""
        ...

    def tuned(self, key: str) -> bool:
        """Whether stage 2 tunes this weight of the denoiser; never one of a door."""
        ...

    def text(self, weights: Weights, device: "torch.device | str", dtype: "torch.dtype") -> Text:
        """The text encoders, to be computed with on `device` in `dtype`."""
        ...

    def denoise(self, weights: Weights, device: "torch.device", dtype: "torch.dtype") -> Denoiser:
        """The denoiser on `device` in `dtype`."""
        ...

    def words(self, pipeline: Any) -> Words | None:
        """The text encoders of a pipeline for attacks; None where attacks cannot search in them."""
        ...

    def mapped(
        self,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        change: Callable[[str, "Tensor"], "Tensor"],
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call of the denoiser, as the pipeline calls it, with every stream changed."""
        ...
