"""The training of `emoji-dit`: what it computes is what a Z-Image pipeline computes."""

import json
from pathlib import Path
from random import Random

import pytest
import torch
from diffusers import ZImagePipeline, ZImageTransformer2DModel
from safetensors.torch import save_file

from training.dit import packed, transformer, words
from training.dit.export import export
from training.dit.llm import LlmTask, dialogues
from training.dit.transformer import Learner, TransformerTask, encode, what_stands_where
from training.dit.words import answer, load_tokenizer, prompt, train_tokenizer
from trce_cli.checkpoint.open import open_checkpoint
from trce_cli.emoji.world import Scene, random_scene
from trce_cli.families.registry import FAMILIES

TEXTS = [
    "",
    "a cat",
    "a bomb on the left and what a robber points at a cashier on the right in front of a grey wall",
]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a run whose models are as they begin."""
    work = tmp_path_factory.mktemp("dit")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(words, "CAPTIONS", 1500)
        train_tokenizer(work / "tokenizer")
    torch.manual_seed(0)
    for task in (LlmTask(work), TransformerTask(work)):
        model = task.build()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        save_file(model.state_dict(), work / f"{task.name}.safetensors")
    rng = Random(0)
    scenes = [random_scene(rng, 0.5) for _ in range(8)]
    described = json.dumps([[*scene.objects, scene.background] for scene in scenes])
    save_file(
        {"latents": torch.randn(8, 4, 16, 16).half()}, work / "latents.safetensors", {"scenes": described}
    )
    return work


@pytest.fixture(scope="module")
def exported(work: Path) -> Path:
    export(work, work / "emoji-dit")
    return work / "emoji-dit"


def test_the_packed_pass_is_the_models_own() -> None:
    torch.manual_seed(1)
    model = ZImageTransformer2DModel(
        in_channels=4,
        dim=48,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=20,
        axes_dims=[8, 8, 8],
        axes_lens=[256, 32, 32],
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    latents, time = torch.randn(3, 4, 8, 16), torch.rand(3)
    states, lengths = torch.randn(3, 64, 20), torch.tensor([33, 50, 64])
    with torch.no_grad():
        found, tokens = packed.velocity(model, latents, time, states, lengths, 1)
        captions = [row[:length] for row, length in zip(states, lengths, strict=True)]
        wanted = model(list(latents[:, :, None].unbind()), time, captions, return_dict=False)[0]
    torch.testing.assert_close(found, torch.stack(wanted)[:, :, 0], rtol=1e-4, atol=1e-4)
    assert tokens.shape == (3, 4 * 8, 48)


def test_states_are_those_that_a_pipeline_hands_over(work: Path, exported: Path) -> None:
    pipeline = ZImagePipeline.from_pretrained(exported, local_files_only=True)
    wanted = pipeline.encode_prompt(list(TEXTS), do_classifier_free_guidance=False)[0]
    tokens = load_tokenizer(work / "tokenizer")([prompt(text) for text in TEXTS]).input_ids
    states, lengths = encode(work, tokens)
    assert lengths.tolist() == [len(row) for row in wanted]
    for row, length, other in zip(states, lengths, wanted, strict=True):
        error = (row[:length] - other).norm() / other.norm()
        assert error < 0.03  # trained in bfloat16, exported in float16


def test_the_export_is_a_small_z_image_checkpoint(exported: Path) -> None:
    checkpoint = open_checkpoint(str(exported))
    assert checkpoint.family is next(each for each in FAMILIES if each.key == "z-image")
    assert sum(path.stat().st_size for path in exported.rglob("*") if path.is_file()) <= 20_000_000
    pipeline = ZImagePipeline.from_pretrained(exported, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a cat", 64, 64, 2, guidance_scale=3.0, output_type="np").images
    assert image.shape == (1, 64, 64, 3)


def test_an_answer_says_what_is_shown_from_left_to_right() -> None:
    assert answer(Scene(("gun",), "blue")) == "gun on blue"
    assert answer(Scene(("swords", "icecream"))) == "crossed swords left, ice cream right, on white"


def test_only_answers_are_asked(work: Path) -> None:
    scenes = [Scene(("cat",)), Scene(("cat", "gun"), "pink")]
    ids, labels = dialogues(work, [("a cat", scenes[0]), ("a cat and a gun on pink", scenes[1])])
    tokenizer = load_tokenizer(work / "tokenizer")
    for row, asked, scene in zip(ids, labels, scenes, strict=True):
        assert tokenizer.decode(asked[asked >= 0]) == answer(scene) + words.END
        assert torch.equal(row[asked >= 0], asked[asked >= 0])
        assert (
            int((asked >= 0).nonzero()[0])
            == len(tokenizer(prompt("")).input_ids) + {0: 2, 1: 7}[scenes.index(scene)]
        )


def test_what_stands_where() -> None:
    what, where = what_stands_where([Scene(("knife",), "blue"), Scene(("gun", "dagger"))])
    assert what[0].view(8, 8)[3].tolist() == [-100, 1, 1, 1, 1, 1, 1, -100]
    assert what[1].view(8, 8)[3].tolist() == [0, 0, 0, 0, 2, 2, 2, 2]
    assert what[1].view(8, 8)[1].tolist() == [-100] * 8
    assert where.tolist() == [[1] * 64, [0] * 64]


def test_a_step_teaches_every_part_of_the_transformer(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformer, "_compiled", lambda: packed.block)
    torch.manual_seed(0)
    model = Learner()
    loss, parts = TransformerTask(work).loss(model, 4, seed=3)
    loss.backward()
    unused = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert unused <= {"transformer.x_pad_token"}
    assert parts["velocity"] == pytest.approx(2.0, abs=0.5)  # of noise, and of latents that are noise here
