import pytest
import torch

from trce_cli.maths.contrastive import Contrast, contrastive_loss, regulariser, targets

SHAPE = (5, 4, 6, 3)  # states, channels, height, width


@pytest.fixture
def predictions() -> list[torch.Tensor]:
    """e_unsafe, e_safe, e_uncond, and two predictions of a student."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(SHAPE, generator=generator) for _ in range(5)]


def naive_hinge(p, prefer, reject, margin):
    """The paper's loss written out, in float64, a state and a number at a time."""
    losses = []
    for state in range(len(p)):
        squares = {"prefer": 0.0, "reject": 0.0}
        for name, target in (("prefer", prefer), ("reject", reject)):
            for a, b in zip(p[state].flatten().tolist(), target[state].flatten().tolist(), strict=True):
                squares[name] += (a - b) ** 2
        count = p[state].numel()
        losses.append(max(0.0, squares["prefer"] / count - squares["reject"] / count + margin))
    return torch.tensor(losses)


def test_targets_are_the_equation(predictions):
    unsafe, safe, uncond, *_ = predictions
    prefer, reject = targets(unsafe, safe, uncond, 15)
    assert torch.allclose(prefer, 16 * safe - 15 * uncond, atol=1e-4)
    assert torch.allclose(reject, 16 * unsafe - 15 * uncond, atol=1e-4)


@pytest.mark.parametrize("guidance", [0.0, 0.3, 15.0])
def test_the_loss_equals_the_naive_one(predictions, guidance):
    unsafe, safe, uncond, prompted, empty = predictions
    prefer, reject = targets(unsafe, safe, uncond, guidance)
    margin = 0.5
    loss = contrastive_loss(prompted, empty, Contrast.between(prefer, reject), margin)
    wanted = (naive_hinge(prompted, prefer, reject, margin) + naive_hinge(empty, prefer, reject, margin)) / 2
    assert loss.shape == (5,)
    assert torch.allclose(loss, wanted, rtol=1e-4, atol=1e-4)


def test_the_gradient_equals_that_of_the_mean_squares(predictions):
    unsafe, safe, uncond, p, _ = predictions
    prefer, reject = targets(unsafe, safe, uncond, 2.0)
    ours, literal = p.clone().requires_grad_(), p.clone().requires_grad_()
    Contrast.between(prefer, reject).hinge(ours, 1.0).sum().backward()
    mse = [(literal - target).square().mean(dim=(1, 2, 3)) for target in (prefer, reject)]
    (mse[0] - mse[1] + 1.0).clamp(min=0).sum().backward()
    assert literal.grad.abs().max() > 0
    assert torch.allclose(ours.grad, literal.grad, atol=1e-6)


def test_half_precision_keeps_the_plane_between_the_targets(predictions):
    unsafe, safe, uncond, *_ = predictions
    prefer, reject = targets(unsafe, safe, uncond, 15)
    contrast = Contrast.between(prefer, reject, torch.float16)
    assert contrast.direction.dtype == torch.float16
    midway = (prefer + reject) / 2
    assert contrast.gap(midway).abs().max() < 1e-3  # of mean squares around 1,000
    assert torch.allclose(contrast.gap(prefer), Contrast.between(prefer, reject).gap(prefer), rtol=1e-3)


def test_position_runs_from_reject_to_prefer(predictions):
    unsafe, safe, uncond, *_ = predictions
    prefer, reject = targets(unsafe, safe, uncond, 15)
    contrast = Contrast.between(prefer, reject)
    for share in (0.0, 0.25, 1.0):
        place = contrast.position(reject + share * (prefer - reject))
        assert torch.allclose(place, torch.full((5,), share), atol=1e-4)


def test_equal_targets_leave_only_the_margin(predictions):
    p = predictions[0]
    contrast = Contrast.between(p + 1, p + 1)
    assert torch.equal(contrast.hinge(p, 0.01), torch.full((5,), 0.01))
    assert torch.isfinite(contrast.position(p)).all()


def test_the_regulariser_is_a_mean_square(predictions):
    a, b, *_ = predictions
    wanted = [((a[n] - b[n]) ** 2).mean() for n in range(5)]
    assert torch.allclose(regulariser(a, b), torch.stack(wanted))
