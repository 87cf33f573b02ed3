"""The closed form, by its mathematical properties and against a plain second implementation."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from trce_cli.maths.closed_form import CUT_OFF, MapFitter, SecondMoment, pseudo_inverse

DIM, PAIRS, TOKENS = 24, 12, 400
MANY = 3 * DIM  # captions


def embeddings(count: int, seed: int) -> Tensor:
    """float32 embeddings as a final LayerNorm gives them: in the hyperplane orthogonal to `normal()`."""
    x = torch.randn(count, DIM, generator=torch.Generator().manual_seed(seed)) * torch.linspace(0.3, 3, DIM)
    return torch.nn.functional.layer_norm(x, (DIM,), weight=torch.linspace(0.5, 2, DIM))


def normal() -> Tensor:
    direction = 1 / torch.linspace(0.5, 2, DIM).double()
    return direction / direction.norm()


def benign() -> SecondMoment:
    return SecondMoment(DIM, MANY).update(embeddings(TOKENS, seed=3), torch.ones(TOKENS))


def pairs(count: int = PAIRS) -> tuple[Tensor, Tensor, Tensor]:
    """Unsafe, safe (count, DIM) and their weights (count,)."""
    weights = torch.rand(count, generator=torch.Generator().manual_seed(4)) + 0.5
    return embeddings(count, seed=1), embeddings(count, seed=2), weights


def fitter() -> MapFitter:
    return MapFitter(DIM, PAIRS).update(*pairs())


def plain_layer_edit(weight: Tensor, preserve: float, r: float = 0.0) -> Tensor:
    """W' of one layer by least squares for the change, rows scaled by the roots of the weights.

    r: the ridge, as further rows that ask the change to be zero, in the plane that embeddings are in.
    """
    unsafe, safe, weights = (x.double() for x in pairs())
    benign_tokens = embeddings(TOKENS, seed=3).double()
    pair_root, prior_root = (weights / PAIRS).sqrt()[:, None], (preserve / MANY) ** 0.5
    ridge_rows = r**0.5 * (torch.eye(DIM, dtype=torch.float64) - torch.outer(normal(), normal()))
    inputs = torch.cat([pair_root * unsafe, prior_root * benign_tokens, ridge_rows])
    nothing = torch.zeros(len(benign_tokens) + len(ridge_rows), DIM, dtype=torch.float64)
    targets = torch.cat([pair_root * (safe - unsafe), nothing]) @ weight.double().mT
    solution = torch.linalg.lstsq(
        inputs, targets, rcond=CUT_OFF**0.5, driver="gelsd"
    ).solution  # minimum norm
    return weight.double() + solution.mT


@pytest.mark.parametrize("preserve", [0.0, 0.1, 1.0, 30.0])
def test_equals_a_plain_least_squares_solution_for_each_layer(preserve: float) -> None:
    linear = fitter().solve(benign().P, preserve).map
    for out in (7, DIM, 40):
        weight = torch.randn(out, DIM, generator=torch.Generator().manual_seed(out), dtype=torch.float64)
        expected = plain_layer_edit(weight, preserve)
        error = (linear.edit(weight) - expected).norm() / expected.norm()
        assert error < 1e-8


@pytest.mark.parametrize("preserve", [0.0, 1.0])
@pytest.mark.parametrize("ridge", [1e-6, 1e-4, 1e-2])
def test_the_ridge_equals_a_plain_least_squares_solution_with_rows_for_it(
    preserve: float, ridge: float
) -> None:
    unsafe, _, weights = (x.double() for x in pairs())
    tokens = embeddings(TOKENS, seed=3).double()
    G = unsafe.mT @ (weights[:, None] * unsafe) / PAIRS + preserve * tokens.mT @ tokens / MANY
    inside = torch.linalg.eigvalsh(G)[-(PAIRS if preserve == 0 else DIM - 1) : -1]  # without the largest
    linear = fitter().solve(benign().P, preserve, ridge).map
    weight = torch.randn(40, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = plain_layer_edit(weight, preserve, ridge * float(inside.mean()))
    assert (linear.edit(weight) - expected).norm() < 1e-7 * expected.norm()
    without = fitter().solve(benign().P, preserve).map
    assert (linear.edit(weight) - without.edit(weight)).norm() > 1e-6 * expected.norm()


@pytest.mark.parametrize("preserve", [0.0, 0.01, 1.0])
def test_the_ridge_bounds_the_change_whatever_the_embeddings(preserve: float) -> None:
    # Pairs in directions that hardly vary: without a bound the change is as large as they are small.
    thin = torch.logspace(0, -4, DIM)
    unsafe, safe, weights = (pairs()[0] * thin, pairs()[1], pairs()[2])
    fit = MapFitter(DIM, PAIRS).update(unsafe, safe, weights)
    P = SecondMoment(DIM, MANY).update(embeddings(TOKENS, seed=3) * thin, torch.ones(TOKENS)).P
    rms = float((weights.double() @ (safe - unsafe).double().square().sum(1)) / PAIRS) ** 0.5
    norms = []
    for ridge in (0.0, 1e-4, 1e-2, 1.0):
        norms.append(fit.solve(P, preserve, ridge).map.norm)
        eigenvalues = torch.linalg.eigvalsh(fit.A + preserve * P)
        kept = eigenvalues[eigenvalues > CUT_OFF * eigenvalues[-1]]
        if ridge:
            assert norms[-1] <= rms / (2 * (ridge * float(kept[:-1].mean())) ** 0.5)
    assert norms == sorted(norms, reverse=True)
    assert norms[0] > 2 * norms[-1]


def test_the_ridge_does_not_depend_on_how_long_the_start_token_is() -> None:
    start = torch.zeros(DIM)
    start[0] = 1.0
    others = torch.nn.functional.pad(embeddings(TOKENS, seed=3)[:, 1:], (1, 0))
    unsafe, safe = (torch.nn.functional.pad(each[:, 1:], (1, 0)) for each in pairs()[:2])
    changes = []
    for length in (30.0, 3000.0):
        P = SecondMoment(DIM, MANY).update(others, torch.ones(TOKENS))
        P.update(length * start[None], torch.tensor([MANY]))
        fit = MapFitter(DIM, PAIRS).update(unsafe, safe, pairs()[2])
        changes.append(fit.solve(P.P, 1.0, ridge=1e-2, cut_off=0.0).map.change)
    torch.testing.assert_close(*changes, rtol=1e-8, atol=1e-10)


def test_is_the_minimum_of_the_objective() -> None:
    unsafe, safe, weights = (x.double() for x in pairs())
    tokens = embeddings(TOKENS, seed=3).double()
    linear = fitter().solve(benign().P, preserve=2.0).map

    def objective(M: Tensor) -> Tensor:
        erase = (weights * (unsafe @ M.mT - safe).square().sum(1)).sum() / PAIRS
        keep = (tokens @ M.mT - tokens).square().sum() / MANY
        return erase + 2.0 * keep

    M = linear.matrix.requires_grad_()
    (gradient,) = torch.autograd.grad(objective(M), M)
    identity = torch.eye(DIM, dtype=torch.float64, requires_grad=True)
    (reference,) = torch.autograd.grad(objective(identity), identity)
    assert gradient.norm() < 1e-7 * reference.norm()


def test_is_the_identity_when_safe_equals_unsafe() -> None:
    unsafe, _, weights = pairs()
    fit = MapFitter(DIM, PAIRS).update(unsafe, unsafe, weights)
    linear = fit.solve(benign().P, preserve=0.5).map
    assert torch.equal(linear.matrix, torch.eye(DIM, dtype=torch.float64))
    assert fit.distance == 0


def test_is_exact_on_the_pairs_as_preserve_goes_to_zero() -> None:
    unsafe, safe, _ = pairs()
    distance = (safe - unsafe).double().norm()
    errors = [
        float((fitter().solve(benign().P, preserve).map(unsafe) - safe).norm() / distance)
        for preserve in (1.0, 1e-2, 1e-4, 1e-6)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-4
    assert fitter().moved(fitter().solve(benign().P, 1e-6).map) == pytest.approx(1, abs=1e-3)


def test_benign_embeddings_stay_within_the_bound() -> None:
    # At the minimum the objective is at most its value at the identity, where only the pairs count.
    unsafe, safe, weights = (x.double() for x in pairs())
    tokens = embeddings(TOKENS, seed=3)
    at_identity = float(weights @ (safe - unsafe).square().sum(1)) / PAIRS
    for preserve in (0.1, 10.0, 1000.0):
        linear = fitter().solve(benign().P, preserve).map
        change = float((linear(tokens) - tokens).square().sum()) / MANY
        assert 0 < change <= at_identity / preserve


def test_order_and_duplication_do_not_matter() -> None:
    unsafe, safe, weights = pairs()
    once = fitter().solve(benign().P, preserve=1.0).map.matrix
    order = torch.randperm(2 * PAIRS, generator=torch.Generator().manual_seed(5)) % PAIRS
    twice = MapFitter(DIM, 2 * PAIRS).update(unsafe[order], safe[order], weights[order])
    torch.testing.assert_close(twice.solve(benign().P, preserve=1.0).map.matrix, once, rtol=1e-9, atol=1e-10)


def test_streamed_equals_batch() -> None:
    unsafe, safe, weights = pairs()
    fit, prior = MapFitter(DIM, PAIRS), SecondMoment(DIM, MANY)
    for start in range(0, PAIRS, 5):
        part = slice(start, start + 5)
        fit = fit.update(unsafe[part], safe[part], weights[part])
    for part_ in embeddings(TOKENS, seed=3).split(37):
        prior = prior.update(part_[:9], torch.ones(9))
        rest = part_[9:]
        for share in (0.25, 0.75):  # as often in all
            prior = prior.update(rest, torch.full((len(rest),), share))
    torch.testing.assert_close(prior.P, benign().P, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(fit.A, fitter().A, rtol=1e-12, atol=1e-12)
    expected = fitter().solve(benign().P, preserve=1.0).map.matrix
    torch.testing.assert_close(fit.solve(prior.P, preserve=1.0).map.matrix, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("preserve", [0.0, 1.0])
def test_nothing_changes_off_the_layer_norm_hyperplane(preserve: float) -> None:
    # float32 rounding leaves the embeddings a little off the plane; a ridge would blow that up.
    found = fitter().solve(benign().P, preserve)
    assert found.rank <= DIM - 1
    assert (found.map.change @ normal()).norm() < 1e-5 * found.map.change.norm()


def test_rank_is_that_of_the_pairs_without_a_prior() -> None:
    found = fitter().solve(benign().P, preserve=0.0)
    unsafe = pairs()[0].double()
    assert found.rank == PAIRS
    complement = torch.linalg.svd(unsafe).Vh[PAIRS:]  # directions that no unsafe embedding has
    assert (found.map.change @ complement.mT).norm() < 1e-9 * found.map.change.norm()


def test_distance_and_move_are_those_of_the_weighted_embeddings() -> None:
    unsafe, safe, weights = (x.double() for x in pairs())
    mean_square = lambda x: float(weights @ x.square().sum(1))  # noqa: E731
    distance = (mean_square(safe - unsafe) / mean_square(unsafe)) ** 0.5
    assert fitter().distance == pytest.approx(distance)
    linear = fitter().solve(benign().P, preserve=1.0).map
    steps = ((linear(unsafe) - unsafe) * (safe - unsafe)).sum(1)
    assert fitter().moved(linear) == pytest.approx(float(weights @ steps) / mean_square(safe - unsafe))


def test_pseudo_inverse_of_nothing_is_nothing() -> None:
    inverse, rank, condition = pseudo_inverse(torch.zeros(4, 4, dtype=torch.float64), CUT_OFF)
    assert (rank, condition) == (0, 1.0)
    assert torch.equal(inverse, torch.zeros(4, 4, dtype=torch.float64))


def test_pseudo_inverse_equals_the_library_one() -> None:
    tokens = embeddings(8, seed=8).double()  # rank 8 of 24
    inverse, rank, _ = pseudo_inverse(tokens.mT @ tokens, CUT_OFF)
    assert rank == 8
    expected = torch.linalg.pinv(tokens.mT @ tokens, rtol=CUT_OFF, hermitian=True)
    torch.testing.assert_close(inverse, expected, rtol=1e-9, atol=1e-10)


def test_module_imports_nothing_but_torch() -> None:
    code = (
        "import sys, trce_cli.maths.closed_form\n"
        "print([m for m in ('typer', 'rich', 'diffusers', 'transformers', 'pydantic') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


@pytest.mark.parametrize("ridge", [0.0, 1e-3, 0.1])
def test_few_slots_give_the_same_map_in_two_factors(ridge: float) -> None:
    few = DIM // 2 - 1
    P = benign().P
    whole, factored = (MapFitter(DIM, few, factored=each).update(*pairs(few)) for each in (False, True))
    expected, found = (each.solve(P, 0.3, ridge) for each in (whole, factored))
    up, down = found.map.factors
    assert (up.shape, down.shape) == ((DIM, few), (few, DIM))
    # Off the plane that embeddings are in, float32 leaves rounding noise, which only one of them cuts off.
    error = (found.map.change - expected.map.change).norm() / expected.map.change.norm()
    assert error < 1e-5
    assert found.rank == expected.rank
    assert found.condition == pytest.approx(expected.condition, rel=1e-6)
    assert factored.moved(found.map) == pytest.approx(whole.moved(expected.map))


def test_as_many_slots_as_make_factors_no_smaller_give_one_matrix() -> None:
    fitter = MapFitter(DIM, DIM, factored=True).update(*pairs(DIM))
    assert len(fitter.solve(benign().P, 0.3, 1e-3).map.factors) == 1
