"""Single files in the CompVis/LDM layout: opened, edited, and read by diffusers."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import tiny
from trce_cli.checkpoint.checkpoint import Checkpoint, Hashes
from trce_cli.checkpoint.copy import write_patched
from trce_cli.checkpoint.open import open_checkpoint
from trce_cli.checkpoint.provenance import history, provenance_files, record
from trce_cli.errors import BadInput
from trce_cli.families.clip.load import load_text_encoders, load_tokenizers
from trce_cli.families.sd import configs
from trce_cli.prompts.presets import load_preset
from trce_cli.system.safetensors import SafetensorsFile

FAMILIES = tiny.FAMILIES


@pytest.fixture(scope="module")
def folders(tiny_sd1: Path, tiny_sd2: Path, tiny_sdxl: Path) -> dict[str, Path]:
    return {"sd1": tiny_sd1, "sd2": tiny_sd2, "sdxl": tiny_sdxl}


@pytest.fixture(scope="module")
def files(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One single file for each family; that of SD 1.x has an EMA copy."""
    where = tmp_path_factory.mktemp("single")
    return {
        family: tiny.single_file(
            family, folders[family], where / f"{family}.safetensors", ema=family == "sd1"
        )
        for family in FAMILIES
    }


def opened(files: dict[str, Path], folders: dict[str, Path], family: str) -> Checkpoint:
    return open_checkpoint(str(files[family]), config=folders[family])


def edited_keys(checkpoint: Checkpoint) -> list[str]:
    return [key for door in checkpoint.doors() for key in door.weights]


def pipeline_of(path: Path, config: Path, family: str):
    import diffusers

    name = "StableDiffusionXLPipeline" if family == "sdxl" else "StableDiffusionPipeline"
    return getattr(diffusers, name).from_single_file(str(path), config=str(config))


@pytest.mark.parametrize("family", FAMILIES)
def test_our_test_files_are_what_diffusers_reads(files: dict, folders: dict, family: str) -> None:
    pipeline = pipeline_of(files[family], folders[family], family)
    reference = load_file(folders[family] / "unet/diffusion_pytorch_model.safetensors")
    state = pipeline.unet.state_dict()
    assert state.keys() == reference.keys()
    assert all(torch.equal(state[key], value) for key, value in reference.items())
    vae = load_file(folders[family] / "vae/diffusion_pytorch_model.safetensors")
    state = pipeline.vae.state_dict()
    assert all(torch.equal(state[key], value) for key, value in vae.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_single_file_is_the_folder_it_came_from(files: dict, folders: dict, family: str) -> None:
    single, folder = opened(files, folders, family), open_checkpoint(str(folders[family]))
    assert single.family is folder.family
    assert single.layout == "single-file"
    assert single.text_encoder_hash() == folder.text_encoder_hash()
    reference = load_file(folders[family] / "unet/diffusion_pytorch_model.safetensors")
    assert single.keys("denoiser") == reference.keys()
    assert all(torch.equal(single.read("denoiser", key), value) for key, value in reference.items())
    specs = single.family.encoders
    for mine, theirs in zip(*(load_text_encoders(one, specs) for one in (single, folder)), strict=True):
        expected = theirs.state_dict()
        assert all(torch.equal(value, expected[key]) for key, value in mine.state_dict().items())
    ids, others = (
        [tokenizer("a photo of a knife").input_ids for tokenizer in load_tokenizers(one, specs)]
        for one in (single, folder)
    )
    assert ids == others


@pytest.mark.parametrize("family", FAMILIES)
def test_the_edited_file_is_the_edited_folder(
    files: dict, folders: dict, family: str, tmp_path: Path
) -> None:
    single, folder = opened(files, folders, family), open_checkpoint(str(folders[family]))
    edits = dict.fromkeys(edited_keys(folder), lambda weight: weight * 0.25)
    out_file = write_patched(single, tmp_path / "out.safetensors", edits, {})
    out_folder = write_patched(folder, tmp_path / "out", edits, {})
    before, after = load_file(files[family]), load_file(out_file)
    with safe_open(files[family], "pt") as old, safe_open(out_file, "pt") as new:
        assert list(old.keys()) == list(new.keys())
        assert old.metadata() == new.metadata()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    count = len(edits) * (2 if family == "sd1" else 1)  # the EMA copy as well
    assert len(changed) == count
    state = pipeline_of(out_file, folders[family], family).unet.state_dict()
    reference = load_file(out_folder / "unet/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(state[key], value) for key, value in reference.items())


def test_the_ema_copy_is_edited_too(files: dict, folders: dict, tmp_path: Path) -> None:
    checkpoint = opened(files, folders, "sd1")
    assert [copy.label for copy in checkpoint.denoiser] == ["plain", "EMA"]
    edits = dict.fromkeys(edited_keys(checkpoint), lambda weight: weight + 1)
    state = load_file(write_patched(checkpoint, tmp_path / "out.safetensors", edits, {}))
    before = load_file(files["sd1"])
    key = "diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight"
    for name in (f"model.{key}", "model_ema." + key.replace(".", "")):
        assert torch.equal(state[name], before[name] + 1)


def test_dtype_key_order_and_metadata_are_kept(folders: dict, tmp_path: Path) -> None:
    path = tiny.single_file("sd1", folders["sd1"], tmp_path / "half.safetensors", half=True)
    checkpoint = open_checkpoint(str(path), config=folders["sd1"])
    entry = record("map", checkpoint, [load_preset("weapons")], {}, {}, 1.0, Hashes({}, "0" * 64))
    files = provenance_files(checkpoint, entry)
    edits = dict.fromkeys(edited_keys(checkpoint), lambda weight: weight + 1)
    output = write_patched(checkpoint, tmp_path / "out.safetensors", edits, files)
    with safe_open(path, "pt") as old, safe_open(output, "pt") as new:
        assert list(new.keys()) == list(old.keys())
        metadata = new.metadata()
    assert {value.dtype for value in load_file(output).values()} == {torch.float16}
    assert json.loads(metadata["trce"]) == json.loads(files["trce.json"])
    assert metadata["modelspec.title"] == "Tiny without weapons"
    assert "modelspec.hash_sha256" not in metadata
    assert [entry["edit"] for entry in history(open_checkpoint(str(output), config=folders["sd1"]))] == [
        "map"
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["half.safetensors", "out.safetensors"]


def test_output_rules_hold_for_files(files: dict, folders: dict, tmp_path: Path) -> None:
    checkpoint = opened(files, folders, "sd2")
    with pytest.raises(BadInput, match=r"must end in \.safetensors"):
        write_patched(checkpoint, tmp_path / "out", {}, {})
    with pytest.raises(BadInput, match="is the input itself"):
        write_patched(checkpoint, files["sd2"], {}, {}, force=True)
    output = write_patched(checkpoint, tmp_path / "out.safetensors", {}, {})
    assert output.read_bytes() == files["sd2"].read_bytes()
    with pytest.raises(BadInput, match="exists already"):
        write_patched(checkpoint, output, {}, {})
    write_patched(checkpoint, output, {}, {}, force=True)
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(BadInput, match="does not replace it"):
        write_patched(checkpoint, tmp_path / "folder.safetensors", {}, {}, force=True)


def test_the_shipped_configurations_ask_for_the_published_sizes(
    files: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRCE_CACHE", str(tmp_path))
    with pytest.raises(BadInput, match=r"asks for \(49408, 768\)") as caught:
        open_checkpoint(str(files["sd1"]))
    assert "--config" in caught.value.hint


@pytest.mark.parametrize("family", FAMILIES)
def test_the_shipped_folder_has_all_that_diffusers_asks_for(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTokenizer

    monkeypatch.setenv("TRCE_CACHE", str(tmp_path))
    folder = configs.folder(family)
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(json.loads((folder / "unet/config.json").read_text()))
    parameters = sum(parameter.numel() for parameter in unet.parameters())
    assert parameters == {"sd1": 859_520_964, "sd2": 865_910_724, "sdxl": 2_567_463_684}[family]
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert tokenizer.pad_token_id == (0 if family == "sd2" else 49407)
    (folder / "tokenizer/merges.txt").write_text("damaged")
    configs.folder(family)
    assert CLIPTokenizer.from_pretrained(folder / "tokenizer")("a cat").input_ids == [49406, 320, 2368, 49407]
    assert [path.name for path in (tmp_path / "configs").iterdir()] == [family]


def without(path: Path, target: Path, prefix: str) -> Path:
    save_file({key: value for key, value in load_file(path).items() if not key.startswith(prefix)}, target)
    return target


def test_what_is_no_checkpoint_is_named(files: dict, folders: dict, tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    for key, found in {
        "lora_unet_mid_block.lora_down.weight": "a LoRA",
        "down_blocks.0.resnets.0.conv1.weight": "the U-Net of a diffusers folder",
        "double_blocks.0.img_attn.norm.weight": "Known families: SD 1.x, SD 2.x, ",
        "model.diffusion_model.double_blocks.0.img_attn.norm.weight": "Known families: SD 1.x, SD 2.x, ",
    }.items():
        save_file({key: torch.zeros(1)}, path)
        with pytest.raises(BadInput) as caught:
            open_checkpoint(str(path))
        assert found in f"{caught.value.message} {caught.value.hint}"
    without(files["sd1"], path, "cond_stage_model.")
    with pytest.raises(BadInput, match="holds no text encoder"):
        open_checkpoint(str(path))
    without(files["sd2"], path, "cond_stage_model.model.transformer.resblocks.1.attn.in_proj_weight")
    with pytest.raises(
        BadInput, match=r"lacks the weight cond_stage_model\.model\.transformer\.resblocks\.1"
    ):
        open_checkpoint(str(path), config=folders["sd2"])
    without(files["sd1"], path, "model_ema.diffusion_modelmiddle_block1transformer_blocks0attn2to_kweight")
    with pytest.raises(BadInput, match="EMA U-Net weights"):
        open_checkpoint(str(path), config=folders["sd1"])


@pytest.mark.parametrize("shape", [(), (5, 2)])
def test_weights_on_each_other_that_cannot_be_cut_apart_are_named(
    files: dict, folders: dict, tmp_path: Path, shape: tuple[int, ...]
) -> None:
    key = "cond_stage_model.model.transformer.resblocks.1.attn.in_proj_weight"
    path = tmp_path / "file.safetensors"
    save_file(load_file(files["sd2"]) | {key: torch.zeros(shape)}, path)
    with pytest.raises(BadInput, match=r"in_proj_weight in .* cannot be 3 equal pieces"):
        open_checkpoint(str(path), config=folders["sd2"])


def test_the_header_is_read_once(files: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    read, opened = SafetensorsFile.open, []
    monkeypatch.setattr(SafetensorsFile, "open", lambda path: opened.append(path) or read(path))
    with pytest.raises(BadInput, match="asks for"):  # the family's base is larger
        open_checkpoint(str(files["sd1"]))
    assert opened == [files["sd1"]]


def test_a_config_of_another_family_is_refused(files: dict, folders: dict, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"family SD 1\.x, and .* of SDXL"):
        open_checkpoint(str(files["sd1"]), config=folders["sdxl"])
    with pytest.raises(BadInput, match=r"no model_index\.json"):
        open_checkpoint(str(files["sd1"]), config=tmp_path)


def test_a_pickled_checkpoint_is_refused(tmp_path: Path) -> None:
    for name in ("model.ckpt", "model.safetensors"):
        torch.save({"state_dict": {}}, tmp_path / name)
        with pytest.raises(BadInput, match="pickle"):
            open_checkpoint(str(tmp_path / name))
    shutil.copy(tmp_path / "model.ckpt", tmp_path / "model.txt")
    with pytest.raises(BadInput, match=r"neither a diffusers folder nor a \.safetensors file"):
        open_checkpoint(str(tmp_path / "model.txt"))
