"""`trce apply` as its users meet it: edits on checkpoints, and refusals in one sentence."""

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from maps import random_map
from trce_cli import Map, load_map
from trce_cli.checkpoint.open import open_checkpoint
from trce_cli.cli import written
from trce_cli.erase.map_verdict import judge
from trce_cli.maths.linear_map import LinearMap

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRCE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def saved(tiny_sd1: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two maps for the SD 1.x checkpoint."""
    where = tmp_path_factory.mktemp("maps")
    return {
        "a": random_map(tiny_sd1, 1).save(where / "a.safetensors"),
        "b": random_map(tiny_sd1, 2).save(where / "b.safetensors"),
    }


def expected(folder: Path, *maps: Map) -> dict[str, torch.Tensor]:
    """The U-Net's weights with the maps multiplied in, in this order."""
    weights = load_file(folder / UNET)
    for key, weight in weights.items():
        if key.endswith(("attn2.to_k.weight", "attn2.to_v.weight")):
            wide = weight.double()
            for text_map in maps:
                wide = wide @ text_map.streams["context"].matrix
            weights[key] = wide.float()
    return weights


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        torch.testing.assert_close(value, theirs[key], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("strength", [0.0, 0.4, 1.0, 1.7])
def test_a_map_is_put_on_a_checkpoint_at_any_strength(
    trce: Callable[..., Any], saved: dict[str, Path], tiny_sd1: Path, tmp_path: Path, strength: float
) -> None:
    outcome = trce("apply", saved["a"], tiny_sd1, "--output", tmp_path / "out", "--strength", strength)
    assert outcome.status == 0, outcome.err
    same(load_file(tmp_path / "out" / UNET), expected(tiny_sd1, load_map(saved["a"]).scaled(strength)))
    if not strength:
        assert (tmp_path / "out" / UNET).read_bytes() == (tiny_sd1 / UNET).read_bytes()


def test_where_a_map_fits_its_own_guards_are_shown(
    trce: Callable[..., Any], tiny_sd1: Path, tmp_path: Path
) -> None:
    text_map = random_map(tiny_sd1, 1)
    text_map.made.history[-1]["figures"]["verdicts"] = judge({"moved": 0.4, "canary_change": 0.1})
    text_map.save(tmp_path / "weak.safetensors")
    outcome = trce("apply", tmp_path / "weak.safetensors", tiny_sd1, "-o", tmp_path / "out")
    assert outcome.status == 0
    assert "Way to the safe prompts, done │        │ 40.0% │ bad (good from 70%)" in outcome.out
    assert "Warning: Bad: much of what is to be erased will still be drawn" in outcome.err


def test_several_edits_act_in_order_and_the_history_tells(
    trce: Callable[..., Any], saved: dict[str, Path], tiny_sd1: Path, tmp_path: Path
) -> None:
    a, b = (load_map(saved[name]) for name in "ab")
    outcome = trce("apply", saved["a"], saved["b"], tiny_sd1, "-o", tmp_path / "out", "--json")
    assert outcome.status == 0, outcome.err
    result = json.loads(outcome.out)
    assert result["output"] == str(tmp_path / "out")
    assert result["outputs"] == {"diffusers": str(tmp_path / "out")}
    same(load_file(tmp_path / "out" / UNET), expected(tiny_sd1, a, b))
    (entry,) = json.loads((tmp_path / "out" / "trce.json").read_text())["history"]
    assert entry["edit"] == "apply"
    assert [edit["file"] for edit in entry["edits"]] == ["a.safetensors", "b.safetensors"]
    assert [edit["form"] for edit in entry["edits"]] == ["map", "map"]
    assert entry["edits"][0]["history"][0]["edit"] == "map"
    assert "weapons" in (tmp_path / "out" / "README.md").read_text()

    # one after the other is the same, and the joined map as well
    assert trce("apply", saved["a"], tiny_sd1, "-o", tmp_path / "first").status == 0
    assert trce("apply", saved["b"], tmp_path / "first", "-o", tmp_path / "second").status == 0
    same(load_file(tmp_path / "second" / UNET), expected(tiny_sd1, a, b))
    history = json.loads((tmp_path / "second" / "trce.json").read_text())["history"]
    assert [entry["edit"] for entry in history] == ["apply", "apply"]
    joined = tmp_path / "joined.safetensors"
    assert trce("apply", saved["a"], saved["b"], tiny_sd1, "-o", joined, "--as", "map").status == 0
    both, first, then = (each.streams["context"].matrix for each in (load_map(joined), a, b))
    torch.testing.assert_close(both, first @ then, rtol=0, atol=1e-6)
    assert [entry["edit"] for entry in load_map(joined).made.history] == ["map", "map", "apply"]


def test_all_forms_at_once_and_a_lora_applied_again(
    trce: Callable[..., Any], saved: dict[str, Path], tiny_sd1: Path, tmp_path: Path
) -> None:
    forms = [part for form in ("diffusers", "single-file", "lora", "map") for part in ("--as", form)]
    size = ("--energy", 1, "--edit-dtype", "fp16")
    outcome = trce("apply", saved["a"], tiny_sd1, "-o", tmp_path / "out", *forms, *size, "--json")
    assert outcome.status == 0, outcome.err
    assert "Truncation error" in outcome.err
    result = json.loads(outcome.out)
    names = ["out", "out.lora.safetensors", "out.map.safetensors", "out.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert {Path(path).name for path in result["outputs"].values()} == set(names)
    assert result["lora"]["truncation_error"]["change"]["max"] < 1e-2
    assert load_file(tmp_path / "out.map.safetensors")["trce_map.change"].dtype == torch.float16
    again = trce("apply", tmp_path / "out.lora.safetensors", tiny_sd1, "-o", tmp_path / "again")
    assert again.status == 0, again.err
    ours, theirs = load_file(tmp_path / "again" / UNET), load_file(tmp_path / "out" / UNET)
    assert all(torch.allclose(value, theirs[key], atol=1e-3) for key, value in ours.items())
    both = trce(
        "apply", tmp_path / "out.lora.safetensors", saved["b"], tiny_sd1, "-o", tmp_path / "x.safetensors",
        "--as", "lora", "--rank", 6,
    )  # fmt: skip
    assert both.status == 0, both.err
    assert trce("apply", tmp_path / "x.safetensors", tiny_sd1, "-o", tmp_path / "xx").status == 0
    wanted = expected(tiny_sd1, load_map(saved["a"]), load_map(saved["b"]))
    ours = load_file(tmp_path / "xx" / UNET)
    assert all(torch.allclose(value, wanted[key], atol=2e-3) for key, value in ours.items())


def fine_tuned(folder: Path, target: Path) -> Path:
    """A copy whose text encoder was trained a little further."""
    shutil.copytree(folder, target)
    path = target / "text_encoder/model.safetensors"
    state = load_file(path)
    save_file({key: value * 1.01 for key, value in state.items()}, path, metadata={"format": "pt"})
    return target


def test_another_text_encoder_needs_leave_and_gets_the_guard_table(
    trce: Callable[..., Any], saved: dict[str, Path], tiny_sd1: Path, tmp_path: Path
) -> None:
    tuned = fine_tuned(tiny_sd1, tmp_path / "tuned")
    refused = trce("apply", saved["a"], tuned, "-o", tmp_path / "out")
    assert refused.status == 2
    assert "--allow-other-text-encoder" in refused.err
    assert not (tmp_path / "out").exists()
    allowed = trce("apply", saved["a"], tuned, "-o", tmp_path / "out", "--allow-other-text-encoder", "--json")
    assert allowed.status == 0, allowed.err
    assert "Guard" in allowed.err
    assert "Warning" in allowed.err
    figures = json.loads(allowed.out)["figures"]
    assert figures["pairs"] > 20
    assert set(figures["projected_cosine_to_safe"]) == {"before", "after"}
    assert 0 < figures["canary_change"]["keys"]["mean"] <= figures["canary_change"]["keys"]["max"]
    same(load_file(tmp_path / "out" / UNET), expected(tuned, load_map(saved["a"])))


def test_a_lora_that_names_no_text_encoder_needs_leave_too(
    trce: Callable[..., Any], tiny_sd1: Path, tmp_path: Path
) -> None:
    layer = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    factors = {f"{layer}.lora_up.weight": torch.ones(16, 1), f"{layer}.lora_down.weight": torch.ones(1, 32)}
    save_file(factors, tmp_path / "lora.safetensors")
    common = ("apply", tmp_path / "lora.safetensors", tiny_sd1, "-o", tmp_path / "out")
    assert trce(*common).status == 2
    assert trce(*common, "--allow-other-text-encoder").status == 0
    key = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    weights = load_file(tiny_sd1 / UNET)
    same(load_file(tmp_path / "out" / UNET), weights | {key: weights[key] + 1})


def test_of_a_lora_that_changes_the_text_encoder_the_rest_alone_is_applied_when_that_is_asked_for(
    trce: Callable[..., Any], tiny_sd1: Path, tmp_path: Path
) -> None:
    layer = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    text = {
        f"lora_te_text_model_encoder_layers_{n}_mlp_fc1.{part}": torch.ones(shape)
        for n in range(3)
        for part, shape in (("lora_up.weight", (64, 1)), ("lora_down.weight", (1, 32)), ("alpha", ()))
    }
    factors = {f"{layer}.lora_up.weight": torch.ones(16, 1), f"{layer}.lora_down.weight": torch.ones(1, 32)}
    save_file(factors | text, tmp_path / "lora.safetensors")
    common = ("apply", tmp_path / "lora.safetensors", tiny_sd1, "-o", tmp_path / "out")
    refused = trce(*common, "--allow-other-text-encoder")
    assert refused.status == 2
    assert "changes 1 layers of the U-Net and 3 of the text encoder" in refused.err
    assert "--denoiser-only" in refused.err
    done = trce(*common, "--allow-other-text-encoder", "--denoiser-only")
    assert done.status == 0, done.err
    assert "Warning: lora.safetensors changes 1 layers of the U-Net and 3 of the text encoder" in done.err
    key = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    weights = load_file(tiny_sd1 / UNET)
    same(load_file(tmp_path / "out" / UNET), weights | {key: weights[key] + 1})
    encoder = "text_encoder/model.safetensors"
    assert (tmp_path / "out" / encoder).read_bytes() == (tiny_sd1 / encoder).read_bytes()
    entry = json.loads((tmp_path / "out/trce.json").read_text())["history"][-1]
    assert entry["settings"]["denoiser_only"] is True
    assert "denoiser_only = true" in trce("inspect", tmp_path / "out", "--recipe").out
    save_file(text, tmp_path / "lora.safetensors")
    alone = trce(*common, "--denoiser-only")
    assert alone.status == 2
    assert "of the text encoder alone (3 layers)" in alone.err


def rounded(source: Path, target: Path, dtype: torch.dtype, noise: float = 0.0) -> Path:
    """A copy whose text encoder is stored in another dtype."""
    shutil.copytree(source, target)
    path = target / "text_encoder/model.safetensors"
    state = {
        key: (value * (1 + noise * torch.randn(value.shape))).to(dtype)
        if value.is_floating_point()
        else value
        for key, value in load_file(path).items()
    }
    save_file(state, path, metadata={"format": "pt"})
    return target


def test_the_very_text_encoder_in_another_dtype_is_that_of_the_map(
    trce: Callable[..., Any], saved: dict[str, Path], tiny_sd1: Path, tmp_path: Path
) -> None:
    half, brain = (rounded(tiny_sd1, tmp_path / str(each)[6:], each) for each in (torch.half, torch.bfloat16))
    of_half = random_map(half, 1).save(tmp_path / "half.safetensors")
    of_brain = random_map(brain, 1).save(tmp_path / "brain.safetensors")
    for edit, checkpoint in (
        (saved["a"], brain), (of_half, brain), (of_brain, brain), (of_brain, half), (of_brain, tiny_sd1),
        (of_half, tiny_sd1), (saved["a"], half),
    ):  # fmt: skip
        told = json.loads(trce("inspect", checkpoint, "--edit", edit, "--json").out)
        assert told["fits"] is True, (edit, checkpoint, told)
    done = trce("apply", saved["a"], brain, "-o", tmp_path / "out")
    assert (done.status, "Warning" in done.err) == (0, False), done.err
    torch.manual_seed(0)
    for dtype in (torch.bfloat16, torch.half, torch.float32):
        tuned = rounded(tiny_sd1, tmp_path / f"tuned-{dtype}", dtype, noise=1e-3)
        assert trce("apply", saved["a"], tuned, "-o", tmp_path / "no").status == 2


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("{a}", "{sd2}", "-o", "{out}"), "SD 2.x"),
        (("{sd1}", "{a}", "-o", "{out}"), "folder"),
        (("absent.safetensors", "{sd1}", "-o", "{out}"), "absent.safetensors"),
        (("{a}", "{sd1}", "-o", "{out}", "--strength", "-1"), "strength"),
        (("{a}", "{sd1}", "-o", "{out}", "--strength", "nan"), "strength"),
        (("{a}", "{sd1}", "-o", "{out}", "--as", "map"), ".safetensors"),
        (("{a}", "{sd1}", "-o", "{sd1}", "--force"), "input"),
        (("{a}", "{sd1}", "-o", "{a}", "--as", "map"), "exists already"),
        (("{a}", "{sd1}", "-o", "{a}", "--as", "map", "--force"), "input itself"),
        (("{a}", "{sd1}", "-o", "{out}", "--rank", "3"), "--as lora"),
        (("{a}", "{sd1}", "-o", "x.safetensors", "--as", "lora", "--rank", "3", "--energy", "1"), "--rank"),
        (("{a}", "{sd1}", "-o", "x.safetensors", "--as", "lora", "--energy", "7"), "energy"),
        (("{a}", "{sd1}", "-o", "x.safetensors", "--as", "map", "--edit-dtype", "bf16"), "fp16"),
        (("{a}", "{sd1}", "-o", "{out}", "--edit-dtype", "fp16"), "--edit-dtype"),
        (("{nan}", "{sd1}", "-o", "{out}"), "NaN"),
        (("{narrow}", "{sd1}", "-o", "{out}", "--allow-other-text-encoder"), "width 8"),
        (("{a}", "{sd1}", "-o", "{out}", "--as", "ckpt"), "ckpt"),
    ],
)
def test_bad_input_is_refused(
    trce: Callable[..., Any],
    saved: dict[str, Path],
    tiny_sd1: Path,
    tiny_sd2: Path,
    tmp_path: Path,
    args: tuple[str, ...],
    said: str,
) -> None:
    a = load_map(saved["a"])
    raw = bytearray(saved["a"].read_bytes())
    raw[-4:] = torch.tensor(torch.nan).numpy().tobytes()
    (tmp_path / "nan.safetensors").write_bytes(raw)
    narrow = LinearMap.of(a.streams["context"].change[:8, :8])
    Map(a.made, {"context": narrow}).save(tmp_path / "narrow.safetensors")
    names = {"a": saved["a"], "sd1": tiny_sd1, "sd2": tiny_sd2, "out": tmp_path / "out"}
    names |= {name: tmp_path / f"{name}.safetensors" for name in ("nan", "narrow")}
    before = sorted(tmp_path.iterdir())
    outcome = trce("apply", *(arg.format(**names) for arg in args))
    assert outcome.status == 2
    assert said in outcome.err
    assert "Traceback" not in outcome.err
    assert sorted(tmp_path.iterdir()) == before
    assert load_map(saved["a"]).made.text_encoder == a.made.text_encoder


def test_what_fp16_cannot_hold_fails_and_leaves_nothing(
    trce: Callable[..., Any], saved: dict[str, Path], tiny_sd1: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(tiny_sd1, tmp_path / "source")
    tiny.add_fp16_variant(source, keep_plain=False)
    outcome = trce("apply", saved["a"], source, "-o", tmp_path / "out", "--strength", "1e12")
    assert outcome.status == 1
    assert "lower strength" in outcome.err
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_form_that_fails_leaves_none_of_the_others(
    trce: Callable[..., Any], tiny_sd1: Path, tmp_path: Path
) -> None:
    place = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k.lora"
    width, wide = load_file(tiny_sd1 / UNET)[
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    ].shape
    nothing = {f"{place}_down.weight": torch.ones(1, wide), f"{place}_up.weight": torch.zeros(width, 1)}
    save_file(nothing, tmp_path / "nothing.safetensors")
    line = ("apply", tmp_path / "nothing.safetensors", tiny_sd1, "--allow-other-text-encoder")
    outcome = trce(*line, "-o", tmp_path / "out", "--as", "single-file", "--as", "lora")
    assert outcome.status == 1
    assert "changes no weight" in outcome.err
    assert [path.name for path in tmp_path.iterdir()] == ["nothing.safetensors"]


def test_a_hint_fails_no_command(
    saved: dict[str, Path], tiny_sd1: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_checkpoint(str(tiny_sd1))

    def fail(name: str) -> None:
        raise OSError(errno.EIO, "Input/output error", name)

    monkeypatch.setattr("trce_cli.checkpoint.open.open_checkpoint", fail)
    assert written._configured(tiny_sd1, source) == []
    assert written._configured(saved["a"], source) == []


def test_every_copy_of_the_unet_is_edited(
    trce: Callable[..., Any], saved: dict[str, Path], tiny_sd1: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(tiny_sd1, tmp_path / "source")
    tiny.add_fp16_variant(source)
    assert trce("apply", saved["a"], source, "-o", tmp_path / "out", "--link").status == 0
    half = load_file(tmp_path / "out/unet/diffusion_pytorch_model.fp16.safetensors")
    wanted = expected(tiny_sd1, load_map(saved["a"]))
    assert all(torch.allclose(value.float(), wanted[key], atol=1e-3) for key, value in half.items())
    assert (
        open_checkpoint(str(tmp_path / "out")).text_encoder_hash() == load_map(saved["a"]).made.text_encoder
    )


def test_an_edit_that_is_there_already_is_said(
    trce: Callable[..., Any], saved: dict[str, Path], tiny_sd1: Path, tmp_path: Path
) -> None:
    once = trce("apply", saved["a"], tiny_sd1, "-o", tmp_path / "once")
    assert "already" not in once.err
    twice = trce("apply", saved["a"], tmp_path / "once", "-o", tmp_path / "twice", "--quiet")
    assert twice.status == 0
    assert f"Warning: {tmp_path / 'once'} carries a.safetensors already" in twice.err


def test_an_edit_that_was_solved_twice_is_there_already(
    trce: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    few = ("map", "emoji", "-p", "emoji-substances", "--word-share", "0", "--quiet")
    assert trce(*few, "-o", "erased").status == 0
    assert trce(*few, "-o", "again.safetensors", "--as", "map").status == 0
    entries = json.loads((tmp_path / "erased/trce.json").read_text())["history"]
    entries[0] |= {"date": "2020-01-01T00:00:00+00:00", "seconds": 1.0}  # whatever this machine's pace is
    (tmp_path / "erased/trce.json").write_text(json.dumps({"schema": 1, "history": entries}))
    applied = trce("apply", "again.safetensors", "erased", "-o", "twice", "--dry-run")
    assert "Warning: erased carries again.safetensors already" in applied.err
    assert "already" not in trce("apply", "again.safetensors", "emoji", "-o", "once", "--dry-run").err
