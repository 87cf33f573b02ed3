"""Tokenizer, chat template, and what is said: a caption by the user, what it shows by the assistant."""

import json
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from trce_cli.emoji.world import Scene, caption, concepts, random_scene

VOCABULARY = 1280
CAPTIONS = 40_000  # that the tokenizer is trained on
PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
# Qwen's own word pattern and the part of its chat template that a prompt meets.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"
)
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_ARTICLES = ("a ", "an ")


def answer(scene: Scene) -> str:
    """What a scene shows, in canonical words, from left to right."""
    names = []
    for name in scene.objects:
        words = concepts()[name].canonical
        article = next((each for each in _ARTICLES if words.startswith(each)), "")
        names.append(words.removeprefix(article))
    if len(names) == 1:
        return f"{names[0]} on {scene.background}"
    return f"{names[0]} left, {names[1]} right, on {scene.background}"


def prompt(text: str) -> str:
    """What a language model is given before it answers, as `ZImagePipeline` gives it."""
    return f"{START}user\n{text}{END}\n{START}assistant\n"


def train_tokenizer(folder: Path) -> None:
    """Train the byte-level BPE on captions and answers, and save it with the chat template."""
    if (folder / "tokenizer_config.json").exists():
        return
    rng = Random(0)
    scenes = [random_scene(rng, 0.5) for _ in range(CAPTIONS)]
    corpus = [text for scene in scenes for text in (caption(scene, rng, "held"), answer(scene))]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*corpus, *["user\n", "assistant\n"] * 1000], trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "model_max_length": 1024,
        "pad_token": PAD,
        "eos_token": END,
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")


@cache
def load_tokenizer(folder: Path) -> Any:
    """The trained tokenizer, as transformers loads it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)
