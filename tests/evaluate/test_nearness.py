"""Near bystanders apart from far ones."""

from pathlib import Path

import torch
from transformers import CLIPTextModel, CLIPTokenizer

from trce_cli.checkpoint.open import open_checkpoint
from trce_cli.evaluate.nearness import near_and_far
from trce_cli.prompts.files import Prompt
from trce_cli.prompts.home import REAL_WORLD
from trce_cli.prompts.presets import load_presets
from trce_cli.prompts.suites import Suite, built_in_suite


def test_near_is_the_third_that_the_text_encoder_puts_closest(tiny_sd1: Path) -> None:
    presets = load_presets(["artist-van-gogh"])
    suite = built_in_suite("bystanders", presets, REAL_WORLD, 40, 0)
    assert suite is not None
    assert suite.subjects is not None
    told = near_and_far(suite, presets, open_checkpoint(str(tiny_sd1)))
    assert told.groups is not None

    tokenizer = CLIPTokenizer.from_pretrained(tiny_sd1 / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(tiny_sd1 / "text_encoder")
    unsafe = list(dict.fromkeys(concept.unsafe for concept in presets[0].concepts))
    subjects = list(dict.fromkeys(suite.subjects))

    def end_of_text(phrase: str) -> torch.Tensor:
        ids = tokenizer(phrase, return_tensors="pt").input_ids
        with torch.no_grad():
            return torch.as_tensor(encoder(ids).last_hidden_state[0, -1])

    found = {phrase: end_of_text(phrase) for phrase in [*subjects, *unsafe]}
    mean = sum(found[phrase] for phrase in [*subjects, *unsafe]) / (len(subjects) + len(unsafe))
    closest = {
        subject: max(
            float(torch.cosine_similarity(found[subject] - mean, found[phrase] - mean, dim=0))
            for phrase in unsafe
        )
        for subject in subjects
    }
    near = {subject for subject, group in zip(suite.subjects, told.groups, strict=True) if group == "near"}
    assert len(near) == -(-len(subjects) // 3)
    least = min(closest[subject] for subject in near)
    assert all(closest[subject] <= least + 1e-4 for subject in set(subjects) - near)


def test_a_cigarette_is_nearer_to_a_cigar_than_a_cactus_is(tmp_path: Path) -> None:
    path = tmp_path / "cigars.toml"
    concept = '[[concepts]]\nunsafe = "a cigar"\nsafe = "a carrot"\n'
    path.write_text(f'name = "cigars"\ndescription = "d"\nkind = "object"\n{concept}')
    presets = load_presets([path])
    asked = ("cactus", "a cigarette", "penguin")
    prompts = tuple(Prompt(f"a photo of {each}") for each in asked)
    suite = Suite("bystanders", "benign", prompts, "-", subjects=asked)
    assert near_and_far(suite, presets, open_checkpoint("emoji")).groups == ("far", "near", "far")
