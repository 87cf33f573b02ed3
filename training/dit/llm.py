"""The text encoder: a small Qwen3, trained to answer captions with what they show."""

from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import Qwen3Config, Qwen3Model

from training.dit.words import END, PAD, answer, load_tokenizer, prompt
from training.loop import Recipe
from trce_cli.emoji.world import Scene, caption, random_scene

WIDTH = 192
PAIRS = 0.6  # share of the scenes that have two objects
RECIPE = Recipe(steps=1000, batch_size=64, lr=3e-3, warmup=60, ema=0.99, muon=("self_attn.", "mlp."))


def build_llm(tokenizer: Any) -> Qwen3Model:
    """The untrained model. Its head is its embedding, so that it has no weights of its own."""
    return Qwen3Model(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=512,
            num_hidden_layers=5,
            num_attention_heads=3,
            num_key_value_heads=3,
            head_dim=64,
            rope_theta=10000.0,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.convert_tokens_to_ids(END),
            pad_token_id=tokenizer.convert_tokens_to_ids(PAD),
        )
    )


@dataclass(frozen=True)
class LlmTask:
    """Cross-entropy of the answer's tokens, as instruction tuning has it."""

    work: Path
    recipe: Recipe = RECIPE
    name: str = "llm"

    def build(self) -> nn.Module:
        return build_llm(load_tokenizer(self.work / "tokenizer"))

    def loss(self, model: Any, count: int, seed: int) -> tuple[Tensor, dict[str, float]]:
        rng = Random(seed)
        scenes = [random_scene(rng, PAIRS) for _ in range(count)]
        ids, labels = dialogues(self.work, [(caption(scene, rng, "held"), scene) for scene in scenes])
        with torch.autocast("cpu", torch.bfloat16):
            states = model(input_ids=ids[:, :-1]).last_hidden_state
            answered = labels[:, 1:] >= 0
            logits = F.linear(states[answered], model.embed_tokens.weight).float()
        wanted = labels[:, 1:][answered]
        right = (logits.detach().argmax(1) == wanted).float()
        wrong = torch.zeros(count).index_add_(0, answered.nonzero()[:, 0], 1 - right) > 0
        return F.cross_entropy(logits, wanted), {"answers wrong": float(wrong.float().mean())}


def dialogues(work: Path, said: list[tuple[str, Scene]]) -> tuple[Tensor, Tensor]:
    """Token ids of captions with their answers, and the labels, -100 where nothing is asked.

    Both int64 (count, longest). Padding stands behind, where a causal model does not look.
    """
    tokenizer = load_tokenizer(work / "tokenizer")
    asked = tokenizer([prompt(text) for text, _ in said]).input_ids
    replies = tokenizer([answer(scene) + END for _, scene in said]).input_ids
    pad = tokenizer.convert_tokens_to_ids(PAD)
    ids = [torch.tensor(a + b) for a, b in zip(asked, replies, strict=True)]
    labels = [torch.tensor([-100] * len(a) + b) for a, b in zip(asked, replies, strict=True)]
    return pad_sequence(ids, True, pad), pad_sequence(labels, True, -100)
