"""Linear maps: whole and factored ones do the same."""

import numpy as np
import pytest
import torch
from torch import Tensor

from trce_cli.maths.closed_form import MapFitter, SecondMoment
from trce_cli.maths.linear_map import LinearMap

WIDTH, RANK = 12, 3
EYE = torch.eye(WIDTH, dtype=torch.float64)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def factored(seed: int = 1) -> LinearMap:
    return LinearMap((random(WIDTH, RANK, seed=seed), random(RANK, WIDTH, seed=seed + 1)))


MAPS = [LinearMap.of(random(WIDTH, WIDTH, seed=7)), factored()]
each_map = pytest.mark.parametrize("linear", MAPS, ids=["whole", "factored"])


@each_map
def test_everything_it_does_follows_from_its_matrix(linear: LinearMap) -> None:
    M, change = linear.matrix, linear.matrix - EYE
    tokens, moment, other = random(5, WIDTH), random(WIDTH, WIDTH, seed=3), random(WIDTH, WIDTH, seed=4)
    assert linear.width == WIDTH
    torch.testing.assert_close(linear.change, change)
    torch.testing.assert_close(linear(tokens), tokens @ M.mT)
    torch.testing.assert_close(linear.moves(tokens), tokens @ change.mT)
    torch.testing.assert_close(linear.moved_moment(moment), change @ moment @ change.mT)
    assert linear.inner(other) == pytest.approx(float((change * other).sum()))


@each_map
@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0, 1.7])
def test_strength_scales_the_change(linear: LinearMap, strength: float) -> None:
    torch.testing.assert_close(linear.scaled(strength).matrix, EYE + strength * (linear.matrix - EYE))


@each_map
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_weight_is_edited_in_float64_in_its_first_columns(linear: LinearMap, dtype: torch.dtype) -> None:
    weight = random(9, WIDTH + 4).to(dtype)
    edited = linear.edit(weight)
    torch.testing.assert_close(edited[:, :WIDTH], weight[:, :WIDTH].double() @ linear.matrix)
    assert torch.equal(edited[:, WIDTH:], weight[:, WIDTH:].double())


@pytest.mark.parametrize("a", MAPS)
@pytest.mark.parametrize("b", [LinearMap.of(random(WIDTH, WIDTH, seed=8)), factored(5)])
def test_maps_compose_by_matrix_product(a: LinearMap, b: LinearMap) -> None:
    both = a @ b
    torch.testing.assert_close(both.matrix, a.matrix @ b.matrix)
    ranks = [len(each.factors[-1]) for each in (a, b)]
    assert len(both.factors[-1]) == (sum(ranks) if len(a.factors) == len(b.factors) == 2 else WIDTH)


@each_map
def test_the_svd_is_that_of_the_change(linear: LinearMap) -> None:
    U, S, Vt = linear.svd()
    torch.testing.assert_close((U * S) @ Vt, linear.change)
    torch.testing.assert_close(S, torch.linalg.svdvals(linear.change)[: len(S)])
    torch.testing.assert_close(U.mT @ U, torch.eye(len(S), dtype=torch.float64))


@each_map
def test_it_is_kept_in_any_dtype_and_knows_what_is_not_finite(linear: LinearMap) -> None:
    assert linear.to(torch.float64) is linear
    assert {factor.dtype for factor in linear.to(torch.float16).factors} == {torch.float16}
    assert linear.is_finite
    assert not linear.scaled(torch.inf).is_finite


@pytest.mark.parametrize("shapes", [[(3, 4)], [(3, 2), (3, 3)], [(3, 2), (2, 4)], [(3,)]])
def test_what_is_no_square_matrix_is_refused(shapes: list[tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match="square"):
        LinearMap(tuple(torch.zeros(shape) for shape in shapes))


def test_norm_is_the_largest_singular_value_of_the_change() -> None:
    whole = LinearMap.of(factored().change)
    expected = float(torch.linalg.matrix_norm(whole.change, 2))
    assert factored().norm == pytest.approx(expected, rel=1e-12)
    assert whole.norm == pytest.approx(expected, rel=1e-6)
    assert whole.scaled(-0.5).norm == pytest.approx(expected / 2, rel=1e-6)


def contracting(factored: bool) -> LinearMap:
    """Eigenvalues of M: -0.4, 0.1 twice turning, 0.3, 0.8, 1.3, and 1 six times."""
    change = torch.diag(torch.tensor([-1.4, -0.9, -0.9, -0.7, -0.2, 0.3], dtype=torch.float64))
    change[1, 2], change[2, 1] = 0.5, -0.5
    basis = random(WIDTH, WIDTH, seed=11)
    up, down = basis[:, :6] @ change, torch.linalg.inv(basis)[:6]
    return LinearMap((up, down)) if factored else LinearMap.of(up @ down)


@pytest.mark.parametrize("is_factored", [False, True])
@pytest.mark.parametrize(("least", "gone"), [(0.0, 1), (0.2, 3), (0.5, 4), (0.99, 5)])
def test_what_is_left_of_too_little_is_taken_away_and_nothing_else(
    is_factored: bool, least: float, gone: int
) -> None:
    linear = contracting(is_factored)
    deflated, count = linear.deflated(least)
    values, vectors = np.linalg.eig(linear.matrix.numpy())  # all of it, unlike there
    assert int((values.real < least).sum()) == count == gone
    expected = (vectors * np.where(values.real < least, 0, values)) @ np.linalg.inv(vectors)
    np.testing.assert_allclose(deflated.matrix.numpy(), expected.real, atol=1e-10)
    assert int(torch.linalg.matrix_rank(deflated.matrix, rtol=1e-9)) == WIDTH - gone
    assert len(deflated.factors) == len(linear.factors)


@pytest.mark.parametrize("is_factored", [False, True])
@pytest.mark.parametrize("least", [0.0, 0.3, 0.9])
def test_a_solved_map_is_deflated_as_by_all_eigenvectors_of_it(is_factored: bool, least: float) -> None:
    rows, ones = random(3, 15, 40, seed=21), torch.ones(15)
    fitter = MapFitter(40, 15, is_factored).update(rows[0], rows[1], ones)
    linear = fitter.solve(SecondMoment(40, 15).update(rows[2], ones).P, preserve=0.1, ridge=0.1).map
    deflated, count = linear.deflated(least)
    M = linear.matrix.numpy()
    values, vectors = np.linalg.eig(M)
    gone = values.real < least
    assert gone.sum() == count > 0
    projector = vectors[:, gone] @ np.linalg.inv(vectors)[gone]
    np.testing.assert_allclose(deflated.matrix.numpy(), (M - M @ projector).real, atol=1e-9)


@each_map
def test_nothing_is_taken_from_a_map_that_leaves_enough_everywhere(linear: LinearMap) -> None:
    weak = linear.scaled(0.01)
    torch.testing.assert_close(weak.deflated(0.5)[0].matrix, weak.matrix)
