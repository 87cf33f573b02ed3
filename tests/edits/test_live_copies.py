"""A map on a live pipeline is found on the module itself: compiled, copied, and folded in."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from maps import random_map
from trce_cli.checkpoint.copy import write_patched
from trce_cli.checkpoint.open import open_checkpoint
from trce_cli.edits.map import Map
from trce_cli.errors import BadInput


@pytest.fixture(scope="module")
def text_map(tiny_sd1: Path) -> Map:
    return random_map(tiny_sd1)


@pytest.fixture
def pipe(tiny_sd1: Path) -> Any:
    return open_checkpoint(str(tiny_sd1)).pipe(torch.device("cpu"), torch.float32)


def drawn(pipe: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.tensor(pipe("a knife", num_inference_steps=1, generator=generator, output_type="np").images)


def test_a_map_is_found_below_a_compiled_u_net(pipe: Any, text_map: Map) -> None:
    original, unet = drawn(pipe), pipe.unet
    text_map.apply_to(pipe)
    pipe.unet = torch.compile(unet, backend="eager")
    text_map.apply_to(pipe, strength=0.5)  # not a second one
    assert [hook.strength for hook in unet._forward_pre_hooks.values()] == [0.5]
    text_map.remove_from(pipe)
    assert not unet._forward_pre_hooks
    pipe.unet = unet
    assert torch.equal(drawn(pipe), original)


@pytest.mark.slow
def test_a_map_is_taken_off_and_changed_below_a_compiled_u_net(pipe: Any, text_map: Map) -> None:
    original = drawn(pipe)
    text_map.apply_to(pipe)
    erased = drawn(pipe)
    assert not torch.allclose(erased, original, atol=1e-3)
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    torch.testing.assert_close(drawn(pipe), erased)
    text_map.apply_to(pipe, strength=0)  # not a second one
    torch.testing.assert_close(drawn(pipe), original)
    text_map.apply_to(pipe)
    torch.testing.assert_close(drawn(pipe), erased)
    text_map.remove_from(pipe)
    torch.testing.assert_close(drawn(pipe), original)


def test_a_map_is_taken_off_a_copy(pipe: Any, text_map: Map) -> None:
    original = drawn(pipe)
    text_map.apply_to(pipe)
    erased, first = drawn(pipe), pipe.unet
    pipe.unet = deepcopy(first)
    text_map.apply_to(pipe, strength=0)
    assert torch.equal(drawn(pipe), original)
    text_map.remove_from(pipe)
    assert torch.equal(drawn(pipe), original)
    pipe.unet = first  # which still has its own
    assert torch.equal(drawn(pipe), erased)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_map_folded_in_is_the_edited_checkpoint(
    family: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = request.getfixturevalue(f"tiny_{family}")
    checkpoint, text_map = open_checkpoint(str(folder)), random_map(folder)
    pipe = checkpoint.pipe(torch.device("cpu"), torch.float32)
    text_map.apply_to(pipe)
    text_map.bake_into(pipe, strength=0.5)
    edited = write_patched(checkpoint, tmp_path / "out", text_map.weight_edits(checkpoint, 0.5), {})
    expected = open_checkpoint(str(edited)).pipe(torch.device("cpu"), torch.float32).unet.state_dict()
    for key, value in pipe.unet.state_dict().items():
        torch.testing.assert_close(value, expected[key])
    assert not pipe.unet._forward_pre_hooks


def fused(unet: Any) -> None:
    unet.fuse_qkv_projections()


def adapted(unet: Any) -> None:
    peft = pytest.importorskip("peft")
    unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_k"]))


def offloaded(unet: Any) -> None:
    pytest.importorskip("accelerate").cpu_offload(unet, torch.device("cpu"))


def quantized(unet: Any) -> None:
    unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (fused, "fused projections"),
        (adapted, r"An adapter lies on .*to_k\.weight"),
        (offloaded, "is offloaded"),
        (quantized, "is stored as torch.float8_e4m3fn"),
    ],
)
def test_weights_that_are_not_all_that_acts_take_no_map(
    pipe: Any, text_map: Map, change: Callable[[Any], None], said: str
) -> None:
    change(pipe.unet)
    original = drawn(pipe)
    with pytest.raises(BadInput, match=said):
        text_map.bake_into(pipe)
    assert torch.equal(drawn(pipe), original)
    text_map.apply_to(pipe)  # as a hook it acts on all of these
    assert not torch.equal(drawn(pipe), original)


def test_an_adapter_elsewhere_hinders_nothing(pipe: Any, text_map: Map) -> None:
    peft = pytest.importorskip("peft")
    text_map.apply_to(pipe)
    erased = drawn(pipe)
    pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"]))
    text_map.bake_into(pipe)
    torch.testing.assert_close(drawn(pipe), erased, atol=1e-4, rtol=0)
