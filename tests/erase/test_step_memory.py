"""What a step of stage 2 takes of memory, told without values: against steps with values."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import toy
from trce_cli.checkpoint.checkpoint import Checkpoint
from trce_cli.checkpoint.open import open_checkpoint
from trce_cli.erase.adapters import add_adapters, trained_numbers
from trce_cli.erase.prior import Prior
from trce_cli.erase.sampling import Predictor
from trce_cli.erase.settings import Recipe, Training
from trce_cli.erase.step_memory import Held, steer_memory
from trce_cli.erase.training import losses, weighted
from trce_cli.erase.trajectories import Plan, plan_trajectories
from trce_cli.families.base import Conditioning
from trce_cli.images.estimate import OVERHEAD
from trce_cli.prompts.presets import load_preset

PRIOR = Prior("test", ("a fish", "two red apples on a plate in the garden"), ("a dog",))
RECIPE = Recipe(steps=4, early_steps=2, trajectories_per_concept=1, unconditional=2, benign=2)
CPU = torch.device("cpu")


def planned(folder: Path, tmp_path: Path) -> tuple[Checkpoint, Plan]:
    (tmp_path / "toy.toml").write_text(toy.preset())
    checkpoint = open_checkpoint(str(folder))
    return checkpoint, plan_trajectories(checkpoint, [load_preset(tmp_path / "toy.toml")], PRIOR, RECIPE)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen-Image's latents are as many as those of large pictures, whatever its sizes."""
    monkeypatch.setattr("trce_cli.families.qwen_image.denoiser.LATENTS", 8)


class Twice(nn.Module):
    """Two layers, of which a product that nobody needs is made and dropped on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 1000, bias=False), nn.Linear(1000, 2, bias=False)

    def forward(self, entering: torch.Tensor) -> torch.Tensor:
        hidden = self.one(entering)
        (hidden + 1).sum()
        return self.two(hidden)


def test_what_lives_at_once_is_counted_and_weights_are_not() -> None:
    module, entering = Twice().requires_grad_(False), torch.randn(5, 8)
    predict: Any = Predictor(None, module, Conditioning((), {"context": entering}))  # type: ignore[arg-type]
    with Held(predict) as held:
        found = module(entering)
    # Hidden states and the sum's terms, then hidden states and the output; float32.
    assert held.most == 4 * (5 * 1000 + 5 * 1000 + 1)
    assert held._now == 4 * 5 * 2
    del found
    assert held._now == 0


def real_step(checkpoint: Checkpoint, plan: Plan, training: Training, checkpointing: bool) -> tuple[int, int]:
    """A step with weights: what it holds at once, and of that what autograd saves; bytes."""
    denoiser, size = checkpoint.family.denoise(checkpoint), training.batch_size
    conditioning = denoiser.condition(plan.prompts, CPU)
    dtype = torch.float32 if training.mixed_precision == "no" else torch.bfloat16
    module = denoiser.load(CPU, dtype, training.lora_rank is None)
    if training.lora_rank is not None:
        add_adapters(module, checkpoint.family.tuned, training.lora_rank, 0)
    if checkpointing:
        module.enable_gradient_checkpointing()  # type: ignore[operator]
    row = max((int(each.argmax()) for each in conditioning.lengths.values()), default=1)
    states = {name: torch.randn(size, *plan.shape).half() for name in ("latents", "direction", "prediction")}
    states |= {"timesteps": torch.full((size,), 500), "rows": torch.full((size,), row)}
    batch = dict.fromkeys(("unsafe", "unconditional", "benign"), states | {"offset": torch.ones(size)})
    predict, saved = Predictor(denoiser, module, conditioning), {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {each.data_ptr() for each in module.parameters()}
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with Held(predict) as held, hooks:
        loss = weighted([part.mean() for part in losses(predict, batch, training.margin)], training)
        kept = sum(size for place, size in saved.items() if place not in weights)
        loss.backward()
    return held.most, kept


BF16: dict[str, Any] = {"lora_rank": 2, "mixed_precision": "bf16"}


@pytest.mark.parametrize(
    ("key", "more"),
    [("sd1", BF16), ("z-image", {}), ("qwen-image", BF16), ("chroma", {}), ("sd3", {}), ("sd3", BF16)],
)
def test_a_step_without_values_takes_what_one_with_them_does(
    key: str, more: dict[str, Any], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    checkpoint, plan = planned(request.getfixturevalue(f"tiny_{key}"), tmp_path)
    training = Training(batch_size=1, **more)
    told = steer_memory(checkpoint, plan, training, gradient_checkpointing=False)["activation_bytes"]
    held, kept = real_step(checkpoint, plan, training, False)
    # Gradients of weights are told with the weights.
    assert held - 4 * trained_numbers(checkpoint, training.lora_rank) <= told * 1.01
    assert told <= held * 1.01
    assert kept < told < 3 * kept


def test_checkpointing_and_smaller_batches_take_less_as_they_do(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    checkpoint, plan = planned(request.getfixturevalue("tiny_z-image"), tmp_path)

    def told(size: int, checkpointing: bool) -> int:
        training = Training(batch_size=size)
        return steer_memory(checkpoint, plan, training, checkpointing)["activation_bytes"]

    plain, cut = told(2, False), told(2, True)
    assert cut < 0.8 * plain
    assert told(4, False) == pytest.approx(2 * plain, rel=0.05)
    assert real_step(checkpoint, plan, Training(batch_size=2), True)[0] == pytest.approx(cut, rel=0.1)


@pytest.mark.parametrize(("key", "rank"), [("z-image", None), ("flux", 2)])
def test_all_parts_are_in_the_sum(
    key: str, rank: int | None, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    checkpoint, plan = planned(request.getfixturevalue(f"tiny_{key}"), tmp_path)
    every = sum(math.prod(checkpoint.shape("denoiser", name)) for name in checkpoint.keys("denoiser"))
    told = checkpoint.family.denoise(checkpoint).condition(plan.prompts, CPU)
    embeddings = sum(each.numel() * each.element_size() for each in told.streams.values())
    training = Training(batch_size=4, lora_rank=rank)
    found = steer_memory(checkpoint, plan, training, gradient_checkpointing=False)
    assert found["embedding_bytes"] == embeddings
    trained = trained_numbers(checkpoint, rank)
    frozen = every - trained if rank is None else every
    weights = 4 * frozen + 16 * trained
    assert found["memory_bytes"] == OVERHEAD + embeddings + weights + found["activation_bytes"]


def test_where_sampling_takes_more_it_is_told(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """A batch of one with checkpointing is four samples, and a pass of sampling has twelve."""
    checkpoint, plan = planned(request.getfixturevalue("tiny_flux"), tmp_path)
    training = Training(batch_size=1, lora_rank=1)
    told = steer_memory(checkpoint, plan, training, gradient_checkpointing=True)
    trained = trained_numbers(checkpoint, 1)
    every = sum(math.prod(checkpoint.shape("denoiser", name)) for name in checkpoint.keys("denoiser"))
    learning = OVERHEAD + told["embedding_bytes"] + 4 * every + 16 * trained + told["activation_bytes"]
    assert told["memory_bytes"] > learning
