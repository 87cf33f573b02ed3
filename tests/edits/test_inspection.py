"""`trce inspect` and `trce diff` on every layout."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from trce_cli.checkpoint.copy import write_patched
from trce_cli.checkpoint.open import open_checkpoint
from trce_cli.checkpoint.provenance import history, provenance_files, record
from trce_cli.edits import inspection
from trce_cli.edits.edit import Made
from trce_cli.edits.inspection import compare, describe, readers
from trce_cli.edits.map import Map
from trce_cli.errors import TrceError
from trce_cli.maths.linear_map import LinearMap

PLAIN = "unet/diffusion_pytorch_model.safetensors"
KEY = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"


@pytest.fixture
def edited(tiny_sd1: Path, tmp_path: Path) -> Path:
    checkpoint = open_checkpoint(str(tiny_sd1))
    files = provenance_files(
        checkpoint, record("map", checkpoint, [], {"preserve": 1.0}, {}, 1.0, checkpoint.hashes())
    )
    return write_patched(checkpoint, tmp_path / "edited", {KEY: lambda weight: weight * 1.5}, files)


def test_a_folder_is_described(tiny_sdxl: Path) -> None:
    found = describe(str(tiny_sdxl))
    assert found["kind"] == "checkpoint"
    assert (found["family"], found["layout"], found["dtype"]) == ("SDXL", "diffusers", "F32")
    assert found["pipeline"] == "StableDiffusionXLPipeline"
    assert found["doors"] == {"keys": 17, "values": 17, "add_embedding": 1}
    assert found["widths"] == {"context": 64, "pooled": 40}
    assert found["unet_parameters"] == sum(value.numel() for value in load_file(tiny_sdxl / PLAIN).values())
    assert found["bytes"] == sum(path.stat().st_size for path in tiny_sdxl.rglob("*") if path.is_file())
    assert found["text_encoder"] == open_checkpoint(str(tiny_sdxl)).text_encoder_hash()
    assert found["history"] == []


def test_a_folder_names_its_class_be_it_known_or_not(tmp_path: Path, trce) -> None:
    folder = tiny.build_flux(tmp_path / "flux")
    assert "FluxPipeline" in trce("inspect", folder).out
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("FluxPipeline", "ElsewherePipeline"))
    told = trce("inspect", folder)
    assert (told.status, "its pipeline is ElsewherePipeline" in told.err) == (2, True)


def test_inspect_shows_the_edits(edited: Path, trce) -> None:
    shown = trce("inspect", edited)
    assert shown.status == 0
    assert "SD 1.x" in shown.out
    assert "edits, oldest first" in shown.out
    found = json.loads(trce("inspect", edited, "--json").out)
    assert [entry["edit"] for entry in found["history"]] == ["map"]
    assert trce("inspect", edited, "--quiet").out == shown.out  # the answer is what was asked for


def test_a_single_file_of_an_embedded_checkpoint_needs_no_config(trce, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    few = ("-p", "weapons", "--word-share", "0", "-o")
    told = trce("map", "emoji", *few, "one.safetensors")
    assert "Next: trce generate one.safetensors 'a weapon' --compare emoji --output one-images\n" in told.err
    found = json.loads(trce("inspect", "one.safetensors", "--json").out)
    assert (found["kind"], found["layout"]) == ("checkpoint", "single-file")
    assert open_checkpoint("one.safetensors", config="emoji").path == Path("one.safetensors")


def test_a_single_file_of_a_small_base_tells_its_history_and_what_it_needs(
    edited: Path, tiny_sd1: Path, trce, tmp_path: Path
) -> None:
    one = tmp_path / "one.safetensors"
    told = trce("map", edited, "-p", "weapons", "--word-share", "0", "--max-collateral", "9", "-o", one)
    assert f"--output {tmp_path}/one-images --config {edited}\n" in told.err
    found = json.loads(trce("inspect", one, "--json").out)
    assert found["kind"] == "no checkpoint that can be opened"
    assert "--config" in found["why"]
    assert [entry["edit"] for entry in found["history"]] == ["map", "map"]
    assert "trce" not in found["metadata"]


def test_other_files_are_described_as_what_they_are(tmp_path: Path, trce) -> None:
    path = tmp_path / "lora.safetensors"
    save_file({"lora_unet_mid_block.alpha": torch.ones(1)}, path, metadata={"title": "A LoRA"})
    found = json.loads(trce("inspect", path, "--json").out)
    assert found["kind"] == "a LoRA"
    assert found["metadata"] == {"title": "A LoRA"}
    assert trce("inspect", path).status == 0
    path.write_bytes(b"nothing")
    assert trce("inspect", path).status == 2


@pytest.mark.parametrize(
    "start",
    [
        "controlnet_cond_embedding.conv_in.weight",
        "control_model.time_embed.0.bias",
        "input_hint_block.0.weight",
    ],
)
def test_a_controlnet_is_called_one(start: str, tmp_path: Path, trce) -> None:
    path = tmp_path / "control.safetensors"
    save_file({start: torch.ones(1), "down_blocks.0.attentions.0.norm.weight": torch.ones(1)}, path)
    found = json.loads(trce("inspect", path, "--json").out)
    assert found["kind"] == "a ControlNet"
    assert "by weights of its own" in found["remarks"][0]


def test_what_is_no_checkpoint_is_named(tmp_path: Path, trce) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"double_blocks.0.img_attn.proj.weight": torch.ones(2)}, path)
    found = json.loads(trce("inspect", path, "--json").out)
    assert (found["kind"], found["tensors"]) == ("no checkpoint that can be opened", 1)
    assert "family that is not known" in found["why"]
    assert "it has no" not in found["why"]  # of every family

    for key, kind in (("emb_params", "a textual inversion embedding"), ("ip_adapter.1.w", "an IP-Adapter")):
        save_file({key: torch.ones(2)}, path)
        assert json.loads(trce("inspect", path, "--json").out)["kind"] == kind

    path.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 4265380512\n")
    for told in (trce("inspect", path), trce("apply", path, "emoji", "-o", tmp_path / "out")):
        assert told.status == 2
        assert "is a Git LFS pointer" in told.err
        assert "git lfs pull" in told.err

    (tmp_path / "config.json").write_text('{"_class_name": "ControlNetModel"}')
    told = trce("inspect", tmp_path)
    assert told.status == 2
    assert "but a ControlNetModel alone" in told.err
    assert "by weights of its own" in told.err


def test_diff_refuses_what_has_nothing_in_common(tiny_sd1: Path, tmp_path: Path, trce) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"trce_map.change": torch.ones(32, 32)}, path)
    told = trce("diff", tiny_sd1, path)
    assert (told.status, told.out) == (2, "")
    assert f"{tiny_sd1} is a checkpoint, {path} is a map of text embeddings" in told.err


def test_diff_finds_the_changed_tensor_and_its_size(tiny_sd1: Path, edited: Path, trce) -> None:
    found = json.loads(trce("diff", tiny_sd1, edited, "--json").out)
    (row,) = found["differing"]
    weight = load_file(tiny_sd1 / PLAIN)[KEY]
    assert row["name"] == f"unet/{KEY}"
    assert row["shape"] == list(weight.shape)
    assert row["relative"] == pytest.approx(0.5, rel=1e-5)
    assert row["largest"] == pytest.approx(0.5 * float(weight.abs().max()), rel=1e-5)
    assert not found["only_a"]
    assert not found["only_b"]
    shown = trce("diff", tiny_sd1, edited).out
    assert KEY in shown
    assert "50 %" in shown
    assert f"Tensors that differ: 1. Equal: {found['equal']}." in shown


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_diff_knows_the_same_weight_in_another_layout(
    family: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = request.getfixturevalue(f"tiny_{family}")
    path = tiny.single_file(family, folder, tmp_path / "file.safetensors")
    found = compare(readers(str(folder)), readers(str(path), folder))
    assert not found.differing
    assert not found.reshaped
    assert all(name.startswith("vae/") for name in found.only_a)  # its layout is not mapped
    unet = len(load_file(folder / PLAIN))
    assert found.equal > unet


def test_diff_of_plain_files(tmp_path: Path) -> None:
    one = {
        "lora_a": torch.ones(2),
        "lora_b": torch.zeros(3),
        "lora_c": torch.ones(2),
        "lora_n": torch.zeros(1),
    }
    two = {"lora_a": torch.ones(2).half(), "lora_b": torch.ones(3), "lora_d": torch.ones(2)}
    two["lora_n"] = torch.tensor([float("nan")])
    save_file(one, tmp_path / "one.safetensors")
    save_file(two, tmp_path / "two.safetensors")
    found = compare(*(readers(str(tmp_path / f"{name}.safetensors")) for name in ("one", "two")))
    assert {row.name for row in found.differing} == {"lora_b", "lora_n"}
    assert (found.only_a, found.only_b, found.equal) == (["lora_c"], ["lora_d"], 1)


def test_what_changes_while_it_is_compared_or_described_is_no_answer(
    tiny_sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(tiny_sd1, tmp_path / "changing"))

    def change(*_: object) -> None:
        os.utime(folder / PLAIN, ns=(0, 0))

    left, right = readers(str(tiny_sd1)), readers(str(folder))
    with pytest.raises(TrceError, match=r"changing.* was changed, replaced or removed while it was in use"):
        compare(left, right, change)
    save_file({"lora_unet_x.alpha": torch.ones(1)}, tmp_path / "lora.safetensors")
    file = readers(str(tmp_path / "lora.safetensors"))
    (tmp_path / "lora.safetensors").unlink()
    with pytest.raises(TrceError, match="was changed"):
        compare(file, file)
    monkeypatch.setattr(inspection, "history", lambda checkpoint: change() or [])
    os.utime(folder / PLAIN, ns=(1, 1))
    with pytest.raises(TrceError, match="was changed"):
        describe(str(folder))


def test_diff_of_variants_compares_values(tiny_sd1: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_sd1, tmp_path / "half"))
    tiny.add_fp16_variant(folder, keep_plain=False)
    found = compare(readers(str(tiny_sd1)), readers(str(folder)))
    assert found.differing
    assert max(row.relative for row in found.differing if "unet/" in row.name) < 1e-3
    assert not found.reshaped


def test_an_edit_tells_what_it_is_for_and_whether_it_fits(
    tiny_sd1: Path, tiny_sd2: Path, edited: Path, tmp_path: Path, trce
) -> None:
    checkpoint = open_checkpoint(str(edited))
    made = Made(checkpoint.family, checkpoint.text_encoder_hash(), tuple(history(checkpoint)))
    path = Map(made, {"context": LinearMap.of(0.01 * torch.eye(32, dtype=torch.float64))}).save(
        tmp_path / "map.safetensors"
    )
    found = describe(str(path))
    assert found["kind"] == "a map of text embeddings"
    assert found["family"] == "SD 1.x"
    assert found["text_encoder"] == checkpoint.text_encoder_hash()
    assert [entry["edit"] for entry in found["history"]] == ["map"]
    assert describe(str(tiny_sd1), edit=path)["fits"] is True
    other = describe(str(tiny_sd2), edit=path)
    assert other["fits"] is False
    assert "SD 2.x" in other["why_not"]
    assert "fits" in trce("inspect", tiny_sd1, "--edit", path).out
    assert trce("inspect", path, "--edit", path).status == 2
