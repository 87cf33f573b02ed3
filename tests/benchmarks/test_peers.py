"""The baselines' closed forms against naive minimisers of what their papers minimise."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import peers
from trce_cli import load_map
from trce_cli.checkpoint.open import open_checkpoint
from trce_cli.prompts.presets import load_presets

DIM = 7


@pytest.fixture
def problem() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """o, n and p as rows, and W."""
    torch.manual_seed(3)
    shapes = ((3, DIM), (3, DIM), (2, DIM), (5, DIM))
    o, n, p, W = (torch.randn(*shape, dtype=torch.float64) for shape in shapes)
    return o, n, p, W


def least_squares(inputs: Tensor, outputs: Tensor) -> Tensor:
    """The W' with the least sum of |W' input - output|^2, rows."""
    return torch.linalg.lstsq(inputs, outputs).solution.T


def uce_by_rows(W: Tensor, o: Tensor, n: Tensor, p: Tensor) -> Tensor:
    keep, near = peers.PRESERVE**0.5, peers.NEAR**0.5
    inputs = torch.cat([o, keep * p, near * torch.eye(DIM, dtype=o.dtype)])
    return least_squares(inputs, torch.cat([n @ W.T, keep * p @ W.T, near * W.T]))


def test_uce_is_the_least_squares_solution(problem: tuple[Tensor, ...]) -> None:
    o, n, p, W = problem
    torch.testing.assert_close(W @ peers.uce(o, n, p.T @ p), uce_by_rows(W, o, n, p))


@pytest.mark.parametrize("rounds", [1, 3])
def test_rece_erases_what_would_bring_the_concept_back(
    problem: tuple[Tensor, ...], rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "ROUNDS", rounds)
    o, n, p, W = problem
    edited = uce_by_rows(W, o, n, p)
    for _ in range(peers.ROUNDS):
        stacked = torch.cat([edited, peers.DERIVE**0.5 * torch.eye(DIM, dtype=o.dtype)])
        wanted = torch.cat([W @ o.T, torch.zeros(DIM, len(o), dtype=o.dtype)])
        derived = torch.linalg.lstsq(stacked, wanted).solution.T
        edited = uce_by_rows(edited, derived, n, p)
    torch.testing.assert_close(W @ peers.rece(o, n, p.T @ p, [W]), edited)


def test_speed_is_the_best_edit_that_changes_nothing_preserved(problem: tuple[Tensor, ...]) -> None:
    o, n, p, W = problem
    c = torch.randn(1, DIM, dtype=o.dtype)
    edited = W @ peers.speed(o, n, p.T @ p, c)
    torch.testing.assert_close(p @ edited.T, p @ W.T)
    torch.testing.assert_close(c @ edited.T, c @ W.T)
    # Among the changes D that neither p nor c meet: D = Z B^T with B an orthonormal basis of the rest.
    _, _, V = torch.linalg.svd(torch.cat([p, c]))
    B = V[len(p) + len(c) :].T
    Z = least_squares(
        torch.cat([o @ B, torch.eye(B.shape[1], dtype=o.dtype)]),
        torch.cat([(n - o) @ W.T, torch.zeros(B.shape[1], len(W), dtype=o.dtype)]),
    )
    torch.testing.assert_close(edited, W + Z @ B.T)


@pytest.mark.parametrize("name", ["uce", "rece", "speed"])
def test_a_baseline_is_a_map_that_moves_its_concepts(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRCE_CACHE", str(tmp_path / "cache"))
    checkpoint = open_checkpoint("emoji")
    path = tmp_path / "map.safetensors"
    peers.write_peer(name, checkpoint, load_presets(["emoji-weapons"]), path)
    linear = load_map(path).streams["context"]
    assert linear.is_finite
    assert linear.norm > 0.1
