"""Tokenizer and text encoder: byte-pair encoding on the captions, then CLIP's contrastive training."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from training.data import images
from training.loop import Recipe
from trce_cli.emoji.networks import WIDTH, ImageTower
from trce_cli.emoji.world import Scene, caption, random_scene

MAX_LENGTH = 32
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
# CLIP's own word pattern.
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def train_tokenizer(folder: Path, captions: int = 60_000, vocabulary: int = 1600) -> None:
    """Train the byte-level BPE; save it as `tokenizer.json`, and as `vocab.json` with `merges.txt`."""
    if (folder / "tokenizer.json").exists():
        return
    rng = Random(0)
    corpus = [caption(random_scene(rng), rng, "held") for _ in range(captions)]
    tokenizer = Tokenizer(
        models.BPE(unk_token=EOS, continuing_subword_prefix="", end_of_word_suffix="</w>", fuse_unk=False)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        min_frequency=5,
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    # CLIP's order: every byte, every byte at the end of a word, the merges, the two special tokens.
    symbols = sorted(alphabet)
    merges = [tuple(m) for m in model["merges"]]
    words = symbols + [s + "</w>" for s in symbols] + ["".join(m) for m in merges]
    vocab = {word: index for index, word in enumerate(dict.fromkeys(words))}
    vocab[BOS], vocab[EOS] = len(vocab), len(vocab) + 1
    tokenizer.model = models.BPE(
        vocab, merges, unk_token=EOS, continuing_subword_prefix="", end_of_word_suffix="</w>", fuse_unk=False
    )
    tokenizer.add_special_tokens([BOS, EOS])
    tokenizer.post_processor = processors.RobertaProcessing(
        (EOS, vocab[EOS]), (BOS, vocab[BOS]), trim_offsets=False, add_prefix_space=False
    )
    folder.mkdir(parents=True, exist_ok=True)
    special = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": EOS}
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), "utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), "utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2), "utf-8")
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": MAX_LENGTH,
        "do_lower_case": True,
        "errors": "replace",
        **special,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), "utf-8")
    tokenizer.save(str(folder / "tokenizer.json"))


def text_config(folder: Path) -> CLIPTextConfig:
    vocab = json.loads((folder / "vocab.json").read_text("utf-8"))
    return CLIPTextConfig(
        vocab_size=len(vocab),
        hidden_size=WIDTH,
        intermediate_size=512,
        projection_dim=WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH,
        hidden_act="quick_gelu",
        bos_token_id=vocab[BOS],
        eos_token_id=vocab[EOS],
        pad_token_id=vocab[EOS],
    )


class Clip(nn.Module):
    """Both towers and the learned temperature."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.text = CLIPTextModelWithProjection(config)
        self.image = ImageTower()
        self.log_scale = nn.Parameter(torch.tensor(2.5))


def load_clip(work: Path) -> Clip:
    clip = Clip(text_config(work / "tokenizer"))
    clip.load_state_dict(load_file(work / "clip.safetensors"))
    return clip.eval().requires_grad_(False)


def load_text_encoder(work: Path) -> CLIPTextModel:
    """The text tower without its projection, as a Stable Diffusion folder holds it."""
    clip = load_clip(work)
    model = CLIPTextModel(text_config(work / "tokenizer"))
    (getattr(model, "text_model", model)).load_state_dict(
        getattr(clip.text, "text_model", clip.text).state_dict(), strict=False
    )
    return model.eval().requires_grad_(False)


@cache
def load_tokenizer(work: Path) -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(work / "tokenizer")


@dataclass(frozen=True)
class TextTask:
    """InfoNCE on the EoT-pooled embedding, of images with captions and of two captions of one scene."""

    work: Path
    recipe: Recipe
    name: str = "clip"

    def build(self) -> nn.Module:
        return Clip(text_config(self.work / "tokenizer"))

    def loss(self, model: Any, count: int, seed: int) -> tuple[Tensor, dict[str, float]]:
        rng = Random(seed)
        scenes = [random_scene(rng, 0.5) for _ in range(count)]
        texts = [caption(s, rng, "held") for s in scenes + scenes]
        tokens = load_tokenizer(self.work)(
            texts, padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt"
        )
        pixels = images(scenes, self.work, rng)
        with torch.autocast("cpu", torch.bfloat16):
            text = model.text(input_ids=tokens.input_ids).text_embeds
            image = model.image(pixels)
        first, second = F.normalize(text.float(), dim=-1).split(count)
        image = F.normalize(image.float(), dim=-1)
        same = _same(scenes)
        scale = model.log_scale.exp().clamp(max=50)
        parts = [
            _info_nce(scale * a @ b.T, same) for a, b in ((image, first), (image, second), (first, second))
        ]
        accuracy = (same[torch.arange(count), (image @ first.T).argmax(1)] > 0).float().mean()
        return torch.stack(parts).mean(), {"top1": float(accuracy)}


def _same(scenes: list[Scene]) -> Tensor:
    """Which captions fit which images, as rows that sum to one: a batch may hold a scene more than once."""
    match = torch.tensor([[float(a == b) for b in scenes] for a in scenes])
    return match / match.sum(1, keepdim=True)


def _info_nce(logits: Tensor, target: Tensor) -> Tensor:
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
