"""`trce map` as its users meet it: whole outputs, exact weights, refusals in one sentence, no remains."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import tiny
from trce_cli import load_map
from trce_cli.cli.map import _guard_table
from trce_cli.cli.written import NO_LIMIT
from trce_cli.erase import map as mapping
from trce_cli.maths.linear_map import LinearMap

UNET = "unet/diffusion_pytorch_model.safetensors"
TEXT_ENCODER = "text_encoder/model.safetensors"

PRESET = """
name = "blades"
description = "Blades"
kind = "object"
templates = ["{}", "a photo of {}", "a drawing of {} on a table"]
concepts = [
    { unsafe = "a knife", safe = "a tulip" },
    { unsafe = "a sharp dagger", safe = "two red apples" },
]
[map]
preserve = 0.5
"""
CAPTIONS = [*tiny.SENTENCES, "a dog", "a cat", "portrait of a man", "a bowl of fruit", "a river in the rain"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRCE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with a preset and a prior."""
    (tmp_path / "blades.toml").write_text(PRESET)
    (tmp_path / "captions.txt").write_text("\n".join(CAPTIONS))
    return tmp_path


@pytest.fixture
def map_(trce: Callable[..., Any], files: Path) -> Callable[..., Any]:
    """Run `trce map` with the preset and the prior above."""

    def run(checkpoint: Path, output: Path, *args: Any) -> Any:
        common = ("--preset", files / "blades.toml", "--prior", files / "captions.txt")
        return trce("map", checkpoint, "--output", output, *common, *args)

    return run


def tree(folder: Path) -> dict[str, str]:
    """Every file of the folder by its hash."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def is_projection(key: str) -> bool:
    return key.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))


def solved(folder: Path, files: Path, preserve: float = 0.5) -> LinearMap:
    """The map that the command has to use, from the library."""
    from trce_cli.checkpoint.open import open_checkpoint
    from trce_cli.erase.prior import choose_prior
    from trce_cli.erase.settings import MapSettings
    from trce_cli.prompts.pairs import prompt_pairs
    from trce_cli.prompts.presets import load_preset

    checkpoint = open_checkpoint(str(folder))
    pairs = prompt_pairs([load_preset(files / "blades.toml")])
    prior = choose_prior(checkpoint, files / "captions.txt")
    return mapping.solve(checkpoint, pairs, prior, MapSettings(preserve=preserve)).streams["context"]


def test_output_is_a_whole_checkpoint_with_nothing_but_the_projections_changed(
    map_: Callable[..., Any], tiny_sd1: Path, files: Path
) -> None:
    before = tree(tiny_sd1)
    output = files / "deep" / "out"
    outcome = map_(tiny_sd1, output)
    assert outcome.status == 0
    assert "Cosine" in outcome.out
    assert str(output) in outcome.err
    assert tree(tiny_sd1) == before

    after = tree(output)
    assert set(after) - set(before) == {"trce.json", "README.md"}
    assert {name for name in before if after[name] != before[name]} == {UNET}
    old, new = load_file(tiny_sd1 / UNET), load_file(output / UNET)
    text_map = solved(tiny_sd1, files)
    for key, weight in old.items():
        expected = text_map.edit(weight).float() if is_projection(key) else weight
        assert new[key].dtype == weight.dtype
        assert torch.equal(new[key], expected)
    assert not list(files.rglob(".*"))

    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(output, local_files_only=True)
    image = pipe("a knife", num_inference_steps=1, height=16, width=16, output_type="pt").images
    assert bool(torch.isfinite(image).all())


def test_provenance_says_what_was_done_and_repeats_it(
    map_: Callable[..., Any], tiny_sd1: Path, files: Path
) -> None:
    outcome = map_(tiny_sd1, files / "out", "--json", "--strength", "0.8", "--token-weights", "0,1,0.01,0")
    result = json.loads(outcome.out)
    (entry,) = json.loads((files / "out" / "trce.json").read_text())["history"]
    out = str(files / "out")
    assert {"output": out, "outputs": {"diffusers": out}, **entry} == result
    settings = entry["settings"]
    assert (settings["preserve"], settings["strength"]) == (0.5, 0.8)  # the preset's, the user's
    assert settings["token_weights"] == [0, 1, 0.01, 0]
    assert settings["dtype"] == "float32"
    assert (
        entry["figures"]["cosine_to_safe"]["after"]["mean"]
        > entry["figures"]["cosine_to_safe"]["before"]["mean"]
    )
    assert entry["figures"]["canaries"] == 200
    assert entry["figures"]["bystanders"] >= 100
    assert set(entry["figures"]["bystander_change"]) == {"keys", "values"}
    assert entry["peak_memory_bytes"] > 0
    card = (files / "out" / "README.md").read_text()
    assert "blades" in card

    weights = ",".join(map(str, settings["token_weights"]))
    again = (
        "--preserve",
        settings["preserve"],
        "--strength",
        settings["strength"],
        "--token-weights",
        weights,
    )
    assert map_(tiny_sd1, files / "again", *again).status == 0
    assert (files / "again" / UNET).read_bytes() == (files / "out" / UNET).read_bytes()


def test_an_edited_checkpoint_can_be_edited_again(
    map_: Callable[..., Any], tiny_sd1: Path, files: Path
) -> None:
    assert map_(tiny_sd1, files / "once").status == 0
    assert map_(files / "once", files / "twice", "--preserve", "3").status == 0
    history = json.loads((files / "twice" / "trce.json").read_text())["history"]
    assert [entry["settings"]["preserve"] for entry in history] == [0.5, 3]


def test_every_copy_of_the_unet_is_edited_in_its_own_dtype(
    map_: Callable[..., Any], tiny_sd1: Path, files: Path
) -> None:
    source = shutil.copytree(tiny_sd1, files / "source")
    tiny.add_fp16_variant(source)
    tiny.shard(source)
    assert map_(source, files / "out").status == 0
    text_map = solved(source, files)
    for path in sorted(source.glob("unet/*.safetensors")):
        old, new = load_file(path), load_file(files / "out" / "unet" / path.name)
        assert old.keys() == new.keys()
        for key, weight in old.items():
            expected = text_map.edit(weight).to(weight.dtype) if is_projection(key) else weight
            assert torch.equal(new[key], expected)
    assert map_(source, files / "half", "--variant", "fp16").status == 0


def test_presets_are_solved_jointly(trce: Callable[..., Any], tiny_sd1: Path, files: Path) -> None:
    one, other = PRESET.replace('    { unsafe = "a sharp dagger", safe = "two red apples" },\n', ""), PRESET
    (files / "one.toml").write_text(one)
    (files / "other.toml").write_text(
        other.replace('    { unsafe = "a knife", safe = "a tulip" },\n', "").replace("0.5", "4.0")
    )
    common = ("--prior", files / "captions.txt", "--json")
    presets = ("--preset", files / "one.toml", "--preset", files / "other.toml")
    joint = trce("map", tiny_sd1, "-o", files / "joint", *presets, *common)
    single = trce("map", tiny_sd1, "-o", files / "single", "--preset", files / "blades.toml", *common)
    assert joint.status == single.status == 0
    assert "0.5 is used" in joint.err  # the presets recommend different values
    weights = [load_file(files / name / UNET) for name in ("joint", "single")]
    for key in weights[0]:
        torch.testing.assert_close(weights[0][key], weights[1][key], rtol=1e-5, atol=1e-6)


def test_dry_run_shows_the_plan_and_writes_nothing(
    map_: Callable[..., Any], tiny_sd1: Path, files: Path
) -> None:
    before = tree(files)
    human = map_(tiny_sd1, files / "out", "--dry-run")
    plan = json.loads(map_(tiny_sd1, files / "out", "--dry-run", "--json").out)
    assert human.status == 0
    assert plan["pairs"] == 6
    assert len(plan["layers"]) == 32
    assert "32, named by --json" in human.out
    assert {"memory_bytes", "disk_bytes", "free_disk_bytes"} <= plan.keys()
    assert tree(files) == before


def test_json_and_quiet_keep_the_streams_apart(map_: Callable[..., Any], tiny_sd1: Path, files: Path) -> None:
    outcome = map_(tiny_sd1, files / "a", "--json")
    json.loads(outcome.out)
    assert "Cosine" in outcome.err
    quiet = map_(tiny_sd1, files / "b", "--quiet")
    assert (quiet.status, quiet.out) == (0, "")
    assert all(line.startswith("Warning: ") for line in quiet.err.splitlines())  # of guards that are not good


def test_an_existing_output_needs_force(map_: Callable[..., Any], tiny_sd1: Path, files: Path) -> None:
    assert map_(tiny_sd1, files / "out").status == 0
    before = tree(files / "out")
    refused = map_(tiny_sd1, files / "out", "--strength", "0.5")
    assert refused.status == 2
    assert "--force" in refused.err
    assert tree(files / "out") == before
    assert map_(tiny_sd1, files / "out", "--strength", "0.5", "--force").status == 0
    assert tree(files / "out")[UNET] != before[UNET]


@pytest.mark.parametrize("place", [".", "inside", "unet", ".."])
def test_output_and_input_must_lie_apart(
    map_: Callable[..., Any], tiny_sd1: Path, files: Path, place: str
) -> None:
    source = shutil.copytree(tiny_sd1, files / "models" / "source")
    before = tree(source)
    outcome = map_(source, source / place, "--force")
    assert outcome.status == 2
    assert tree(source) == before


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--preserve", "-1"), "-1"),
        (("--preserve", "nan"), "nan"),
        (("--strength", "inf"), "inf"),
        (("--deflate", "1"), "1"),
        (("--token-weights", "0,0,0,0"), "0"),
        (("--token-weights", "1,2,3"), "1"),
        (("--token-weights", "a,b,c,d"), "a,b,c,d"),
        (("--dtype", "int8"), "int8"),
        (("--device", "tpu"), "tpu"),
        (("--preset", "no-such-preset"), "no-such-preset"),
        (("--prior", "no-such-file.txt"), "no-such-file.txt"),
    ],
)
def test_wrong_values_are_named_and_exit_with_2(
    map_: Callable[..., Any], tiny_sd1: Path, files: Path, args: tuple[str, ...], said: str
) -> None:
    outcome = map_(tiny_sd1, files / "out", *args)
    assert outcome.status == 2
    assert said in outcome.err
    assert "Traceback" not in outcome.err
    assert not (files / "out").exists()


@pytest.mark.parametrize(
    "damage", ["cut unet", "cut text encoder", "pickle", "nan projection", "inf text encoder", "no unet"]
)
def test_broken_checkpoints_are_refused_in_one_sentence(
    map_: Callable[..., Any], tiny_sd1: Path, files: Path, damage: str
) -> None:
    source = shutil.copytree(tiny_sd1, files / "source")
    unet, text_encoder = source / UNET, source / TEXT_ENCODER
    match damage:
        case "cut unet":
            unet.write_bytes(unet.read_bytes()[:-1000])
        case "cut text encoder":
            text_encoder.write_bytes(text_encoder.read_bytes()[:-1000])
        case "pickle":
            torch.save({}, unet)
        case "nan projection":
            weights = load_file(unet)
            key = [key for key in weights if is_projection(key)][-1]
            weights[key][0, 0] = torch.nan
            save_file(weights, unet)
        case "inf text encoder":
            weights = load_file(text_encoder)
            weights["text_model.embeddings.token_embedding.weight"][0, 0] = torch.inf
            save_file(weights, text_encoder)
        case "no unet":
            unet.unlink()
    outcome = map_(source, files / "out")
    assert outcome.status == 2
    assert outcome.err.startswith("Error: ")
    assert len(outcome.err.strip().splitlines()) <= 2
    assert not [path for path in files.iterdir() if "out" in path.name]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--strength", "0"), "would do nothing"),
        (("--preserve", "1e12"), "would do nothing"),
        (("--token-weights", "1,0,0,0"), "would do nothing"),
        (("--strength", "1e20"), "more than the --max-collateral"),
        (("--strength", "1e200"), "not finite"),
    ],
)
def test_an_edit_that_does_nothing_or_is_ruinous_fails(
    map_: Callable[..., Any], tiny_sd1: Path, files: Path, args: tuple[str, ...], said: str
) -> None:
    outcome = map_(tiny_sd1, files / "out", *args)
    assert outcome.status == 1
    assert said in outcome.err
    assert not [path for path in files.iterdir() if "out" in path.name]


def test_a_ruinous_edit_is_judged_and_refused_unless_it_is_asked_for(
    map_: Callable[..., Any], tiny_sd1: Path, files: Path
) -> None:
    refused = map_(tiny_sd1, files / "out", "--max-collateral", "0.01")
    assert refused.status == 1
    assert "--max-collateral of 1%" in refused.err
    assert "15 captions" in refused.err
    assert not [path for path in files.iterdir() if "out" in path.name]
    written = map_(tiny_sd1, files / "out", "--max-collateral", "9", "--json")
    assert written.status == 0
    verdicts = json.loads(written.out)["figures"]["verdicts"]
    assert verdicts.keys() == {"moved", "padding_moved", "canary_change", "word_change", "norm"}
    assert "Warning: Bad: " in written.err  # one sentence for all, and in the table each with its limit
    assert all(f"{verdicts[name]['verdict']} (" in written.err for name in verdicts)
    assert "Next: trce generate" in written.err
    table = _guard_table(json.loads(written.out)["figures"])
    told = list(zip(*(column.cells for column in table.columns), strict=True))
    judged = {row[0]: row[3] for row in told if row[3] != NO_LIMIT}
    assert all(word in ("good", "weak", "bad") for word in (told.split(" (")[0] for told in judged.values()))
    assert {"Change of keys, 200 canary captions"} < judged.keys() < {row[0] for row in told}


def test_what_is_read_is_not_replaced(map_: Callable[..., Any], tiny_sd1: Path, files: Path) -> None:
    assert map_(tiny_sd1, files / "out").status == 0
    (files / "captions.txt").rename(files / "out/captions.txt")
    (files / "captions.txt").symlink_to("out/captions.txt")
    outcome = map_(tiny_sd1, files / "out", "--force")
    assert outcome.status == 2
    assert "captions.txt, which is read" in outcome.err
    assert (files / "out/captions.txt").exists()


def test_a_cache_that_cannot_be_written_costs_no_edit(
    map_: Callable[..., Any], tiny_sd1: Path, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*args: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: Permission denied (os error 13)")

    monkeypatch.setattr("safetensors.torch.save_file", refused)
    outcome = map_(tiny_sd1, files / "out")
    assert outcome.status == 0, outcome.err


def test_an_empty_prior_is_refused(map_: Callable[..., Any], tiny_sd1: Path, files: Path) -> None:
    (files / "captions.txt").write_text("\n \n")
    outcome = map_(tiny_sd1, files / "out")
    assert outcome.status == 2
    assert "captions.txt" in outcome.err


@pytest.mark.parametrize("family", ["sd2", "sdxl"])
def test_other_families_are_edited_wherever_text_enters(
    map_: Callable[..., Any], family: str, request: pytest.FixtureRequest, files: Path
) -> None:
    source = request.getfixturevalue(f"tiny_{family}")
    outcome = map_(source, files / "out", "--json")
    assert outcome.status == 0, outcome.err
    old, new = load_file(source / UNET), load_file(files / "out" / UNET)
    pooled = {"add_embedding.linear_1.weight"} if family == "sdxl" else set()
    changed = {key for key in old if not torch.equal(old[key], new[key])}
    assert changed == {key for key in old if is_projection(key)} | pooled
    for key in pooled:
        assert torch.equal(old[key][:, 40:], new[key][:, 40:])  # the picture's sizes enter there
    entry = json.loads(outcome.out)
    assert ("Pooled" in outcome.err) == ("pooled" in entry["figures"]) == bool(pooled)
    assert entry["settings"].get("pooled") == (True if pooled else None)


def test_the_pooled_embedding_can_be_left_alone(
    map_: Callable[..., Any], tiny_sdxl: Path, files: Path
) -> None:
    outcome = map_(tiny_sdxl, files / "out", "--no-pooled", "--json")
    assert outcome.status == 0, outcome.err
    old, new = load_file(tiny_sdxl / UNET), load_file(files / "out" / UNET)
    assert {key for key in old if not torch.equal(old[key], new[key])} == set(filter(is_projection, old))
    entry = json.loads(outcome.out)
    assert entry["settings"]["pooled"] is False
    assert "pooled" not in entry["figures"]


def test_ctrl_c_while_writing_leaves_nothing(
    map_: Callable[..., Any], tiny_sd1: Path, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(linear: LinearMap, weight: torch.Tensor) -> torch.Tensor:
        raise KeyboardInterrupt

    monkeypatch.setattr(LinearMap, "edit", interrupt)
    assert map_(tiny_sd1, files / "out").status == 130
    assert not [path for path in files.iterdir() if "out" in path.name]


def test_an_output_called_safetensors_is_a_file_and_the_next_command_is_told(
    map_: Callable[..., Any], tiny_sd1: Path, files: Path
) -> None:
    outcome = map_(tiny_sd1, files / "out.safetensors")
    assert (files / "out.safetensors").is_file()
    assert f"trce generate {files / 'out.safetensors'} 'a knife' --compare {tiny_sd1}" in outcome.err
    outcome = map_(tiny_sd1, files / "edit.safetensors", "--as", "map")
    assert f"trce apply {files / 'edit.safetensors'} {tiny_sd1}" in outcome.err


def test_every_form_at_once(map_: Callable[..., Any], tiny_sd1: Path, files: Path) -> None:
    forms = [part for form in ("map", "lora", "single-file", "diffusers") for part in ("--as", form)]
    outcome = map_(tiny_sd1, files / "out", *forms, "--json")
    assert outcome.status == 0, outcome.err
    assert "Truncation error" in outcome.err
    result = json.loads(outcome.out)
    found = {path.name for path in files.iterdir() if path.name.startswith("out")}
    assert found == {"out", "out.safetensors", "out.lora.safetensors", "out.map.safetensors"}
    assert set(result["outputs"]) == {"map", "lora", "single-file", "diffusers"}
    assert result["lora"]["shared_energy"] >= 0.999
    text_map = load_map(files / "out.map.safetensors")
    assert text_map.made.history[0]["presets"][0]["name"] == "blades"
    ours = solved(tiny_sd1, files)
    torch.testing.assert_close(text_map.streams["context"].change, ours.change, rtol=1e-6, atol=1e-7)


def test_the_python_interface_solves_what_the_command_solves(
    map_: Callable[..., Any], tiny_sd1: Path, files: Path
) -> None:
    import trce_cli

    given = ("--strength", "0.7", "--deflate", "0.5", "--device", "cpu")
    outcome = map_(tiny_sd1, files / "edit.safetensors", "--as", "map", *given)
    assert outcome.status == 0, outcome.err
    ours = trce_cli.solve_map(
        tiny_sd1, files / "blades.toml", prior=files / "captions.txt", strength=0.7, deflate=0.5
    )
    theirs = load_map(files / "edit.safetensors")
    taken = theirs.made.history[0]["figures"]["deflated"]
    assert taken > 0
    assert re.search(rf"Dimensions taken away, of \d+ +│ +│ {taken} +│", outcome.out)
    changes = [each.streams["context"].change for each in (ours, theirs)]
    torch.testing.assert_close(*changes, rtol=1e-6, atol=1e-7)
    for name in ("settings", "presets", "base"):
        assert json.loads(json.dumps(ours.made.history[0][name])) == theirs.made.history[0][name]
    assert ours.made.history[0]["figures"]["moved"] == theirs.made.history[0]["figures"]["moved"]


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_a_clip_skip_that_a_family_is_not_read_with_is_refused(
    trce: Any, tiny_sdxl: Path, tmp_path: Path, dry: list[str]
) -> None:
    asked = ("map", tiny_sdxl, "--preset", "weapons", "--clip-skip", "2", "-o", tmp_path / "out", *dry)
    told = trce(*asked)
    assert (told.status, (tmp_path / "out").exists()) == (2, False)
    assert "is not read with a clip skip of 2" in told.err
    assert "one layer alone" in told.err


def test_presets_of_the_embedded_world_are_named_where_only_others_were_chosen(
    trce: Callable[..., Any], files: Path
) -> None:
    for preset, is_told in (("weapons", True), ("emoji-weapons", False)):
        outcome = trce("map", "emoji-dit", "-p", preset, "-o", files / "out", "--dry-run")
        assert outcome.status == 0, outcome.err
        assert ("made for it: emoji-substances, emoji-weapons." in outcome.err) is is_told
        assert ("made for it" in outcome.err) is is_told
