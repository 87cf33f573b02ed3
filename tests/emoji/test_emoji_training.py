"""The training loop of the embedded checkpoint: a killed run ends where an undisturbed one does."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn

from training import loop
from training.loop import Recipe, learning_rate, trained

RECIPE = Recipe(steps=100, batch_size=4, lr=1e-2, warmup=5)


@dataclass(frozen=True)
class Toy:
    """A linear model that learns to double its input."""

    recipe: Recipe = RECIPE
    name: str = "toy"

    def build(self) -> nn.Module:
        return nn.Linear(3, 3)

    def loss(self, model: nn.Module, count: int, seed: int) -> tuple[Tensor, dict[str, float]]:
        x = torch.randn(count, 3, generator=torch.Generator().manual_seed(seed))
        return (model(x) - 2 * x).square().mean(), {}


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("muon", [(), ("weight",)])
def test_a_stopped_run_goes_on_to_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, muon: tuple[str, ...]
) -> None:
    monkeypatch.setattr(loop, "SAVE_EVERY", 0.0)
    task = Toy(replace(RECIPE, muon=muon))
    weights = []
    for name, stop in (("whole", None), ("stopped", 1)):
        work = tmp_path / name
        work.mkdir()
        if stop:
            assert len(list(islice(loop._steps(task, work, 0, 1), stop))) == stop
            assert (work / "toy.state.safetensors").exists()
        records = list(loop._steps(task, work, 0, 1))
        weights.append(load_file(work / "toy.safetensors"))
        assert not (work / "toy.state.safetensors").exists()
    assert [record["step"] for record in records] == [25, 50, 75, 100]
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=0)


@pytest.mark.usefixtures("one_process")
def test_what_there_is_of_a_run_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "SAVE_EVERY", 0.0)
    next(loop._steps(Toy(), tmp_path, 0, 1))
    early = trained(Toy(), tmp_path)
    kept = load_file(tmp_path / "toy.state.safetensors")
    assert torch.equal(early.weight, kept["average.0"])
    assert torch.equal(early.bias, kept["average.1"])
    assert not torch.equal(early.weight, kept["model.weight"])
    list(loop._steps(Toy(), tmp_path, 0, 1))
    assert torch.equal(trained(Toy(), tmp_path).weight, load_file(tmp_path / "toy.safetensors")["weight"])


@pytest.mark.usefixtures("one_process")
def test_muon_moves_a_matrix_by_the_same_length_in_all_directions(tmp_path: Path) -> None:
    recipe = Recipe(steps=1, batch_size=16, lr=1.0, weight_decay=0.0, warmup=1, decay=1.0, muon=("weight",))
    torch.manual_seed(recipe.seed)
    before = Toy().build().weight.detach()
    list(loop._steps(Toy(recipe), tmp_path, 0, 1))
    kept = load_file(tmp_path / "toy.safetensors")
    # The average is what is kept; after one step it has gone 9 tenths of the way.
    moved = torch.linalg.svdvals((kept["weight"] - before) / 0.9)
    assert moved.max() < 2 * moved.min()


def test_learning_rate_warms_up_holds_and_falls() -> None:
    recipe = Recipe(steps=100, batch_size=1, lr=2.0, warmup=10, decay=0.4)
    rates = [learning_rate(recipe, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[10:60] == [2.0] * 50
    assert rates[80] == pytest.approx(1.0)
    assert rates[-1] < 0.1
