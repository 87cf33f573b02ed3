"""Opening and patching tiny checkpoints, honest, incomplete and hostile ones."""

import errno
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from trce_cli.checkpoint import copy as patching
from trce_cli.checkpoint import folder, single_file
from trce_cli.checkpoint.checkpoint import Checkpoint
from trce_cli.checkpoint.copy import check_copy, write_patched
from trce_cli.checkpoint.open import open_checkpoint
from trce_cli.erase.trajectory_set import denoiser_hashes
from trce_cli.errors import BadInput, TrceError
from trce_cli.families.clip.load import load_text_encoders, load_tokenizers
from trce_cli.families.registry import FAMILIES
from trce_cli.families.sd.family import SD1
from trce_cli.images.plan import picture_files

PLAIN = "unet/diffusion_pytorch_model.safetensors"
FP16 = "unet/diffusion_pytorch_model.fp16.safetensors"


@pytest.fixture
def sd1(tiny_sd1: Path, tmp_path: Path) -> Path:
    """A private copy that may be changed."""
    return Path(shutil.copytree(tiny_sd1, tmp_path / "sd1"))


def halve(weight: torch.Tensor) -> torch.Tensor:
    return weight / 2


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def patch(source: Path, output: Path, **kwargs) -> Path:
    opened = open_checkpoint(str(source))
    return write_patched(opened, output, dict.fromkeys(opened.door_weights()["context"], halve), {}, **kwargs)


def assert_halved(before: Path, after: Path) -> None:
    old, new = load_file(before), load_file(after)
    assert list(old) == list(new)
    for key, tensor in old.items():
        edited = ".attn2.to_k." in key or ".attn2.to_v." in key
        assert torch.equal(new[key], tensor / 2 if edited else tensor), key


def test_family_widths_and_keys(tiny_sd1: Path, tiny_sd2: Path, tiny_sdxl: Path) -> None:
    sd1, sd2, sdxl = (open_checkpoint(str(path)) for path in (tiny_sd1, tiny_sd2, tiny_sdxl))
    assert [sd1.family.name, sd2.family.name, sdxl.family.name] == ["SD 1.x", "SD 2.x", "SDXL"]
    widths = [{door.stream: door.width for door in one.doors()} for one in (sd1, sd2, sdxl)]
    assert widths == [{"context": 32}, {"context": 32}, {"context": 64, "pooled": 40}]
    # 16 cross-attention blocks: 6 down, 1 mid, 9 up
    assert {door.name: len(door.weights) for door in sd1.doors()} == {"keys": 16, "values": 16}
    assert sd1.dtype == "F32"
    assert all(sd1.shape("denoiser", key)[1] == 32 for door in sd1.doors() for key in door.weights)


def test_every_other_byte_is_copied(tiny_sd1: Path, tmp_path: Path) -> None:
    before = tree(tiny_sd1)
    opened = open_checkpoint(str(tiny_sd1))
    done: list[int] = []
    edits = dict.fromkeys(opened.door_weights()["context"], halve)
    output = write_patched(opened, tmp_path / "out", edits, {"README.md": b"card"}, report=done.append)
    after = tree(output)
    assert tree(tiny_sd1) == before
    assert after.pop("README.md") == b"card"
    assert after.keys() == before.keys()
    assert [name for name in after if after[name] != before[name]] == [PLAIN]
    assert_halved(tiny_sd1 / PLAIN, output / PLAIN)
    assert sum(done) == pytest.approx(opened.total_bytes(), rel=0.1)


def test_the_output_loads_and_draws(tiny_sd1: Path, tmp_path: Path) -> None:
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(patch(tiny_sd1, tmp_path / "out"))
    weight = pipeline.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.weight
    original = load_file(tiny_sd1 / PLAIN)["mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"]
    assert torch.equal(weight, original / 2)


def test_every_copy_of_the_unet_is_edited(sd1: Path, tmp_path: Path) -> None:
    tiny.add_fp16_variant(sd1)
    tiny.shard(sd1, variant="fp16")
    shutil.copy(sd1 / PLAIN, sd1 / "unet/diffusion_pytorch_model.non_ema.safetensors")
    opened = open_checkpoint(str(sd1))
    assert [copy.label for copy in opened.denoiser] == ["plain", "fp16", "non_ema"]
    output = patch(sd1, tmp_path / "out")
    names = sorted(path.name for path in (sd1 / "unet").glob("*.safetensors"))
    assert len(names) == 4
    for name in names:
        assert_halved(sd1 / "unet" / name, output / "unet" / name)


def test_an_fp16_only_folder_opens_without_being_told(sd1: Path, tmp_path: Path) -> None:
    tiny.add_fp16_variant(sd1, keep_plain=False)
    opened = open_checkpoint(str(sd1))
    assert opened.dtype == "F16"
    assert load_text_encoders(opened, opened.family.encoders)[0].dtype == torch.float16
    assert_halved(sd1 / FP16, patch(sd1, tmp_path / "out") / FP16)


def test_the_variant_is_used_first(sd1: Path) -> None:
    tiny.add_fp16_variant(sd1)
    assert open_checkpoint(str(sd1)).dtype == "F32"
    assert open_checkpoint(str(sd1), variant="fp16").dtype == "F16"
    with pytest.raises(BadInput, match="variant 'bf16'") as caught:
        open_checkpoint(str(sd1), variant="bf16")
    assert "fp16, plain" in caught.value.hint


def test_text_encoders_are_the_pipelines_own(tiny_sdxl: Path) -> None:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    opened = open_checkpoint(str(tiny_sdxl))
    ours = load_text_encoders(opened, opened.family.encoders)
    theirs = [
        CLIPTextModel.from_pretrained(tiny_sdxl / "text_encoder"),
        CLIPTextModelWithProjection.from_pretrained(tiny_sdxl / "text_encoder_2"),
    ]
    tokenizers = load_tokenizers(opened, opened.family.encoders)
    assert tokenizers[0].pad_token_id == tokenizers[0].eos_token_id
    assert tokenizers[1].pad_token_id != tokenizers[1].eos_token_id
    for tokenizer, mine, reference in zip(tokenizers, ours, theirs, strict=True):
        ids = torch.tensor([tokenizer("a photo of a knife", padding="max_length").input_ids])
        got, expected = (model(ids, output_hidden_states=True) for model in (mine, reference))
        assert torch.equal(got.hidden_states[-2], expected.hidden_states[-2])
        assert torch.allclose(got[0], expected[0], rtol=1e-5, atol=1e-5)
        assert not any(parameter.requires_grad for parameter in mine.parameters())


def test_text_encoder_hash_ignores_precision_and_notices_a_weight(sd1: Path, tiny_sd1: Path) -> None:
    reference = open_checkpoint(str(tiny_sd1)).text_encoder_hash()
    tiny.add_fp16_variant(sd1, keep_plain=False)
    assert open_checkpoint(str(sd1)).text_encoder_hash() == reference
    path = sd1 / "text_encoder/model.fp16.safetensors"
    state = load_file(path)
    state["text_model.final_layer_norm.bias"][3] += 1
    save_file(state, path)
    assert open_checkpoint(str(sd1)).text_encoder_hash() != reference


def test_hashes_are_those_of_the_files(tiny_sd1: Path) -> None:
    import hashlib

    hashes = open_checkpoint(str(tiny_sd1)).hashes()
    assert hashes.text_encoder == open_checkpoint(str(tiny_sd1)).text_encoder_hash()
    assert hashes.files == {
        str(path.relative_to(tiny_sd1)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(tiny_sd1.rglob("*.safetensors"))
    }


def test_unedited_copies_are_left_out_and_said(sd1: Path, tmp_path: Path) -> None:
    strays = [
        "unet/diffusion_pytorch_model.bin",
        "unet/flax.msgpack",
        "v1-5.ckpt",
        "v1-5.safetensors",
        "old/a.pt",
    ]
    (sd1 / "old").mkdir()
    for name in strays:
        (sd1 / name).write_bytes(b"weights")
    save_file({"unet.lora_A.weight": torch.ones(1)}, sd1 / "unet/pytorch_lora_weights.safetensors")
    (sd1 / "unet/._diffusion_pytorch_model.safetensors").write_bytes(b"what a file manager left")
    strays.append("unet/pytorch_lora_weights.safetensors")
    kept = ["LICENSE.txt", "old/notes.txt", "text_encoder/pytorch_model.bin", "unet/notes.md"]
    for name in kept:
        (sd1 / name).write_bytes(b"kept")
    opened = open_checkpoint(str(sd1))
    assert sorted(opened.left_out) == sorted(strays)
    assert all(any(name in note for note in opened.notes()) for name in strays)
    names = tree(patch(sd1, tmp_path / "out")).keys()
    assert not set(strays) & names
    assert set(kept) <= names


def replace_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def only_pickle(folder: Path) -> None:
    (folder / PLAIN).unlink()
    (folder / "unet/diffusion_pytorch_model.bin").write_bytes(b"\x80\x02")


def pickled_unet(folder: Path) -> None:
    torch.save({}, folder / PLAIN)


def sharded_with(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tiny.shard(folder)
        replace_json(folder / "unet/diffusion_pytorch_model.safetensors.index.json", **changes)

    return change


def shards_without_index(folder: Path) -> None:
    tiny.shard(folder)
    (folder / "unet/diffusion_pytorch_model.safetensors.index.json").unlink()


def missing_shard(folder: Path) -> None:
    tiny.shard(folder)
    next((folder / "unet").glob("*-00002-of-*")).unlink()


def linked_out(folder: Path) -> None:
    outside = folder.parent / "outside.safetensors"
    (folder / PLAIN).rename(outside)
    (folder / PLAIN).symlink_to(outside)


def linked_nowhere(folder: Path) -> None:
    (folder / "vae/diffusion_pytorch_model.safetensors").unlink()
    (folder / "vae/diffusion_pytorch_model.safetensors").symlink_to("../blobs/pruned")


def linked_folder(folder: Path) -> None:
    outside = folder.parent / "outside"
    (folder / "vae").rename(outside)
    (folder / "vae").symlink_to(outside)


def linked_folder_inside(folder: Path) -> None:
    (folder / "vae").rename(folder / "other")
    (folder / "vae").symlink_to("other")


def quantised(folder: Path) -> None:
    state = load_file(folder / PLAIN)
    save_file({key: value.to(torch.int8) for key, value in state.items()}, folder / PLAIN)


def without_a_key(folder: Path) -> None:
    state = load_file(folder / PLAIN)
    del state["mid_block.attentions.0.transformer_blocks.0.attn2.to_v.weight"]
    save_file(state, folder / "unet/diffusion_pytorch_model.fp16.safetensors")


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no model_index": (lambda f: (f / "model_index.json").unlink(), "no model_index.json"),
    "broken model_index": (lambda f: (f / "model_index.json").write_text("{"), "cannot be read as JSON"),
    "no unet config": (lambda f: (f / "unet/config.json").unlink(), "has no unet/config.json"),
    "no unet weights": (lambda f: (f / PLAIN).unlink(), "no .safetensors weights"),
    "only a pickle": (only_pickle, "only as a pickle"),
    "a pickle named safetensors": (pickled_unet, "is a PyTorch pickle"),
    "truncated": (lambda f: os.truncate(f / PLAIN, 500_000), "cut off"),
    "other pipeline": (
        lambda f: replace_json(f / "model_index.json", _class_name="SanaPipeline", unet=None),
        "its pipeline is SanaPipeline",
    ),
    "other text encoder": (
        lambda f: replace_json(f / "model_index.json", text_encoder=["transformers", "T5EncoderModel"]),
        "text_encoder is T5EncoderModel",
    ),
    "index out of the folder": (sharded_with(weight_map={"a": "../../secret.safetensors"}), "outside"),
    "index to an absolute path": (sharded_with(weight_map={"a": "/etc/passwd"}), "outside"),
    "index of numbers": (sharded_with(weight_map={"a": 3}), "weight_map.a must be a text"),
    "index without a map": (sharded_with(weight_map=[]), "weight_map must be a table"),
    "shards without index": (shards_without_index, "no index"),
    "missing shard": (missing_shard, "No such file"),
    "link out of the folder": (linked_out, "symbolic link"),
    "linked part": (linked_folder, "symbolic link"),
    "linked nowhere": (linked_nowhere, "a link to a file that is not there"),
    "linked part inside": (linked_folder_inside, "symbolic link to a folder"),
    "quantised": (quantised, "dtype I8"),
    "a copy that lacks a weight": (without_a_key, "The fp16 U-Net weights"),
    "narrow text encoder": (
        lambda f: replace_json(f / "text_encoder/config.json", hidden_size=16),
        "the configuration asks for (",
    ),
    "text encoder without size": (
        lambda f: replace_json(f / "text_encoder/config.json", hidden_size="32"),
        "hidden_size must be a whole number, not '32'",
    ),
    "no tokenizer": (lambda f: shutil.rmtree(f / "tokenizer"), "no tokenizer"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refusals(sd1: Path, kind: str) -> None:
    change, expected = REFUSED[kind]
    change(sd1)
    with pytest.raises(BadInput) as caught:
        open_checkpoint(str(sd1))
    assert expected in caught.value.message
    assert "\n" not in caught.value.message


def test_unknown_families_get_the_list_of_known_ones(sd1: Path) -> None:
    replace_json(sd1 / "model_index.json", _class_name="StableDiffusion3Pipeline", unet=None)
    with pytest.raises(BadInput) as caught:
        open_checkpoint(str(sd1))
    assert caught.value.hint == f"Known families: {', '.join(family.name for family in FAMILIES)}."


def test_a_text_encoder_with_a_missing_or_nan_weight_is_never_random(sd1: Path) -> None:
    path = sd1 / "text_encoder/model.safetensors"
    state = load_file(path)
    bias = state.pop("text_model.final_layer_norm.bias")
    save_file(state, path)
    with pytest.raises(BadInput, match=r"lacks the weight text_model\.final_layer_norm\.bias"):
        load_text_encoders(open_checkpoint(str(sd1)), SD1.encoders)
    bias[0] = float("nan")
    save_file({**state, "text_model.final_layer_norm.bias": bias}, path)
    with pytest.raises(BadInput, match=r"final_layer_norm\.bias .*NaN"):
        load_text_encoders(open_checkpoint(str(sd1)), SD1.encoders)


def test_a_hub_snapshot_of_links_to_blobs_opens(tiny_sd1: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--someone--tiny"
    snapshot = repository / "snapshots" / ("0" * 40)
    (repository / "blobs").mkdir(parents=True)
    for index, path in enumerate(sorted(p for p in tiny_sd1.rglob("*") if p.is_file())):
        blob = repository / "blobs" / f"{index:064x}"
        shutil.copy(path, blob)
        link = snapshot / path.relative_to(tiny_sd1)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    assert open_checkpoint(str(snapshot)).revision == "0" * 40  # the commit
    output = patch(snapshot, tmp_path / "out")
    assert_halved(tiny_sd1 / PLAIN, output / PLAIN)
    assert not any(path.is_symlink() for path in output.rglob("*"))
    with pytest.raises(BadInput, match="hub's cache"):
        patch(snapshot, repository / "out")


def test_hub_ids_resolve_offline_or_fail_in_a_sentence(
    tiny_sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked: dict[str, object] = {}

    def from_cache(repo_id: str, **kwargs: object) -> str:
        asked.update(kwargs, repo_id=repo_id)
        return str(tiny_sd1)

    with monkeypatch.context() as patched:
        patched.setattr(huggingface_hub, "snapshot_download", from_cache)
        opened = open_checkpoint("someone/tiny", revision="main")
    assert opened.name == "someone/tiny"
    assert opened.revision == "main"
    assert asked["revision"] == "main"
    assert not any("bin" in pattern for pattern in asked["allow_patterns"])
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(BadInput, match="no local path, and cannot be had from the hub"):
        open_checkpoint("someone/not-in-the-cache")


def test_what_a_misspelt_name_may_have_meant_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "erased").mkdir()
    for name, meant in (("emojy", "emoji"), ("erasd", "erased"), (f"{tmp_path}/erasd", f"{tmp_path}/erased")):
        with pytest.raises(BadInput) as refused:
            open_checkpoint(name)
        assert f"Did you mean {meant}?" in str(refused.value.hint)
    with pytest.raises(BadInput) as refused:
        open_checkpoint("quite-another")
    assert "Did you mean" not in str(refused.value.hint)
    for name, meant in (("weapons", "give it with --preset"), ("a cat", "prompts behind it")):
        with pytest.raises(BadInput) as refused:
            open_checkpoint(name)
        assert meant in str(refused.value.hint)


@pytest.mark.parametrize("name", ["./missing", "/missing", "a/b/c", "model.safetensors", "~/missing"])
def test_missing_paths_are_no_hub_ids(name: str) -> None:
    with pytest.raises(BadInput, match="no file or folder"):
        open_checkpoint(name)


@pytest.mark.parametrize("name", ["x" * 5000, "", "no such thing", "owner/na me", "owner/"])
def test_nonsense_is_neither(name: str) -> None:
    with pytest.raises(BadInput):
        open_checkpoint(name)


def test_existing_outputs_are_refused_without_force(tiny_sd1: Path, tmp_path: Path) -> None:
    output = patch(tiny_sd1, tmp_path / "out")
    (output / "trce.json").write_text("old")
    before = tree(output)
    with pytest.raises(BadInput, match="exists already"):
        patch(tiny_sd1, output)
    assert tree(output) == before
    patch(tiny_sd1, output, force=True)
    assert "trce.json" not in tree(output)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_force_replaces_nothing_but_checkpoints(tiny_sd1: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(BadInput, match="is no checkpoint"):
        patch(tiny_sd1, tmp_path / "thesis", force=True)
    assert (tmp_path / "thesis" / "chapter.txt").exists()


def test_outputs_in_around_or_equal_to_the_input_are_refused(sd1: Path, tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to(sd1)
    before = tree(tmp_path)
    for output in (
        sd1,
        sd1 / "out",
        sd1 / "unet",
        tmp_path / "alias",
        tmp_path / "alias/out",
        sd1 / "../sd1",
        tmp_path,
    ):
        with pytest.raises(BadInput, match=r"is the input itself|lie in each other"):
            patch(sd1, output, force=True)
    assert tree(tmp_path) == before


def test_modes_follow_the_umask(tiny_sd1: Path, tmp_path: Path) -> None:
    assert stat.S_IMODE((tiny_sd1 / PLAIN).stat().st_mode) == 0o600  # as the safetensors library writes
    old = os.umask(0o027)
    try:
        output = patch(tiny_sd1, tmp_path / "out")
    finally:
        os.umask(old)
    modes = {(path.is_dir(), stat.S_IMODE(path.stat().st_mode)) for path in [output, *output.rglob("*")]}
    assert modes == {(True, 0o750), (False, 0o640)}


def test_nan_weights_leave_no_output(sd1: Path, tmp_path: Path) -> None:
    state = load_file(sd1 / PLAIN)
    key = "up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    state[key][1, 2] = float("nan")
    save_file(state, sd1 / PLAIN)
    with pytest.raises(BadInput, match=key):
        patch(sd1, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["sd1"]


def test_lack_of_space_is_seen_beforehand(
    tiny_sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 10, 10))
    with pytest.raises(TrceError, match=r"and 0\.00 GB are free") as caught:
        check_copy(open_checkpoint(str(tiny_sd1)), tmp_path / "out")
    assert caught.value.exit_code == 1


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_nothing(
    tiny_sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    output = patch(tiny_sd1, tmp_path / "out")
    before = tree(output)
    calls = 0

    def fail(*args: object) -> None:
        nonlocal calls
        calls += 1
        if calls > 3:
            raise error

    monkeypatch.setattr(patching, "copy_file", fail)
    expected = TrceError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        patch(tiny_sd1, output, force=True)
    assert tree(output) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


KILLED = """
import sys, time
from pathlib import Path
from trce_cli.checkpoint.open import open_checkpoint
from trce_cli.checkpoint.copy import write_patched
def slow(weight):
    print("writing", flush=True)
    time.sleep(60)
opened = open_checkpoint(sys.argv[1])
write_patched(opened, Path(sys.argv[2]), {opened.door_weights()["context"][0]: slow}, {}, force=True)
"""


def test_a_killed_run_is_cleaned_up_by_the_next(tiny_sd1: Path, tmp_path: Path) -> None:
    output = patch(tiny_sd1, tmp_path / "out")
    before = tree(output)
    command = [sys.executable, "-c", KILLED, str(tiny_sd1), str(output)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "writing\n"
    # While the run lives another one leaves its half-written folder alone.
    check_copy(open_checkpoint(str(tiny_sd1)), output, force=True)
    assert len(list(tmp_path.iterdir())) == 2
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert tree(output) == before
    assert len(list(tmp_path.iterdir())) == 2
    patch(tiny_sd1, output, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_kill_between_the_two_renames_loses_nothing(tiny_sd1: Path, tmp_path: Path) -> None:
    output = patch(tiny_sd1, tmp_path / "out")
    before = tree(output)
    killed = "import os; from pathlib import Path; from trce_cli.system import whole; staging = "
    killed += f"whole._make_staging(Path({str(output)!r}))[0]; os.rename({str(output)!r}, staging / 'old')"
    subprocess.run([sys.executable, "-c", killed], check=True)
    assert not output.exists()
    with pytest.raises(BadInput, match="exists already"):
        patch(tiny_sd1, output)
    assert tree(output) == before


def test_a_missing_parent_is_made_and_a_file_in_the_way_is_refused(tiny_sd1: Path, tmp_path: Path) -> None:
    assert_halved(tiny_sd1 / PLAIN, patch(tiny_sd1, tmp_path / "a/b/out") / PLAIN)
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="is not a folder"):
        patch(tiny_sd1, tmp_path / "file/out")
    with pytest.raises(BadInput, match="is no checkpoint"):
        patch(tiny_sd1, tmp_path / "file", force=True)


def test_link_shares_what_is_unchanged(tiny_sd1: Path, tmp_path: Path) -> None:
    copied, linked = patch(tiny_sd1, tmp_path / "copied"), patch(tiny_sd1, tmp_path / "linked", link=True)
    assert tree(copied) == tree(linked)
    assert not (linked / PLAIN).samefile(tiny_sd1 / PLAIN)
    vae = "vae/diffusion_pytorch_model.safetensors"
    assert not (copied / vae).samefile(tiny_sd1 / vae)
    if (linked / vae).stat().st_nlink == 1:
        pytest.skip("this file system has reflinks")
    assert (linked / vae).samefile(tiny_sd1 / vae)


def test_link_to_another_file_system_copies(
    tiny_sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_link(source: str, target: Path) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", no_link)
    assert tree(patch(tiny_sd1, tmp_path / "out", link=True)) == tree(patch(tiny_sd1, tmp_path / "copy"))


def test_an_impossible_name_for_the_output_is_a_sentence(tiny_sd1: Path, tmp_path: Path) -> None:
    with pytest.raises(TrceError, match="cannot be used: File name too long"):
        patch(tiny_sd1, tmp_path / ("x" * 300))


def test_a_broken_tokenizer_is_one_sentence(tiny_sd1: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_sd1, tmp_path / "broken")
    for file in (tmp_path / "broken/tokenizer").glob("*"):
        file.write_text("{")
    with pytest.raises(BadInput, match=r"broken/tokenizer.* cannot be read"):
        load_tokenizers(open_checkpoint(str(tmp_path / "broken")), SD1.encoders)


CHANGES: dict[str, Callable[[Path], object]] = {
    "swapped": lambda path: (shutil.copy(path, path.with_name("x")), path.with_name("x").replace(path)),
    "cut": lambda path: os.truncate(path, path.stat().st_size - 4),
    "touched": os.utime,
    "removed": Path.unlink,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("file", [PLAIN, "vae/config.json"])
def test_an_input_that_changes_while_it_is_in_use_is_an_error(sd1: Path, change: str, file: str) -> None:
    opened = open_checkpoint(str(sd1))
    key = opened.doors()[0].weights[-1]

    def edit(weight: torch.Tensor) -> torch.Tensor:
        CHANGES[change](sd1 / file)
        return weight

    with pytest.raises(TrceError) as caught:
        write_patched(opened, sd1.parent / "out", {key: edit}, {})
    assert Path(file).name in caught.value.message
    assert not (sd1.parent / "out").exists()
    assert not list(sd1.parent.glob(".trce*"))


@pytest.mark.parametrize("known_by", [Checkpoint.hashes, denoiser_hashes, picture_files])
def test_a_file_that_was_swapped_is_not_hashed_for_the_one_that_was_opened(
    sd1: Path, known_by: Callable[[Checkpoint], object]
) -> None:
    opened = open_checkpoint(str(sd1))
    known_by(opened)
    CHANGES["swapped"](sd1 / PLAIN)
    with pytest.raises(TrceError, match=r"safetensors was changed"):
        known_by(opened)


@pytest.mark.parametrize("change", CHANGES)
def test_an_input_that_changes_while_it_is_opened_is_an_error(
    sd1: Path, tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = sd1 / "tokenizer/vocab.json"
    tiny.single_file("sd1", sd1, tmp_path / "file.safetensors")
    content, listed = place.read_bytes(), folder._folder_files

    def changing(*args: Any) -> Any:
        CHANGES[change](place)
        return listed(*args)

    monkeypatch.setattr(folder, "_folder_files", changing)
    with pytest.raises(TrceError, match=r"vocab\.json was changed"):
        open_checkpoint(str(sd1))
    place.write_bytes(content)
    names = single_file._family

    def changing_too(*args: Any) -> Any:
        CHANGES[change](place)
        return names(*args)

    monkeypatch.setattr(single_file, "_family", changing_too)
    with pytest.raises(TrceError, match=r"vocab\.json was changed"):
        open_checkpoint(str(tmp_path / "file.safetensors"), config=sd1)


@pytest.mark.parametrize("part", ["vae", "scheduler", "tokenizer", "unet"])
def test_a_folder_that_cannot_be_listed_is_no_empty_one(tiny_sd1, monkeypatch, part):
    """Neither is an output without it made, nor a picture's hash."""
    listdir, scandir = os.listdir, os.scandir

    def refused(function):
        def call(path="."):
            if str(path).endswith(f"/{part}"):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return function(path)

        return call

    monkeypatch.setattr(os, "listdir", refused(listdir))
    monkeypatch.setattr(os, "scandir", refused(scandir))
    with pytest.raises(PermissionError):
        open_checkpoint(str(tiny_sd1))
