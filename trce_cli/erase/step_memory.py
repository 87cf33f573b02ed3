"""What stage 2 takes of memory, told before: its code runs on tensors that have sizes and no values.

These are PyTorch's fake tensors. Every storage that an operation makes is counted from then on until nothing
refers to it any more, so that what autograd saves, what gradient checkpointing does without, and the copies
of mixed precision are as they will be. What a kernel needs inside itself is not seen.
"""

import weakref
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trce_cli.checkpoint.checkpoint import Checkpoint
from trce_cli.erase.adapters import add_adapters, all_numbers, frozen_numbers, trained_numbers
from trce_cli.erase.sampling import AT_ONCE, Predictor
from trce_cli.erase.settings import Training
from trce_cli.erase.training import SOURCES, losses, tuned, weighted
from trce_cli.erase.trajectories import STORED, Plan
from trce_cli.families.base import Conditioning
from trce_cli.images.estimate import OVERHEAD

PASS: Final = 3 * AT_ONCE  # samples of a pass of sampling: of each state under three prompts


def steer_memory(
    erased: Checkpoint, plan: Plan, training: Training, gradient_checkpointing: bool
) -> dict[str, int]:
    """What a run of one process takes at most, in bytes; nothing is encoded, and no weight is read.

    embedding_bytes: of all prompts. activation_bytes: of a training step, beside weights, gradients and
    moments. memory_bytes: of all that, or of sampling where that takes more, and of the libraries.
    """
    width = 4 if training.mixed_precision == "no" else 2
    outline = erased.family.denoise(erased).outline(plan.prompts)
    embeddings = sum(4 * each.numel() for each in outline.streams.values())
    run = _Run(erased, plan, training, outline)
    activations = run.step(gradient_checkpointing)
    # Weights, gradients and two moments of what is trained are in float32.
    rank = training.lora_rank
    learning = width * frozen_numbers(erased, rank) + 16 * trained_numbers(erased, rank) + activations
    sampling = width * all_numbers(erased) + run.sampling()
    return {
        "embedding_bytes": embeddings,
        "activation_bytes": activations,
        "memory_bytes": OVERHEAD + embeddings + max(learning, sampling),
    }


class _Run:
    """The denoiser as `steer.Run.load` has it, and what enters it, without values."""

    def __init__(self, erased: Checkpoint, plan: Plan, training: Training, outline: Conditioning) -> None:
        self.erased, self.plan, self.training, self.outline = erased, plan, training, outline
        # The row of the prompt that takes most.
        self.row = max((int(each.argmax()) for each in outline.lengths.values()), default=0)

    def load(self, train: bool) -> tuple[FakeTensorMode, Predictor]:
        """The denoiser and its streams; tensors that are made under the mode have no values either."""
        denoiser = self.erased.family.denoise(self.erased)
        dtype = torch.float32 if self.training.mixed_precision == "no" else torch.bfloat16
        rank = self.training.lora_rank if train else None
        module = denoiser.load(torch.device("meta"), dtype, train and rank is None)
        if rank is not None:
            add_adapters(module, self.erased.family.tuned, rank, self.training.seed)
        with FakeTensorMode(allow_non_fake_inputs=True) as sizes:
            module.to_empty(device="cpu")
            streams = {name: torch.empty(each.shape) for name, each in self.outline.streams.items()}
        told = Conditioning(self.outline.prompts, streams, self.outline.lengths)
        return sizes, Predictor(denoiser, module, told)

    def step(self, gradient_checkpointing: bool) -> int:
        """The most that a training step holds at once, in bytes, but weights and what goes with them."""
        sizes, predict = self.load(train=True)
        if gradient_checkpointing:
            predict.module.enable_gradient_checkpointing()  # type: ignore[operator]
        for parameter in tuned(predict.module).values():
            parameter.register_post_accumulate_grad_hook(_dropped)
        count, shape = self.training.batch_size, self.plan.shape
        batch: dict[str, Mapping[str, Tensor]] = {}
        for name, kinds in SOURCES.items():
            if name == "unsafe" or self.plan.states(kinds[0]):
                targets = ("direction",) if name == "unsafe" else ("prediction",)
                with sizes:
                    states = {
                        each: torch.empty(count, *shape, dtype=STORED) for each in ("latents", *targets)
                    }
                batch[name] = {**states, **self._places(count), "offset": torch.ones(count)}
        with Held(predict) as held:
            parts = losses(predict, batch, self.training.margin)
            weighted([part.mean() for part in parts], self.training).backward()
        return held.most

    def sampling(self) -> int:
        """The most that a pass of sampling holds at once, in bytes, but weights."""
        sizes, predict = self.load(train=False)
        with sizes:
            latents = torch.empty(PASS, *self.plan.shape)
        with torch.no_grad(), Held(predict) as held:
            predict(latents, **self._places(PASS))
        return held.most

    def _places(self, count: int) -> dict[str, Tensor]:
        return {
            "timesteps": torch.ones(count, dtype=torch.int64),
            "rows": torch.full((count,), self.row),
        }


def _dropped(parameter: Tensor) -> None:
    """Gradients are counted with the weights."""
    parameter.grad = None


class Held(TorchDispatchMode):
    """Counts the bytes of all storages that operations make while it lasts, but of views of weights and
    of what enters. most: held at once.
    """

    def __init__(self, predict: Predictor) -> None:
        super().__init__()
        self.most = self._now = 0
        module = predict.module
        known = (*module.parameters(), *module.buffers(), *predict.conditioning.streams.values())
        self._sizes = {each.untyped_storage()._cdata: 0 for each in known}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Called for each operation."""
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return made

    def _add(self, storage: torch.UntypedStorage) -> None:
        place = storage._cdata
        if place not in self._sizes:
            self._sizes[place] = storage.nbytes()
            self._now += storage.nbytes()
            self.most = max(self.most, self._now)
            weakref.finalize(storage, self._drop, place)

    def _drop(self, place: int) -> None:
        self._now -= self._sizes.pop(place)
