"""Fine-tuned vocabularies: added tokens with rows and without, and where a prompt is pooled then."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from maps import random_map
from trce_cli.checkpoint.open import open_checkpoint
from trce_cli.families.clip.spec import POOLED

CPU = torch.device("cpu")


def add_token(folder: Path, part: str, rows: int) -> None:
    """The tokenizer knows <knife>, and the text encoder has so many more rows."""
    vocab, _ = tiny.vocabulary()
    tokenizer = folder / part.replace("text_encoder", "tokenizer")
    (tokenizer / "added_tokens.json").write_text(json.dumps({"<knife>": len(vocab)}))
    config = json.loads((folder / part / "config.json").read_text())
    (folder / part / "config.json").write_text(json.dumps(config | {"vocab_size": len(vocab) + rows}))
    state = load_file(folder / part / "model.safetensors")
    key = "text_model.embeddings.token_embedding.weight"
    state[key] = torch.cat([state[key], torch.randn(rows, state[key].shape[1])])
    save_file(state, folder / part / "model.safetensors", {"format": "pt"})


def test_a_token_without_a_row_is_one_sentence(trce: Callable, tiny_sd1: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_sd1, tmp_path / "in"))
    add_token(folder, "text_encoder", rows=0)
    for command in (("map", folder, "-p", "weapons"), ("generate", folder, "a <knife>", "--steps", 2)):
        done = trce(*command, "-o", tmp_path / "out")
        assert done.status == 2
        assert "none for 1 tokens such as '<knife>'" in done.err
        assert not list(tmp_path.glob("out/*.png"))
        assert not (tmp_path / "out/model_index.json").exists()


def test_a_prompt_is_pooled_where_the_pipeline_does_it(tiny_sdxl: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_sdxl, tmp_path / "in"))
    for part in ("text_encoder", "text_encoder_2"):
        add_token(folder, part, rows=1)
    checkpoint = open_checkpoint(str(folder))
    text = checkpoint.family.text(checkpoint, CPU, torch.float32)
    prompts = ["a <knife> on the table", "a dog in the garden"]
    pipe = checkpoint.pipe(CPU, torch.float32)
    wanted = {POOLED: text.content(prompts)[POOLED]}
    (batch,) = text.states(wanted)
    for prompt in prompts:
        expected = pipe.encode_prompt(prompt, do_classifier_free_guidance=False)[2][0]
        (row,) = batch[POOLED].rows[prompt]
        torch.testing.assert_close(batch[POOLED].embeddings[row], expected, rtol=1e-4, atol=1e-5)
    assert wanted[POOLED][prompts[0]] == [2]  # of the added token, whose id is the highest


def test_other_readers_refuse_a_single_file_of_another_vocabulary(
    trce: Callable, tiny_sd1: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_sd1, tmp_path / "in"))
    add_token(folder, "text_encoder", rows=1)
    edit, rows = random_map(folder).save(tmp_path / "map.safetensors"), len(tiny.vocabulary()[0]) + 1
    for name, status in (("out.safetensors", True), ("out", False)):
        done = trce("apply", edit, folder, "-o", tmp_path / name)
        assert done.status == 0, done.err
        said = f"Other tools refuse a single file whose text_encoder has {rows:,} tokens." in done.err
        assert said == status


@pytest.mark.parametrize("family", ["sd1", "flux", "z-image"])
def test_prompts_are_counted_in_silence(
    family: str, request: pytest.FixtureRequest, capfd: pytest.CaptureFixture[str]
) -> None:
    checkpoint = open_checkpoint(str(request.getfixturevalue(f"tiny_{family}")))
    capfd.readouterr()
    limit, cut = checkpoint.family.truncated(checkpoint, ["a cat in the morning rain " * 400])
    assert (limit > 0, cut) == (True, 1)
    assert capfd.readouterr().err == ""  # the library would warn of what the program tells itself


def test_prompts_that_are_cut_are_told(trce: Callable, tiny_sd1: Path, tmp_path: Path) -> None:
    preset = tmp_path / "long.toml"
    assert trce("presets", "new", preset).status == 0
    text = preset.read_text()
    preset.write_text(text.replace("a slot machine", "a slot machine" + " in the morning rain" * 40))
    told = trce("presets", "check", preset)
    assert told.status == 0, told.err
    assert "are longer and cut" in told.err
    for command in ("map", "steer", "tune"):
        line = (command, tiny_sd1, "-p", preset, "--device", "cpu")
        more = ("--detector", "none") if command == "tune" else ()  # it is told before a detector is sought
        done = trce(*line, *more, "-o", tmp_path / "out", "--dry-run")
        assert done.status == (2 if more else 0), done.err
        assert done.err.count("are longer and cut") == 1, command
