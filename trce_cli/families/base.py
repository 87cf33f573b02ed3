"""The contract of a model family: what every family answers, and what it may ask of a checkpoint.

A prompt enters a denoiser in streams of embeddings, such as the `context` of the cross-attention. Each stream
enters through doors, the weights that an edit of text embeddings changes. A slot is a place in a prompt, such
as its end, whose embedding a pair of prompts maps.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

from trce_cli.errors import BadInput
from trce_cli.maths.verdict import Limits

if TYPE_CHECKING:
    import numpy as np
    import torch
    from PIL import Image
    from torch import Tensor, nn

EMPTY: Final = ""  # the prompt of unconditional predictions


def with_empty(prompts: Sequence[str]) -> tuple[str, ...]:
    """Each of the prompts once, the empty one, which predictions are guided away from, before them."""
    return tuple(dict.fromkeys((EMPTY, *prompts)))


Shape = tuple[int, ...]
Wanted = Mapping[str, Mapping[str, Sequence[int]]]  # stream -> prompt -> positions of its embeddings


@dataclass(frozen=True)
class Door:
    """Where a prompt enters the denoiser: weights that meet the embeddings of one stream.

    name: what figures call it, such as `keys`. weights: diffusers names of the matrices W (out, columns) that
    become W M. width: of the embeddings, which meet the first columns; with `wider` further columns see
    something else.
    """

    name: str
    stream: str
    weights: tuple[str, ...]
    width: int
    wider: bool = False


@dataclass(frozen=True)
class Stored:
    """How a file of another layout keeps a weight: in the tensor of this name, by these steps (pure).

    piece: which of so many equal pieces that are stacked along the first axis, and with `span` how many from
    there on. transposed: (in, out) in place of (out, in). convolution: a linear layer's (out, in) as a
    convolution's (out, in, 1, 1). swapped: the two halves of its rows in the other order.
    """

    name: str
    piece: tuple[int, int] = (0, 1)
    span: int = 1
    transposed: bool = False
    convolution: bool = False
    swapped: bool = False

    @property
    def plain(self) -> bool:
        """Whether the tensor is the weight as it is."""
        return self == Stored(self.name)

    def shape(self, stored: Shape) -> Shape:
        """The weight's shape from that of the tensor."""
        if self.piece[1] > 1:
            stored = (stored[0] // self.piece[1] * self.span, *stored[1:])
        if self.convolution:
            stored = stored[:2]
        return stored[::-1] if self.transposed else stored

    def packed_shape(self, shape: Shape) -> Shape:
        """The tensor's shape from that of the weight."""
        stored = shape[::-1] if self.transposed else shape
        if self.convolution:
            stored = (*stored, 1, 1)
        return (stored[0] // self.span * self.piece[1], *stored[1:])

    def view(self, stored: "Tensor") -> "Tensor":
        """The weight in the tensor."""
        at, count = self.piece
        if count > 1:
            size = len(stored) // count
            stored = stored[at * size : (at + self.span) * size]
        if self.convolution:
            stored = stored.flatten(1)
        return _halves_swapped(stored) if self.swapped else stored.mT if self.transposed else stored

    def packed(self, weights: Sequence["Tensor"]) -> "Tensor":
        """The tensor of all weights that are stacked in it, in the order of their pieces."""
        import torch

        stored = torch.cat(list(weights)) if len(weights) > 1 else weights[0]
        stored = _halves_swapped(stored) if self.swapped else stored.mT if self.transposed else stored
        return stored[..., None, None] if self.convolution else stored

    def replaced(self, stored: "Tensor", weight: "Tensor") -> "Tensor":
        """The tensor with this weight in place of the one in it, in the wider dtype of the two."""
        import torch

        at, count = self.piece
        stored = stored.to(torch.promote_types(stored.dtype, weight.dtype), copy=True)
        size = len(stored) // count
        stored[at * size : (at + self.span) * size] = self.packed([weight])
        return stored


def _halves_swapped(weight: "Tensor") -> "Tensor":
    return weight.roll(len(weight) // 2, 0)


@dataclass(frozen=True)
class Told:
    """What a single file itself says of its configurations.

    config: by part (and `model_index`) the whole configuration that stands in place of the folder's. notes:
    sentences on what was assumed, and how to choose otherwise.
    """

    config: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def taken_from_weights(what: str, said: Mapping[str, Any]) -> str:
    """A note on what a single file's weights say where the configuration says otherwise."""
    listed = ", ".join(f"{key} = {value}" for key, value in said.items())
    return f"{what} are taken from the weights, which the configuration says otherwise: {listed}."


@dataclass(frozen=True)
class Canvas:
    """What pictures a checkpoint draws: the size that it was trained for in pixels, of what the sides must be
    multiples, in how many steps at most, and up to which `clip_skip`.
    """

    width: int
    height: int
    multiple: int
    max_steps: int
    max_clip_skip: int = 1


def check_vae(weights: "Weights") -> None:
    """Raise BadInput where there is no autoencoder to draw with."""
    if not weights.keys("vae"):
        raise BadInput(
            f"{weights.path} holds no VAE, which drawing needs.",
            "Get the form of this checkpoint that has its VAE, or name the whole folder with --config.",
        )


@dataclass(frozen=True)
class Conditioning:
    """What enters the denoiser of each prompt by each stream, (prompts, ...) float32 on the run's device.

    lengths: of streams of tokens of which prompts have not all as many, how many each has, (prompts,) int64
    on the CPU; what is behind them is padding.
    """

    prompts: tuple[str, ...]
    streams: Mapping[str, "Tensor"]
    lengths: Mapping[str, "Tensor"] = field(default_factory=dict)

    @property
    def device(self) -> "torch.device":
        """Where it lies."""
        return next(iter(self.streams.values())).device

    def rows(self, prompts: Sequence[str]) -> "Tensor":
        """The rows of these prompts, int64."""
        import torch

        return torch.tensor([self.prompts.index(prompt) for prompt in prompts])

    @classmethod
    def outlined(
        cls,
        prompts: tuple[str, ...],
        shapes: Mapping[str, Shape],
        lengths: Mapping[str, Sequence[int]],
    ) -> "Conditioning":
        """One without values, on the meta device. shapes: of one prompt's embeddings in each stream."""
        import torch

        streams = {name: torch.empty(len(prompts), *of, device="meta") for name, of in shapes.items()}
        return cls(prompts, streams, {name: torch.tensor(each) for name, each in lengths.items()})

    def told(self, rows: "Tensor") -> dict[str, "Tensor"]:
        """What enters for a batch of these rows, and `STREAM.length` where prompts differ in it.

        BadInput for a row that there is not: rows of stored states come from a file.
        """
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < len(self.prompts):
            raise BadInput(
                "Stored states name a prompt that there is not.", "Remove them to make them again."
            )
        every = {**self.streams, **{f"{stream}.length": each for stream, each in self.lengths.items()}}
        return {name: each[rows.to(each.device)] for name, each in every.items()}


@dataclass(frozen=True)
class Defaults:
    """What a family is used with unless the user says otherwise.

    slots: the slots that are mapped, with their weights; guards measure at these. kohya: the base model as a
    LoRA's metadata names it, `ss_base_model_version`. tags, doors: what model cards are tagged with, and
    call the doors. whole_file: the class of diffusers that loads a single file with all parts, if any.
    moved: limits of how far these slots have to be moved; None: those of CLIP. preserve: lambda; None: the
    default of presets' `[map]`.
    """

    guidance: float
    slots: Mapping[str, float]
    kohya: str
    tags: tuple[str, ...]
    doors: str
    whole_file: str | None = None
    moved: Limits | None = None
    preserve: float | None = None

    @property
    def meaning(self) -> dict[str, float]:
        """The slots at which a prompt's meaning is read: those that see all of it, so not its keyword."""
        return {kind: weight for kind, weight in self.slots.items() if kind != "KEYWORD"}


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

    A part is `denoiser`, or goes by its folder's name: `text_encoder`, `vae`.
    """

    @property
    def name(self) -> str:
        """The checkpoint as the user gave it."""
        ...

    @property
    def config(self) -> Mapping[str, Mapping[str, Any]]:
        """The configuration of each part, and `model_index` and `scheduler`."""
        ...

    @property
    def path(self) -> Path:
        """The folder or file that errors name."""
        ...

    def folder(self, part: str = "") -> Path:
        """A folder with a part's files that are no weights, such as a tokenizer's; without a part that of the
        whole diffusers folder, `model_index.json` in it.
        """
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

    def rows(self, part: str, key: str, numbers: "Tensor") -> "Tensor":
        """Some rows of a weight of two dimensions, (numbers, columns), as of a token embedding."""
        ...


class Configs(Protocol):
    """The configurations of a diffusers folder by part, `model_index` and `scheduler` among them."""

    @property
    def path(self) -> Path:
        """The folder."""
        ...

    def __getitem__(self, part: str) -> Mapping[str, Any]:
        """A part's configuration; BadInput where there is none."""
        ...


class Text(Protocol):
    """A family's text encoders: prompts -> the embeddings that enter the denoiser by each stream.

    No weight is read before it is needed. Every method that reads some raises BadInput as `check` does.
    """

    @property
    def streams(self) -> Mapping[str, int]:
        """The width of each stream, the family's main one first."""
        ...

    def check(self) -> None:
        """Raise BadInput for weights that cannot be computed with; each is read, once."""
        ...

    def fingerprint(self, prompts: Collection[str]) -> str:
        """SHA-256 in hex of all that the prompts' embeddings depend on, rounding aside."""
        ...

    def content(self, prompts: Collection[str]) -> Wanted:
        """The positions at which the prompts say something: all but padding. What prompts have in common, as
        a template's beginning, counts in one of them only."""
        ...

    def slots(
        self, unsafe: str, safe: str, keyword: str, weights: Mapping[str, float]
    ) -> Mapping[str, list[Slot]]:
        """The slots of a prompt pair by stream; in the main stream those whose kind has a weight above 0.

        keyword: what the unsafe prompt is about.
        """
        ...

    def padding(self, unsafe: str, safe: str) -> list[Slot]:
        """Places behind both prompts of a pair that stand for all padding which the denoiser sees, in the
        main stream; none where it sees none.
        """
        ...

    def padded_with_eot(self) -> "Text | None":
        """The same, as clients have it that pad with EoT where the tokenizer does not; None where it does."""
        ...

    def words(self, count: int) -> Sequence[str]:
        """Up to so many words of the tokenizers' vocabulary, each of which they read as one token of its own.

        They are spread evenly over the vocabulary in its own order, which begins with what is frequent, and
        always the same. None where the vocabulary has no whole words.
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

    def wearing(self, word: int, embedding: "Tensor") -> AbstractContextManager[None]:
        """While it lasts the pipeline has this embedding, (dim of `table`,), in place of the word's own."""
        ...

    def __call__(self, ids: Sequence["Tensor"], prefix: "Tensor | None" = None) -> Mapping[str, "Tensor"]:
        """What enters by each stream, in the encoders' dtype.

        prefix: embeddings in place of those of the first words, (prompts, words, dim of `table`).
        """
        ...


class Names(Protocol):
    """The names of a checkpoint's weights in each layout (pure)."""

    def published(self, part: str, key: str) -> str | None:
        """The name of a weight that a folder's file, which may be of another age, names `key`; None for what
        is no weight."""
        ...

    def from_file(self, shapes: Mapping[str, Shape]) -> Mapping[str, Mapping[str, Stored]]:
        """Where a single file with tensors of these shapes keeps each weight: part -> name -> place. A part
        that such files never hold is absent, and so is such a weight of a text encoder: it comes from the
        folder with the configurations."""
        ...

    def copies(self, names: Collection[str]) -> Mapping[str, Mapping[str, str]]:
        """The further copies of the denoiser in a single file: label -> name -> the name in that copy."""
        ...

    def to_file(self, shapes: Mapping[str, Mapping[str, Shape]]) -> Mapping[str, Mapping[str, Stored]]:
        """Where a single file is to keep each of a folder's weights, the inverse of `from_file`."""
        ...

    def is_leftover(self, name: str) -> bool:
        """Whether a tensor of a single file that is no weight can be left out without losing anything."""
        ...

    def in_file(self, keys: Collection[str]) -> Mapping[str, Stored]:
        """Where a single file keeps each of these, the weights of a denoiser, by names without a prefix."""
        ...

    def lora(self, key: str) -> str | None:
        """The name that we give a layer in a LoRA; None for what has no place in one."""
        ...


class Schedule(Protocol):
    """The noise schedule of a checkpoint, and how it is sampled in so many steps."""

    @property
    def timesteps(self) -> "Tensor":
        """The timestep of each step, from the noise on."""
        ...

    @property
    def levels(self) -> int:
        """How many timesteps it was trained with."""
        ...

    @property
    def identity(self) -> Mapping[str, Any]:
        """All that predictions of two models have to share to be comparable; plain values."""
        ...

    def step(self, prediction: "Tensor", t: "Tensor", latents: "Tensor") -> "Tensor":
        """The latents of the next step."""
        ...

    def noised(self, latents: "Tensor", noise: "Tensor", timesteps: "Tensor") -> "Tensor":
        """Clean latents with the noise of their timestep."""
        ...

    def wanted(self, latents: "Tensor", noise: "Tensor", timesteps: "Tensor") -> "Tensor":
        """What a model that is right predicts at `noised`."""
        ...


class Denoiser(Protocol):
    """A checkpoint's denoiser: how it is told, called and sampled. Nothing is loaded before `load`."""

    @property
    def latent_shape(self) -> Shape:
        """Of one latent image of the size that the denoiser was trained with."""
        ...

    def condition(self, prompts: Sequence[str], device: "torch.device") -> Conditioning:
        """What enters for these prompts, the empty one, which predictions are guided away from, first."""
        ...

    def outline(self, prompts: Sequence[str]) -> Conditioning:
        """The same on the meta device, sizes without values, but for the lengths: no weight is read."""
        ...

    def load(self, device: "torch.device", dtype: "torch.dtype" = ..., train: bool = False) -> "nn.Module":
        """The denoiser on `device` in `dtype`, read weight by weight; nothing else of the checkpoint is read.

        With `train` the weights that stage 2 tunes are float32 and require gradients, and no others do. On
        the meta device no weight is read, and none has values. Raises BadInput for a weight that is missing,
        of another shape than its configuration asks for, or not finite.
        """
        ...

    def predict(
        self, module: "nn.Module", latents: "Tensor", timesteps: "Tensor", told: Mapping[str, "Tensor"]
    ) -> "Tensor":
        """The denoiser's output, float32, at latents (batch, *latent shape) and timesteps (batch,).

        told: what enters by each stream, (batch, ...), as `Conditioning.told` gives it.
        """
        ...

    def schedule(self, steps: int) -> Schedule:
        """The checkpoint's schedule in so many deterministic steps; BadInput where it has not so many."""
        ...


class Redraw(Protocol):
    """Draws a picture from another one in place of noise, (height, width, 3) within [0, 1], a numpy array.

    picture: of the size that is drawn. strength: the share of the steps that are taken, from its latents with
    the noise of the first one on; 1 begins with noise alone. mask: white where it is painted anew, and the
    rest stays the picture's; None for all of it. Noise comes from the generator of the CPU.
    """

    def __call__(
        self,
        pipe: Any,
        prompt: str,
        negative: str | None,
        generator: "torch.Generator",
        picture: "Image.Image",
        mask: "Image.Image | None",
        *,
        strength: float,
        steps: int,
        guidance_scale: float,
        clip_skip: int = 1,
    ) -> "np.ndarray": ...


class Family(Protocol):
    """A model family; `families/registry.py` lists them.

    key: as files name it. name: as people do. denoiser: the folder of what is edited, `unet` or
    `transformer`; network: what people call it. weight_parts: the further parts with weights, other_parts:
    those without, of which pictures depend. streams: by which prompts enter, the main one first: its figures
    and tensors have plain names. slots: of a prompt, in the order of lists of weights. schedulers: those it
    draws with, by the names that users know, as diffusers' classes. fragments: what a file is whose names
    begin so.
    """

    @property
    def key(self) -> str: ...

    @property
    def name(self) -> str: ...

    @property
    def denoiser(self) -> str: ...

    @property
    def network(self) -> str: ...

    @property
    def weight_parts(self) -> tuple[str, ...]: ...

    @property
    def other_parts(self) -> tuple[str, ...]: ...

    @property
    def schedulers(self) -> Mapping[str, str]: ...

    @property
    def fragments(self) -> Mapping[str, str]: ...

    @property
    def streams(self) -> tuple[str, ...]: ...

    @property
    def slots(self) -> tuple[str, ...]: ...

    @property
    def defaults(self) -> Defaults: ...

    def claims(self, config: "Configs") -> str | None:
        """Why a diffusers folder with these configurations is none of the family's; None where it is one."""
        ...

    def claims_file(self, shapes: Mapping[str, Shape]) -> str | None:
        """The same of a single file with tensors of these shapes."""
        ...

    def base_folder(self) -> Path:
        """A diffusers folder with the configurations and tokenizers of the family's base; BadInput where none
        is at hand, so that a single file needs one of its own."""
        ...

    def check(self, config: "Configs") -> None:
        """Raise BadInput where configurations lack a size that the other answers need, or a tokenizer."""
        ...

    def told_by_file(
        self,
        shapes: Mapping[str, Shape],
        metadata: Mapping[str, str],
        read: Callable[[str], "Tensor"],
        config: Mapping[str, Mapping[str, Any]],
        is_base: bool,
    ) -> Told:
        """What a single file with tensors of these shapes says beyond its weights, where configurations say
        something else.

        read: a tensor by its name. is_base: whether the configurations are those of `base_folder`.
        """
        ...

    def marks(
        self, config: Mapping[str, Mapping[str, Any]]
    ) -> tuple[Mapping[str, Sequence[float]], Mapping[str, str]]:
        """The inverse: tensors, by name their values, and metadata by which a single file says what these
        configurations do."""
        ...

    def sampling(self, config: Mapping[str, Mapping[str, Any]]) -> Mapping[str, str]:
        """What a checkpoint predicts and how it is sampled, for people."""
        ...

    def lost_in_file(self, config: Mapping[str, Mapping[str, Any]]) -> Sequence[str]:
        """Sentences on what other readers will not find in a single file of this checkpoint."""
        ...

    def doors(self, config: Mapping[str, Mapping[str, Any]], keys: Collection[str]) -> tuple[Door, ...]:
        """Every way in which prompts enter a denoiser with weights of these names."""
        ...

    def widths(self, config: Mapping[str, Any]) -> Mapping[str, int]:
        """The width of the embeddings of each stream that a denoiser of this configuration takes."""
        ...

    def names(self, config: Mapping[str, Mapping[str, Any]]) -> Names:
        """The names of the weights of a checkpoint with these configurations."""
        ...

    def text_weights(self, config: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Mapping[str, Shape]]:
        """The weights that text embeddings depend on, and their shapes: part -> name -> shape. The text
        encoders' that are used, and of the denoiser a norm before a door."""
        ...

    def weights(
        self, config: Mapping[str, Mapping[str, Any]], converting: bool
    ) -> Mapping[str, Mapping[str, Shape]]:
        """Every weight and its shape that the configurations ask for: part -> name -> shape, of those parts
        for which no library is needed to tell; with `converting` of those that both layouts hold.

        With `converting` raises BadInput for a part that the other layout has no place for.
        """
        ...

    def tuned(self, key: str) -> bool:
        """Whether stage 2 tunes this weight of the denoiser; never one of a door."""
        ...

    def text(self, weights: Weights, device: "torch.device | str", dtype: "torch.dtype") -> Text:
        """The text encoders, to be computed with on `device` in `dtype`."""
        ...

    def skipped_text(
        self, weights: Weights, device: "torch.device | str", dtype: "torch.dtype", clip_skip: int
    ) -> Text:
        """The text encoders as `draw` reads them with this clip skip, 1 being `text`; BadInput where it reads
        none so.
        """
        ...

    def denoise(self, weights: Weights) -> Denoiser:
        """The checkpoint's denoiser, not loaded yet."""
        ...

    def canvas(self, weights: Weights) -> Canvas:
        """What pictures the checkpoint draws.

        BadInput where it is not drawn here, which configurations and names of weights tell, or where they do
        not say.
        """
        ...

    def truncated(self, weights: Weights, prompts: Sequence[str]) -> tuple[int, int]:
        """How many tokens of a prompt are read, and how many of these prompts have more."""
        ...

    def room(self, weights: Weights) -> int:
        """How many words of one token a prompt may have."""
        ...

    def pipe(self, weights: Weights, device: "torch.device", dtype: "torch.dtype") -> Any:
        """The checkpoint's diffusers pipeline on `device` in `dtype`, without safety checker or watermark.

        Never the network is asked. Raises BadInput for weights that are missing or damaged.
        """
        ...

    def scheduler(self, pipe: Any, name: str) -> Any:
        """The scheduler of that name with the pipeline's noise schedule and prediction type."""
        ...

    def draw(
        self,
        pipe: Any,
        prompts: Sequence[str],
        negative: Sequence[str] | None,
        generators: Sequence["torch.Generator"],
        *,
        steps: int,
        guidance_scale: float,
        width: int,
        height: int,
        clip_skip: int = 1,
    ) -> Any:
        """Pictures of the prompts, (prompts, height, width, 3) within [0, 1], a numpy array.

        The latents of each come from its own generator of the CPU in float32, and then whatever noise its
        scheduler asks for. clip_skip: the layer of the text encoder that is read, counted from the last one.
        """
        ...

    @property
    def redraw(self) -> Redraw | None:
        """How pictures are drawn from pictures; None where that is not built."""
        ...

    def latents(self, pipe: Any, images: "np.ndarray") -> "Tensor":
        """RGB uint8 (count, height, width, 3) -> their latents as the denoiser sees them, float32 and without
        noise, (count, *latent shape)."""
        ...

    def words(self, pipeline: Any) -> Words | None:
        """The text encoders of a pipeline for attacks; None where attacks cannot search in them."""
        ...

    def entrance(self, denoiser: "nn.Module") -> "nn.Module":
        """The module of a denoiser, or all of it, whose arguments are what meets the doors."""
        ...

    def mapped(
        self,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        change: Callable[[str, "Tensor"], "Tensor"],
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call of the entrance, as the pipeline calls it, with every stream changed."""
        ...
