"""Maps and LoRAs: what they do to weights, their files, and files that are not what they claim to be."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import trce_cli
from maps import low_rank, random_map
from trce_cli import BadInput, Map, TrceError, load_map
from trce_cli.checkpoint.copy import write_patched
from trce_cli.checkpoint.open import open_checkpoint
from trce_cli.edits.edit import write_edit_file
from trce_cli.edits.factor import factor
from trce_cli.edits.files import combine, open_edit
from trce_cli.edits.lora import Lora
from trce_cli.edits.recover import recovered_map, since
from trce_cli.families.registry import FAMILIES
from trce_cli.families.sd.doors import POOLED_KEY
from trce_cli.maths.linear_map import LinearMap
from trce_cli.maths.low_rank import Size

KEYS = {family.key: family for family in FAMILIES}


def matrix(text_map: Map, stream: str = "context") -> torch.Tensor:
    return text_map.streams[stream].matrix


@pytest.fixture(scope="module")
def sd1_map(tiny_sd1: Path) -> Map:
    return random_map(tiny_sd1)


def test_the_python_names_are_there_and_import_nothing_heavy_before_they_are_used() -> None:
    import subprocess
    import sys

    code = (
        "import sys, trce_cli; print('torch' in sys.modules, trce_cli.Map.__name__, 'torch' in sys.modules)"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).split() == [
        "False",
        "Map",
        "True",
    ]
    assert all(getattr(trce_cli, name) for name in trce_cli.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        _ = trce_cli.nothing


# Maps


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_map_is_saved_and_loaded(family: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    text_map = random_map(request.getfixturevalue(f"tiny_{family}"))
    path = text_map.save(tmp_path / "edit.safetensors")
    loaded = load_map(path)
    assert loaded.made.family is text_map.made.family
    assert loaded.made.text_encoder == text_map.made.text_encoder
    assert json.loads(json.dumps(text_map.made.history)) == list(loaded.made.history)
    half = text_map.save(tmp_path / "half.safetensors", dtype="float16")
    assert loaded.streams.keys() == load_map(half).streams.keys() == text_map.streams.keys()
    assert ("pooled" in loaded.streams) == (family == "sdxl")
    for stream, linear in text_map.streams.items():
        assert torch.equal(loaded.streams[stream].change, linear.change.float().double())
        torch.testing.assert_close(load_map(half).streams[stream].change, linear.change, rtol=1e-3, atol=1e-6)
    assert half.stat().st_size < path.stat().st_size
    with safe_open(path, "pt") as file:  # other tools read it
        assert all("M" not in key and "change" in key for key in file.keys())  # noqa: SIM118


def test_a_factored_map_is_saved_loaded_and_applied_as_the_whole_one(tiny_sdxl: Path, tmp_path: Path) -> None:
    whole, checkpoint = random_map(tiny_sdxl), open_checkpoint(str(tiny_sdxl))
    factors = {}
    for stream, linear in whole.streams.items():
        U, S, Vt = linear.svd()
        factors[stream] = LinearMap((U[:, :3] * S[:3], Vt[:3]))
    path = Map(whole.made, factors).save(tmp_path / "edit.safetensors")
    with safe_open(path, "pt") as file:
        assert {*file.keys()} == {
            "trce_map.up",
            "trce_map.down",
            "trce_map.pooled_up",
            "trce_map.pooled_down",
        }
    loaded = load_map(path)
    assert [len(linear.factors) for linear in loaded.streams.values()] == [2, 2]
    ours, theirs = loaded.weight_edits(checkpoint, 0.7), whole.weight_edits(checkpoint, 0.7)
    assert ours.keys() == theirs.keys()
    for key in ours:
        weight = checkpoint.read("denoiser", key)
        torch.testing.assert_close(ours[key](weight), theirs[key](weight), rtol=1e-5, atol=1e-6)
    both = factor(checkpoint, ours, loaded.made, loaded.scaled(0.7), Size(energy=1))
    assert both.figures["shared_rank"] == 3
    change_header(path, lambda header: header["trce_map.up"].update(shape=[3, 64]))
    with pytest.raises(BadInput, match="no square matrix"):
        load_map(path)
    change_header(path, lambda header: header.pop("trce_map.pooled_up"))
    with pytest.raises(BadInput):
        load_map(path)


def test_a_map_takes_two_megabytes_for_sd1(sd1_map: Map, tmp_path: Path) -> None:
    wide = LinearMap.of(torch.zeros(768, 768, dtype=torch.float64))
    path = Map(sd1_map.made, {"context": wide}).save(tmp_path / "edit.safetensors")
    assert 768 * 768 * 4 < path.stat().st_size < 768 * 768 * 4 + 65536


def test_a_file_is_not_replaced_unasked(sd1_map: Map, tmp_path: Path) -> None:
    path = sd1_map.save(tmp_path / "edit.safetensors")
    with pytest.raises(BadInput, match="exists already"):
        sd1_map.save(path)
    assert sd1_map.save(path, dtype="float16", force=True) == path
    with pytest.raises(BadInput, match="must end in"):
        sd1_map.save(tmp_path / "edit.pt")
    with pytest.raises(TrceError, match="cannot hold"):
        sd1_map.scaled(1e8).save(tmp_path / "large.safetensors", dtype="float16")
    assert [file.name for file in tmp_path.iterdir()] == ["edit.safetensors"]


def test_maps_compose_by_matrix_product_in_the_order_of_the_edits(tiny_sd1: Path) -> None:
    a, b = random_map(tiny_sd1, 1), random_map(tiny_sd1, 2)
    torch.testing.assert_close(matrix(a @ b), matrix(a) @ matrix(b))
    assert (a @ b).made.history == a.made.history + b.made.history
    checkpoint = open_checkpoint(str(tiny_sd1))
    edits, joined = combine([a, b], checkpoint, strength=0.5)
    assert joined is not None
    key = checkpoint.door_weights()["context"][3]
    weight = checkpoint.read("denoiser", key).double()
    expected = weight @ matrix(a.scaled(0.5)) @ matrix(b.scaled(0.5))
    torch.testing.assert_close(edits[key](weight), expected)
    assert not torch.allclose(expected, weight @ matrix(b.scaled(0.5)) @ matrix(a.scaled(0.5)))


def test_maps_of_different_encoders_are_not_joined(tiny_sd1: Path, tiny_sd2: Path) -> None:
    a, b = random_map(tiny_sd1), random_map(tiny_sd2)
    with pytest.raises(BadInput, match="different text encoders"):
        a @ b


def test_pooled_changes_touch_the_pooled_columns_alone(tiny_sdxl: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_sdxl))
    text_map = random_map(tiny_sdxl)
    edits = text_map.weight_edits(checkpoint)
    assert edits.keys() == {*checkpoint.door_weights()["context"], POOLED_KEY}
    weight = checkpoint.read("denoiser", POOLED_KEY).double()
    edited = edits[POOLED_KEY](weight)
    torch.testing.assert_close(edited[:, :40], weight[:, :40] @ matrix(text_map, "pooled"))
    assert torch.equal(edited[:, 40:], weight[:, 40:])
    one = random_map(tiny_sdxl, pooled=False)
    assert POOLED_KEY not in one.weight_edits(checkpoint)
    assert torch.equal(matrix(one @ text_map, "pooled"), matrix(text_map, "pooled"))


@pytest.mark.parametrize("strength", [-0.1, float("nan"), float("inf")])
def test_strengths_make_sense(sd1_map: Map, strength: float) -> None:
    with pytest.raises(BadInput, match="strength must be finite"):
        sd1_map.scaled(strength)


def test_strength_nought_changes_nothing_and_two_goes_beyond(sd1_map: Map, tiny_sd1: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_sd1))
    key = checkpoint.door_weights()["context"][0]
    weight = checkpoint.read("denoiser", key)
    assert torch.equal(sd1_map.weight_edits(checkpoint, 0.0)[key](weight).float(), weight)
    full, twice = (sd1_map.weight_edits(checkpoint, s)[key](weight) for s in (1.0, 2.0))
    torch.testing.assert_close(twice - weight, 2 * (full - weight))


def change_header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def drop(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda header: header["__metadata__"].pop(name)


def put(name: str, value: str) -> Callable[[dict[str, Any]], None]:
    return lambda header: header["__metadata__"].update({name: value})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (drop("trce_text_encoder"), "does not say"),
        (put("trce_text_encoder", "0" * 63 + "g"), "does not say"),
        (put("trce_family", "sd9"), "does not say"),
        (drop("trce_form"), "does not say"),
        (put("trce", "[]"), "cannot be read"),
        (put("trce", '{"schema": 1, "history": [{"edit": "map"}]}'), "cannot be read"),
        (put("trce", "[" * 100_000), "cannot be read"),
        (lambda header: header["trce_map.change"].update(shape=[512, 2]), "no square matrix"),
        (lambda header: header["trce_map.change"].update(shape=[2048], dtype="BF16"), "no square matrix"),
        (lambda header: header["trce_map.change"].update(dtype="I32"), "no square matrix"),
        (lambda header: header.update({"trce_map.other": header.pop("trce_map.change")}), "does not hold"),
        (lambda header: header["trce_map.change"].update(shape=[32, 33]), "not a valid safetensors"),
    ],
)
def test_a_hostile_map_is_refused_in_one_sentence(
    sd1_map: Map, tmp_path: Path, change: Callable[[dict[str, Any]], None], said: str
) -> None:
    path = sd1_map.save(tmp_path / "edit.safetensors")
    change_header(path, change)
    with pytest.raises(BadInput, match=said) as caught:
        load_map(path)
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 500


def test_other_broken_files_are_refused(sd1_map: Map, tiny_sd1: Path, tmp_path: Path) -> None:
    path = sd1_map.save(tmp_path / "edit.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:-5])
    torch.save({"a": torch.zeros(2)}, tmp_path / "pickle.safetensors")
    torch.save({"a": torch.zeros(2)}, tmp_path / "pickle.pt")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    save_file({"trce_map.change": torch.full((4, 4), torch.nan)}, tmp_path / "nan.safetensors")
    change_header(tmp_path / "nan.safetensors", lambda header: header.update(__metadata__=None))
    for name in ("cut.safetensors", "pickle.safetensors", "pickle.pt", "empty.safetensors", "absent", ""):
        with pytest.raises(BadInput):
            open_edit(tmp_path / name)
    with pytest.raises(BadInput, match="neither a map nor a LoRA"):
        open_edit(tiny_sd1 / "vae/diffusion_pytorch_model.safetensors")
    bad = Map(sd1_map.made, {"context": LinearMap.of(torch.ones(32, 32, dtype=torch.float64))})
    raw = bytearray(bad.save(tmp_path / "bad.safetensors").read_bytes())
    raw[-4:] = torch.tensor(torch.nan).numpy().tobytes()
    (tmp_path / "bad.safetensors").write_bytes(raw)
    with pytest.raises(BadInput, match="NaN"):
        load_map(tmp_path / "bad.safetensors")


# LoRAs


def lora_of(
    text_map: Map, folder: Path, path: Path, size: Size, **options: Any
) -> tuple[Lora, dict[str, Any]]:
    checkpoint = open_checkpoint(str(folder))
    made = factor(checkpoint, text_map.weight_edits(checkpoint), text_map.made, text_map, size, **options)
    write_edit_file(path, made.tensors, made.metadata)
    edit = open_edit(path)
    assert isinstance(edit, Lora)
    return edit, dict(made.figures)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_lora_of_full_rank_is_the_map(
    family: str, dtype: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = request.getfixturevalue(f"tiny_{family}")
    checkpoint = open_checkpoint(str(folder))
    text_map = random_map(folder)
    lora, figures = lora_of(text_map, folder, tmp_path / "lora.safetensors", Size(energy=1), dtype=dtype)
    tolerance = 1e-6 if dtype == "float32" else 1e-3
    assert figures["shared_rank"] == figures["max_rank"] == 3
    assert figures["truncation_error"]["change"]["max"] < tolerance
    assert figures["left_out"] == []
    ours, theirs = text_map.weight_edits(checkpoint), lora.weight_edits(checkpoint)
    assert ours.keys() == theirs.keys()
    for key in ours:
        weight = checkpoint.read("denoiser", key).double()
        torch.testing.assert_close(theirs[key](weight), ours[key](weight), rtol=tolerance, atol=tolerance)


def test_the_factors_of_a_lora_come_from_one_svd_of_the_change(
    sd1_map: Map, tiny_sd1: Path, tmp_path: Path
) -> None:
    lora_of(sd1_map, tiny_sd1, tmp_path / "lora.safetensors", Size(rank=2))
    tensors = load_file(tmp_path / "lora.safetensors")
    _, _, Vt = torch.linalg.svd(sd1_map.streams["context"].change)
    downs = {key: value for key, value in tensors.items() if key.endswith("lora_down.weight")}
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    assert len(downs) == 32
    assert f"{name}.lora_down.weight" in downs
    assert all(torch.equal(value, Vt[:2].float()) for value in downs.values())
    assert float(tensors[f"{name}.alpha"]) == 2
    with safe_open(tmp_path / "lora.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_network_module"] == "networks.lora"
    assert metadata["ss_network_dim"] == "2"
    assert metadata["ss_base_model_version"] == "sd_v1"


def test_the_error_is_that_of_the_best_approximation_and_falls_with_the_rank(
    sd1_map: Map, tiny_sd1: Path, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(str(tiny_sd1))
    lora, figures = lora_of(sd1_map, tiny_sd1, tmp_path / "2.safetensors", Size(rank=2))
    error = figures["truncation_error"]
    found: dict[str, list[float]] = {"change": [], "weights": []}
    ours, theirs = sd1_map.weight_edits(checkpoint), lora.weight_edits(checkpoint)
    for key in ours:
        weight = checkpoint.read("denoiser", key).double()
        wanted, got = ours[key](weight), theirs[key](weight)
        found["change"].append(float((got - wanted).norm() / (wanted - weight).norm()))
        found["weights"].append(float((got - wanted).norm() / wanted.norm()))
    for of, values in found.items():
        assert max(values) == pytest.approx(error[of]["max"], rel=1e-4)
        assert sum(values) / len(values) == pytest.approx(error[of]["mean"], rel=1e-4)
    _, first = lora_of(sd1_map, tiny_sd1, tmp_path / "1.safetensors", Size(rank=1))
    assert first["truncation_error"]["change"]["max"] > error["change"]["max"] > 0.01
    assert first["shared_energy"] < figures["shared_energy"] < 1


def test_the_energy_chooses_the_rank() -> None:
    values = torch.tensor([3.0, 1.0, 1.0, 0.0], dtype=torch.float64)  # squares 9, 1, 1
    assert [Size(energy=e).of(values) for e in (0.5, 0.8, 0.9, 0.95, 1.0)] == [1, 1, 2, 3, 3]
    assert [Size(rank=r).of(values) for r in (1, 2, 9)] == [1, 2, 3]
    assert Size().of(torch.zeros(3, dtype=torch.float64)) == 1
    for wrong in ({"rank": 0}, {"energy": 0.0}, {"energy": 1.5}, {"energy": float("nan")}):
        with pytest.raises(BadInput):
            Size(**wrong)  # type: ignore[arg-type]


def test_other_changed_weights_have_factors_of_their_own_in_the_same_file(
    sd1_map: Map, tiny_sd1: Path, tmp_path: Path
) -> None:
    """What stage 2 does: queries and self-attention change, by anything of any rank."""
    checkpoint = open_checkpoint(str(tiny_sd1))
    block = "mid_block.attentions.0.transformer_blocks.0."
    tuned = {
        f"{block}attn1.to_q.weight": low_rank(16, 2, 5),
        f"{block}attn1.to_out.0.weight": low_rank(16, 16, 6),
        f"{block}attn2.to_q.weight": low_rank(16, 5, 7),
        f"{block}attn1.to_out.0.bias": torch.ones(16, dtype=torch.float64),
        f"{block}attn1.to_k.weight": torch.zeros(16, 16, dtype=torch.float64),
    }
    edits = sd1_map.weight_edits(checkpoint)
    edits |= {key: partial(torch.add, change) for key, change in tuned.items()}
    made = factor(checkpoint, edits, sd1_map.made, sd1_map, Size(energy=1))
    write_edit_file(tmp_path / "lora.safetensors", made.tensors, made.metadata)
    assert made.figures["left_out"] == [f"{block}attn1.to_out.0.bias"]
    assert (made.figures["shared_rank"], made.figures["max_rank"]) == (3, 16)
    assert made.figures["truncation_error"]["change"]["max"] < 1e-6
    lora = open_edit(tmp_path / "lora.safetensors").weight_edits(checkpoint)
    assert f"{block}attn1.to_k.weight" not in lora  # not changed
    for key in lora:
        weight = checkpoint.read("denoiser", key).double()
        torch.testing.assert_close(lora[key](weight), edits[key](weight), rtol=1e-5, atol=1e-6)


def test_a_lora_of_both_stages_is_found_from_the_weights(
    sd1_map: Map, tiny_sd1: Path, tmp_path: Path
) -> None:
    """Stage 1 is in the checkpoint already, stage 2 comes on top; the LoRA is for the original."""
    original = open_checkpoint(str(tiny_sd1))
    mapped = open_checkpoint(
        str(write_patched(original, tmp_path / "mapped", sd1_map.weight_edits(original), {}))
    )
    found = recovered_map(original, mapped, sd1_map.made, ["context"])
    torch.testing.assert_close(matrix(found), matrix(sd1_map), rtol=1e-4, atol=1e-5)
    query = "mid_block.attentions.0.transformer_blocks.0.attn2.to_q.weight"
    change = low_rank(16, 4, 9)
    edits, text_map = since(original, mapped, {query: partial(torch.add, change)}, sd1_map.made)
    made = factor(original, edits, sd1_map.made, text_map, Size(energy=0.99999))
    assert (made.figures["shared_rank"], made.figures["max_rank"], made.figures["layers"]) == (3, 4, 33)
    write_edit_file(tmp_path / "lora.safetensors", made.tensors, made.metadata)
    lora = open_edit(tmp_path / "lora.safetensors").weight_edits(original)
    assert lora.keys() == {query, *original.door_weights()["context"]}
    for key, edit in lora.items():
        wanted = mapped.read("denoiser", key).double() + (change if key == query else 0)
        torch.testing.assert_close(edit(original.read("denoiser", key)), wanted, rtol=1e-3, atol=1e-4)
    nothing, none = since(original, original, {}, sd1_map.made)
    assert none is None
    with pytest.raises(TrceError, match="changes no weight"):
        factor(original, nothing, sd1_map.made, none, Size())


def test_loras_of_other_tools_are_read(tiny_sdxl: Path, tmp_path: Path) -> None:
    """Either spelling of the layers, alpha other than the rank or absent."""
    checkpoint = open_checkpoint(str(tiny_sdxl))
    key = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    rows, columns = checkpoint.shape("denoiser", key)
    up, down = torch.randn(rows, 2), torch.randn(2, columns)
    for name, alpha in (
        ("lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k", 1.0),
        ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k", None),
    ):
        tensors = {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
        save_file(tensors, tmp_path / "lora.safetensors")
        edit = open_edit(tmp_path / "lora.safetensors")
        assert edit.made is None
        (found,) = edit.weight_edits(checkpoint, 0.5).items()
        weight = checkpoint.read("denoiser", key).double()
        scale = 0.5 if alpha is None else 0.25
        assert found[0] == key
        torch.testing.assert_close(found[1](weight), weight + scale * up.double() @ down.double())


def test_convolutions_of_1_x_1_are_linear(tiny_sd1: Path, tmp_path: Path) -> None:
    """proj_in and proj_out of SD 1.x, which nearly every LoRA for it has."""
    checkpoint = open_checkpoint(str(tiny_sd1))
    key = "down_blocks.0.attentions.0.proj_in.weight"
    rows, columns, *ones = checkpoint.shape("denoiser", key)
    assert ones == [1, 1]
    name = "lora_unet_down_blocks_0_attentions_0_proj_in"
    up, down = torch.randn(rows, 2, 1, 1), torch.randn(2, columns, 1, 1)
    tensors = {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}
    save_file(tensors, tmp_path / "lora.safetensors")
    (found,) = open_edit(tmp_path / "lora.safetensors").weight_edits(checkpoint, 0.5).items()
    weight = checkpoint.read("denoiser", key)
    pixels = torch.randn(1, columns, 3, 3, dtype=torch.float64)
    added = torch.conv2d(torch.conv2d(pixels, down.double()), up.double())
    expected = torch.conv2d(pixels, weight.double()) + 0.5 * added
    torch.testing.assert_close(torch.conv2d(pixels, found[1](weight)), expected)


LAYER = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({f"{LAYER}.lora_up.weight": (16, 2)}, "without"),
        ({f"{LAYER}.alpha": ()}, "without factors"),
        ({f"{LAYER}.lora_up.weight": (16, 2), f"{LAYER}.lora_down.weight": (3, 32)}, "no factor"),
        ({f"{LAYER}.lora_up.weight": (16, 0), f"{LAYER}.lora_down.weight": (0, 32)}, "no factor"),
        ({f"{LAYER}.lora_up.weight": (16, 2, 1), f"{LAYER}.lora_down.weight": (2, 32, 1)}, "no factor"),
        (
            {f"{LAYER}.lora_up.weight": (16, 2), f"{LAYER}.lora_down.weight": (2, 33)},
            "is for weights of 16 x 33",
        ),
        (
            {"lora_unet_other.lora_up.weight": (16, 2), "lora_unet_other.lora_down.weight": (2, 32)},
            "not have",
        ),
        ({"lora_te_text_model_x.lora_up.weight": (16, 2)}, "text encoder"),
        ({f"{LAYER}.hada_w1_a": (2, 2)}, "without"),
        ({f"{LAYER}.lokr_w1": (2, 2)}, "without"),
        ({f"{LAYER}.dora_scale": (2, 2)}, "without factors"),
        ({"unet.mid_block.lora_A.weight": (2, 2)}, "without"),
        ({f"{LAYER}.oft_blocks": (2, 2, 2)}, "is OFT"),
        ({f"{LAYER}.lora_up.weight": (16, 2, 3, 3), f"{LAYER}.lora_down.weight": (2, 32, 1, 1)}, "no factor"),
    ],
)
def test_loras_that_do_not_fit_are_refused(
    tiny_sd1: Path, tmp_path: Path, tensors: dict[str, tuple[int, ...]], said: str
) -> None:
    path = tmp_path / "lora.safetensors"
    save_file({name: torch.ones(shape) for name, shape in tensors.items()}, path)
    with pytest.raises(BadInput, match=said):
        open_edit(path).weight_edits(open_checkpoint(str(tiny_sd1)))


def test_a_lora_with_nan_is_refused(tiny_sd1: Path, tmp_path: Path) -> None:
    tensors = {f"{LAYER}.lora_up.weight": torch.full((16, 2), torch.nan)}
    save_file(tensors | {f"{LAYER}.lora_down.weight": torch.ones(2, 32)}, tmp_path / "lora.safetensors")
    checkpoint = open_checkpoint(str(tiny_sd1))
    (edit,) = open_edit(tmp_path / "lora.safetensors").weight_edits(checkpoint).values()
    with pytest.raises(BadInput, match="NaN"):
        edit(torch.ones(16, 32))
