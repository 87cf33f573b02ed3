"""Weights into modules, strictly: nothing is left at random values."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from trce_cli.errors import BadInput, TrceError, refusing
from trce_cli.families.base import Shape, Weights
from trce_cli.families.tokenizer_files import AGAIN
from trce_cli.system.safetensors import FLOATS, all_finite

M = TypeVar("M", bound=nn.Module)
_DTYPES = {getattr(torch, name) for name in FLOATS.values()}


def guarded(tokenizer: Any, folder: Path) -> Any:
    """The tokenizer, which tells as BadInput whatever its library says of a text; whoever calls it.

    Much that is wrong with its files shows only at the texts that need it.
    """
    kind = type(tokenizer)

    def call(self: Any, *texts: Any, **options: Any) -> Any:
        with refusing(f"The tokenizer in {folder} cannot be used"):
            return kind.__call__(self, *texts, **options)

    told = {"__call__": call, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    tokenizer.__class__ = type(kind.__name__, (kind,), told)
    return tokenizer


def check_embeddings(*embeddings: Tensor) -> None:
    """Raise TrceError where a text encoder gave NaN or infinite values."""
    if not all(bool(torch.isfinite(each).all()) for each in embeddings):
        raise TrceError(
            "The text encoder gives NaN or infinite embeddings.",
            "Its weights are damaged, or --dtype is too narrow for it: try --dtype fp32.",
        )


def fast_tokenizer(folder: Path) -> Any:
    """A tokenizer in its fast form that can pad, from local files only; BadInput for any other.

    Some are published as a SentencePiece model alone, which transformers converts by two further packages.
    """
    from transformers import AutoTokenizer

    if (folder / "spiece.model").is_file() and not (folder / "tokenizer.json").is_file():
        missing = [
            package
            for package, name in (("sentencepiece", "sentencepiece"), ("protobuf", "google.protobuf"))
            if not _is_installed(name)
        ]
        if missing:
            raise BadInput(
                f"The tokenizer in {folder} is a SentencePiece model, which needs {' and '.join(missing)}.",
                "pip install 'trce[sentencepiece]'",
            )
    with refusing(f"The tokenizer in {folder} cannot be read", AGAIN):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if not getattr(tokenizer, "is_fast", False) or tokenizer.pad_token_id is None:
        raise BadInput(f"The tokenizer in {folder} has no fast form, or no token to pad with.")
    return tokenizer


def _is_installed(module: str) -> bool:
    try:
        import_module(module)
    except ImportError:
        return False
    return True


def spread(words: Iterable[str], rank: Mapping[str, int], count: int | None) -> list[str]:
    """In alphabetical order; with `count` up to so many, spread evenly over the words by their rank."""
    found = sorted(words)
    if count is None:
        return found
    found.sort(key=lambda word: rank[word])
    step = max(len(found) / count, 1)
    return [found[int(place * step)] for place in range(min(count, len(found)))]


def checked(weights: Weights, part: str, shapes: Mapping[str, Shape]) -> Iterator[tuple[str, Tensor]]:
    """Each of these weights of a part by its name, one at a time.

    Raises BadInput for one that is missing, of another shape than is wanted, of a dtype that no computation
    takes, or not finite.
    """
    for key, shape in shapes.items():
        weight = weights.read(part, key)
        where = f"{key} in the {part} of {weights.path}"
        if tuple(weight.shape) != shape:
            raise BadInput(f"{where} has shape {list(weight.shape)}; its config.json asks for {list(shape)}.")
        if weight.dtype not in _DTYPES:
            raise BadInput(f"{where} has the dtype {weight.dtype}, which is no use here.")
        if not all_finite(weight):
            raise BadInput(f"{where} holds NaN or infinite values.")
        yield key, weight


def load_strictly(
    make: Callable[[dict[str, Any]], M],
    weights: Weights,
    part: str,
    device: torch.device | str,
    dtype: Callable[[str], torch.dtype | None],
    name: Callable[[str], str | None] = lambda key: key,
) -> M:
    """The module that `make` makes of a part's configuration, in evaluation mode and without gradients.

    Its weights are its parameters, and the buffers that it keeps in files. dtype: of each weight by its name;
    None for that of the file. name: of a weight by the module's name for it. On the meta device nothing is
    read, and weights have no values. Raises BadInput for a configuration that cannot be used, and as
    `checked` does.
    """
    where = weights.folder(part) / "config.json"
    meta = torch.device("meta")
    with refusing(f"{where} cannot be used"), meta:
        module = make(dict(weights.config[part]))
    kept = module.state_dict()
    own = dict(module.named_parameters()) | {key: at for key, at in module.named_buffers() if key in kept}
    counts = {key for key in own if key.endswith(".num_batches_tracked")}  # nothing computes with them
    ours = {name(key) or key: key for key in own if key not in counts}
    shapes = {key: tuple(own[theirs].shape) for key, theirs in ours.items()}
    if torch.device(device) == meta:
        state = {
            ours[key]: torch.empty(shape, dtype=dtype(key), device=meta) for key, shape in shapes.items()
        }
    else:
        state = {ours[key]: weight.to(device, dtype(key)) for key, weight in checked(weights, part, shapes)}
    state |= {key: torch.zeros_like(own[key], device=device) for key in counts}
    module.load_state_dict(state, assign=True)
    return module.eval().requires_grad_(False)


def load_denoiser(
    make: Callable[[dict[str, Any]], M],
    weights: Weights,
    device: torch.device | str,
    dtype: torch.dtype,
    is_tuned: Callable[[str], bool],
    train: bool = False,
) -> M:
    """The denoiser, frozen, in `dtype`; for training what stage 2 tunes is float32 and has gradients."""
    quiet_libraries()
    module = load_strictly(
        make, weights, "denoiser", device, lambda key: torch.float32 if train and is_tuned(key) else dtype
    )
    if train:
        for key, parameter in module.named_parameters():
            parameter.requires_grad_(is_tuned(key))
    return module


def precision_of(module: nn.Module) -> torch.dtype:
    """The dtype of a denoiser's frozen weights, in which it computes; float32 where none is frozen."""
    return next((weight.dtype for weight in module.parameters() if not weight.requires_grad), torch.float32)


def quiet_libraries() -> None:
    """Let diffusers and transformers say nothing but errors, and show no bars of their own."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.logging.set_verbosity_error()
        library.logging.disable_progress_bar()
        warnings.filterwarnings("ignore", module=rf"{library.__name__}\.")
