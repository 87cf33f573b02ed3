"""LoRAs of other trainers against PEFT's own merge, and against their formulas in numpy."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from trce_cli.checkpoint.checkpoint import Checkpoint
from trce_cli.checkpoint.open import open_checkpoint
from trce_cli.edits.files import open_edit
from trce_cli.errors import BadInput

KEY = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
CONV = "down_blocks.0.resnets.0.conv1.weight"
PLACES = {
    KEY: "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k",
    CONV: "lora_unet_down_blocks_0_resnets_0_conv1",
}
random = np.random.default_rng(0)


@pytest.fixture
def checkpoint(tiny_sd1: Path) -> Checkpoint:
    return open_checkpoint(str(tiny_sd1))


def config(kind: str) -> Any:
    import peft

    targets = ["attn2.to_k", "proj_in", "conv1", "to_out.0"]
    if kind == "LoHa":
        return peft.LoHaConfig(r=2, alpha=3, target_modules=targets)
    if kind == "LoKr":
        return peft.LoKrConfig(r=2, alpha=3, target_modules=targets, decompose_both=True, decompose_factor=4)
    options = {"LoRA": {}, "DoRA": {"use_dora": True}, "rsLoRA": {"use_rslora": True}}[kind]
    return peft.LoraConfig(r=2, lora_alpha=3, target_modules=targets, **options)


@pytest.mark.parametrize("kind", ["LoRA", "rsLoRA", "DoRA", "LoHa", "LoKr"])
def test_what_peft_saves_is_what_peft_merges(kind: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    import peft
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(checkpoint.path / "unet").double()
    torch.manual_seed(0)
    model = peft.get_peft_model(unet, config(kind))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if any(part in name for part in ("lora_", "hada_", "lokr_")):
                weight.add_(0.1 * torch.randn_like(weight))
    model.save_pretrained(tmp_path)
    edits = open_edit(tmp_path / "adapter_model.safetensors").weight_edits(checkpoint)
    merged = model.merge_and_unload().state_dict()
    assert len(edits) > 20
    for key, edit in edits.items():
        weight = checkpoint.read("denoiser", key)
        assert not torch.allclose(edit(weight), weight.double(), atol=1e-4), key
        torch.testing.assert_close(edit(weight), merged[key], rtol=1e-5, atol=1e-7)
    assert all(
        torch.equal(merged[key].float(), checkpoint.read("denoiser", key))
        for key in merged.keys() - edits.keys()
    )


def test_diffusers_names_are_those_of_the_path(checkpoint: Checkpoint, tmp_path: Path) -> None:
    rows, columns = checkpoint.shape("denoiser", KEY)
    up, down = random.normal(size=(rows, 2)), random.normal(size=(2, columns))
    start, weight = f"unet.{KEY.removesuffix('.weight')}", checkpoint.read("denoiser", KEY)
    told = {"unet.lora_alpha": 6, "unet.r": 2}
    for names, metadata, scale in (
        (("lora_A", "lora_B"), {"lora_adapter_metadata": json.dumps(told)}, 3),
        (("lora_A", "lora_B"), {}, 1),
        (("lora.down", "lora.up"), {}, 1),
    ):
        tensors = dict(zip((f"{start}.{name}.weight" for name in names), (down, up), strict=True))
        found = applied(checkpoint, tmp_path, KEY, tensors, metadata)
        np.testing.assert_allclose(found, weight.double().numpy() + scale * up @ down)


OUT = "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0.weight"


@pytest.mark.parametrize("before", ["", "unet.", "diffusion_model.", "base_model.model."])
@pytest.mark.parametrize(
    "names",
    [
        ("{}.lora_A.default.weight", "{}.lora_B.default.weight"),
        ("{}.lora_down.weight", "{}.lora_up.weight"),
        ("{}_lora.down.weight", "{}_lora.up.weight"),  # of attention processors
        ("{}.lora_A", "{}.lora_B"),
        ("{}.lora_linear_layer.down.weight", "{}.lora_linear_layer.up.weight"),
    ],
)
@pytest.mark.parametrize("key", [KEY, OUT])
def test_other_spellings_are_of_the_same_layer(
    before: str, names: tuple[str, str], key: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    layer = before + key.removesuffix(".weight")
    if "_lora." in names[0]:
        layer = layer.removesuffix(".0").replace(".to_", ".processor.to_")
    rows, columns = checkpoint.shape("denoiser", key)
    factors = torch.randn(2, columns), torch.randn(rows, 2)
    tensors = dict(zip((name.format(layer) for name in names), factors, strict=True))
    save_file(tensors, tmp_path / "lora.safetensors")
    ((found, edit),) = open_edit(tmp_path / "lora.safetensors").weight_edits(checkpoint).items()
    assert found == key
    weight = checkpoint.read("denoiser", key)
    torch.testing.assert_close(edit(weight), weight.double() + factors[1].double() @ factors[0].double())


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("lora_unet_x.a1.weight", "is a GLoRA"),
        ("lora_unet_x.oft_blocks", "is OFT"),
        ("base_model.model.x.oft_R.weight", "is OFT"),
        ("lora_unet_x.on_input", "is IA3"),
        ("base_model.model.x.vera_lambda_b", "is VeRA"),
        ("double_blocks.0.processor.qkv_lora1.down.weight", "of XLabs' processors"),
        ("lora_unet_x.diff", "whole differences"),
        ("lora_unet_x.w_norm", "whole differences"),
        ("unet.x.lora_B.bias", r"is a LoRA with unet\.x\.lora_B\.bias, which cannot be applied"),
        ("bundle_emb.x.clip_l", r"is a LoRA with bundle_emb\.x\.clip_l"),
        ("model.diffusion_model.x.weight", r"is a LoRA with model\.diffusion_model\.x"),
    ],
)
def test_what_cannot_be_applied_is_told_by_its_name(name: str, said: str, tmp_path: Path) -> None:
    lora = {f"unet.{KEY.removesuffix('.weight')}.lora_{part}.weight": torch.ones(1, 1) for part in "AB"}
    save_file({**lora, name: torch.ones(1)}, tmp_path / "lora.safetensors")
    with pytest.raises(BadInput, match=said):
        open_edit(tmp_path / "lora.safetensors")


def applied(
    checkpoint: Checkpoint,
    folder: Path,
    key: str,
    tensors: dict[str, np.ndarray],
    metadata: dict[str, str] | None = None,
    strength: float = 1.0,
) -> np.ndarray:
    """The weight with the adapter in tensors, which are named in full or by their part of the layer."""
    named = {name if "unet." in name else f"{PLACES[key]}.{name}": value for name, value in tensors.items()}
    state = {name: torch.tensor(value, dtype=torch.float64) for name, value in named.items()}
    save_file(state, folder / "adapter.safetensors", metadata=metadata)
    (found,) = open_edit(folder / "adapter.safetensors").weight_edits(checkpoint, strength).items()
    assert found[0] == key
    return found[1](checkpoint.read("denoiser", key)).numpy()


def factors(**shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    return {name: random.normal(size=shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("core", [False, True])
def test_convolutions_of_every_kind(core: bool, checkpoint: Checkpoint, tmp_path: Path) -> None:
    """LyCORIS's formulas, index by index."""
    out, into, height, width = shape = checkpoint.shape("denoiser", CONV)
    weight = checkpoint.read("denoiser", CONV).double().numpy()
    if core:
        t = factors(up=(out, 2, 1, 1), down=(3, into, 1, 1), mid=(2, 3, height, width))
        change = np.zeros(shape)
        for n in range(2):
            for m in range(3):
                change += (
                    t["mid"][n, m]
                    * t["up"][:, n, 0, 0][:, None, None, None]
                    * t["down"][m, :, 0, 0][:, None, None]
                )
    else:
        t = factors(up=(out, 2, 1, 1), down=(2, into, height, width))
        change = sum(t["up"][:, n][..., None] * t["down"][n] for n in range(2))
    found = applied(checkpoint, tmp_path, CONV, {f"lora_{name}.weight": value for name, value in t.items()})
    np.testing.assert_allclose(found, weight + change)

    wide = (2, into * height * width)
    t = factors(w1_a=(out, 2), w1_b=wide, w2_a=(out, 2), w2_b=wide)
    change = (t["w1_a"] @ t["w1_b"]) * (t["w2_a"] @ t["w2_b"])
    if core:
        t = factors(w1_a=(2, out), w1_b=(2, into), w2_a=(2, out), w2_b=(2, into))
        t |= factors(t1=(2, 2, height, width), t2=(2, 2, height, width))
        change = np.ones(shape)
        for number in (1, 2):
            a, b, kernel = t[f"w{number}_a"], t[f"w{number}_b"], t[f"t{number}"]
            change *= sum(
                kernel[i, j] * a[i][:, None, None, None] * b[j][:, None, None]
                for i in range(2)
                for j in range(2)
            )
    tensors = {f"hada_{name}": value for name, value in t.items()} | {"alpha": np.array(1.0)}
    found = applied(checkpoint, tmp_path, CONV, tensors)
    np.testing.assert_allclose(found, weight + change.reshape(shape) / 2)

    t = factors(w1=(2, 2), w2=(out // 2, into // 2, height, width))
    change = np.kron(t["w1"][..., None, None], t["w2"])
    if core:
        t = factors(w1=(2, 2), w2_a=(3, out // 2), w2_b=(3, into // 2), t2=(3, 3, height, width))
        second = sum(
            t["t2"][i, j] * t["w2_a"][i][:, None, None, None] * t["w2_b"][j][:, None, None]
            for i in range(3)
            for j in range(3)
        )
        change = np.kron(t["w1"][..., None, None], second)
    tensors = {f"lokr_{name}": value for name, value in t.items()} | {"alpha": np.array(6.0)}
    found = applied(checkpoint, tmp_path, CONV, tensors)
    np.testing.assert_allclose(
        found, weight + change * (2 if core else 1)
    )  # without a rank alpha says nothing


@pytest.mark.parametrize("by_rows", [True, False])
def test_a_dora_is_rescaled(by_rows: bool, checkpoint: Checkpoint, tmp_path: Path) -> None:
    rows, columns = checkpoint.shape("denoiser", KEY)
    weight = checkpoint.read("denoiser", KEY).double().numpy()
    tensors = factors(up=(rows, 2), down=(2, columns))
    magnitude = random.uniform(1, 2, size=(rows, 1) if by_rows else (1, columns))
    wanted = weight + tensors["up"] @ tensors["down"]
    wanted = magnitude * wanted / np.linalg.norm(wanted, axis=1 if by_rows else 0, keepdims=True)
    named = {f"lora_{name}.weight": value for name, value in tensors.items()} | {"dora_scale": magnitude}
    for strength in (1.0, 0.3):
        found = applied(checkpoint, tmp_path, KEY, named, strength=strength)
        np.testing.assert_allclose(found, weight + strength * (wanted - weight))


def test_a_peft_lora_goes_through_the_command(tiny_sd1: Path, tmp_path: Path, trce: Any) -> None:
    state = load_file(tiny_sd1 / "unet/diffusion_pytorch_model.safetensors")
    start = f"unet.{KEY.removesuffix('.weight')}"
    rows, columns = state[KEY].shape
    lora = {f"{start}.lora_A.weight": torch.ones(1, columns), f"{start}.lora_B.weight": torch.ones(rows, 1)}
    save_file(lora, tmp_path / "lora.safetensors")
    out = tmp_path / "out"
    outcome = trce("apply", tmp_path / "lora.safetensors", tiny_sd1, "-o", out, "--allow-other-text-encoder")
    assert outcome.status == 0, outcome.err
    found = load_file(out / "unet/diffusion_pytorch_model.safetensors")
    torch.testing.assert_close(found[KEY], state[KEY] + 1)
