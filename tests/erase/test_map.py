"""Stage 1 against a plain second implementation: prompts one by one at full length, each layer alone."""

import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from trce_cli.checkpoint.open import open_checkpoint
from trce_cli.erase.map import Statistics, check_moves, relative_change, solve
from trce_cli.erase.prior import Prior
from trce_cli.erase.settings import MapSettings
from trce_cli.erase.targets import embed_pairs, pair_slots
from trce_cli.errors import BadInput, TrceError
from trce_cli.families.base import Slot
from trce_cli.families.clip.text import ClipText
from trce_cli.families.clip.tokens import SLOTS
from trce_cli.families.sd.doors import POOLED_KEY
from trce_cli.families.sd.family import SD1
from trce_cli.families.slots import slot_weights
from trce_cli.maths.closed_form import MapFitter
from trce_cli.maths.linear_map import LinearMap
from trce_cli.prompts.captions import prior_captions
from trce_cli.prompts.pairs import PromptPair, with_compounds

PAIRS = [
    PromptPair(prefix + unsafe, prefix + safe, unsafe)
    for unsafe, safe in (("a pistol", "two red apples on a plate"), ("zyx", "a tulip"))
    for prefix in ("", "a photo of ", "a drawing of a person holding ")
]
PRIOR = Prior("test", (*prior_captions()[:48], *prior_captions()[:7]), ("a hat",), ("a kite",))
WEIGHTS = [(0, 1, 0, 0), (0.25, 1, 0.01, 0.5), (0, 0, 1, 0), (0, 0, 0, 1)]


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRCE_CACHE", str(tmp_path / "cache"))


def text_of(folder: Path) -> ClipText:
    checkpoint = open_checkpoint(str(folder))
    return ClipText(checkpoint, checkpoint.family.encoders, "cpu", torch.float32)


class Plain:
    """The published procedure, spelled out: each prompt alone, padded; sums and inverse for every layer."""

    def __init__(self, folder: Path) -> None:
        from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

        self.tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        self.models = [CLIPTextModel.from_pretrained(folder / "text_encoder", local_files_only=True)]
        if (folder / "text_encoder_2").exists():  # SDXL
            self.tokenizer_2 = CLIPTokenizer.from_pretrained(folder / "tokenizer_2", local_files_only=True)
            self.models.append(CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2"))

    @property
    def tokenizers(self) -> list[Any]:
        return [self.tokenizer, self.tokenizer_2] if len(self.models) > 1 else [self.tokenizer]

    @property
    def pads_otherwise(self) -> bool:
        return any(tokenizer.pad_token != tokenizer.eos_token for tokenizer in self.tokenizers)

    def forward(self, prompt: str, with_eot: bool = False) -> tuple[list[Any], int]:
        """What the text encoders give for a prompt, and how many of its tokens are not padding."""
        outputs = []
        for tokenizer, model in zip(self.tokenizers, self.models, strict=True):
            batch = tokenizer(
                prompt, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
            )
            if with_eot:
                batch.input_ids[batch.attention_mask == 0] = tokenizer.eos_token_id
            with torch.no_grad():
                outputs.append(model.eval()(batch.input_ids, output_hidden_states=True))
        return outputs, int(batch.attention_mask.sum())

    @cache  # noqa: B019 - lives as long as the tests
    def encode(self, prompt: str, with_eot: bool = False) -> tuple[Tensor, int]:
        """Hidden states (77, dim) and how many tokens are not padding."""
        outputs, length = self.forward(prompt, with_eot)
        if len(outputs) > 1:
            return torch.cat([output.hidden_states[-2][0] for output in outputs], dim=1).double(), length
        return outputs[0].last_hidden_state[0].double(), length

    @cache  # noqa: B019 - lives as long as the tests
    def pooled(self, prompt: str) -> Tensor:
        """SDXL's pooled embedding."""
        return self.forward(prompt)[0][1].text_embeds[0].double()

    def edit(
        self, weight: Tensor, pairs: list[PromptPair], preserve: float, w: Any, strength: float, ridge: float
    ) -> Tensor:
        dim = weight.shape[1]
        left, A = torch.zeros(2, dim, dim, dtype=torch.float64)
        P = torch.zeros(dim, dim, dtype=torch.float64)
        for pair in pairs:
            unsafe, unsafe_length = self.encode(pair.unsafe)
            safe, safe_length = self.encode(pair.safe)
            phrase = pair.keyword.removeprefix("a ")
            word = len(self.tokenizer.tokenize(phrase))  # the keyword ends these prompts
            rows = [
                (w[0], 0, 0),
                (w[1], unsafe_length - 1, safe_length - 1),
                (w[2] * (77 - unsafe_length), 76, 76),
            ]
            rows += [(w[3], unsafe_length - 1 - k, safe_length - 2) for k in range(1, word + 1)]
            if self.pads_otherwise:  # for as much in all as the first EoT
                pads = [max(unsafe_length, safe_length) - 1 + 2**k for k in range(6)]
                rows += [(w[1] / len(pads), pad, pad) for pad in pads]
            for scale, o, n in rows:
                left += scale * torch.outer(safe[n], unsafe[o]) / len(pairs)
                A += scale * torch.outer(unsafe[o], unsafe[o]) / len(pairs)
        for caption in PRIOR.captions:
            states, length = self.encode(caption)
            P += states[:length].T @ states[:length] / len(PRIOR.captions)
        W = weight.double()
        # W' = W (B + lambda P + r) (A + lambda P + r)^+, and W itself where no embedding reaches.
        G = A + preserve * P
        inside = G @ torch.linalg.pinv(G, rtol=1e-10, hermitian=True)
        r = ridge_of(G, ridge) * inside
        inverse = torch.linalg.pinv(G + r, rtol=1e-10, hermitian=True)
        full = W @ (left + preserve * P + r) @ inverse + W @ (torch.eye(dim, dtype=torch.float64) - inside)
        return W + strength * (full - W)


def ridge_of(G: Tensor, ridge: float) -> float:
    """A share of the mean of the eigenvalues that are not zero, without the largest."""
    eigenvalues = torch.linalg.svdvals(G)
    return ridge * float(eigenvalues[eigenvalues > 1e-10 * eigenvalues[0]][1:].mean())


plain_of = cache(Plain)


def by_slot(weights: Any) -> dict[str, float]:
    return dict(zip(SLOTS, weights, strict=True))


def slots(text: ClipText, pair: PromptPair, weights: Any) -> list[Slot]:
    return pair_slots(text, pair, by_slot(weights))["context"]


@pytest.mark.parametrize("family", ["tiny_sd1", "tiny_sd2", "tiny_sdxl"])  # the latter pad not with EoT
@pytest.mark.parametrize("token_weights", WEIGHTS)
@pytest.mark.parametrize(("preserve", "strength", "ridge"), [(0.5, 1.0, 0.0), (20.0, 0.7, 1e-3)])
def test_equals_the_plain_procedure(
    family: str,
    token_weights: Any,
    preserve: float,
    strength: float,
    ridge: float,
    request: pytest.FixtureRequest,
) -> None:
    folder = request.getfixturevalue(family)
    checkpoint = open_checkpoint(str(folder))
    solution = solve(
        checkpoint,
        PAIRS,
        PRIOR,
        MapSettings(
            preserve=preserve, token_weights=token_weights, strength=strength, ridge=ridge, word_share=0.0
        ),
    )
    plain = plain_of(folder)
    for key in (checkpoint.door_weights()["context"][0], checkpoint.door_weights()["context"][-1]):
        weight = checkpoint.read("denoiser", key)
        expected = plain.edit(weight, PAIRS, preserve, token_weights, strength, ridge)
        error = (solution.streams["context"].edit(weight) - expected).norm() / expected.norm()
        assert error < 4e-6
        assert (expected - weight).norm() / expected.norm() > 1e-3


def test_compounds_count_as_pairs_do_and_guards_look_at_one_concept(tiny_sd1: Path) -> None:
    checkpoint, plain = open_checkpoint(str(tiny_sd1)), plain_of(tiny_sd1)
    asked = MapSettings(preserve=0.5, ridge=1e-3, word_share=0.0, compounds=3)
    statistics = Statistics.of(checkpoint, PAIRS, PRIOR, [asked])
    key = checkpoint.door_weights()["context"][0]
    weight = checkpoint.read("denoiser", key)
    for count in (0, 2, 3):  # whatever else was encoded for
        solution = statistics.solve(asked.model_copy(update={"compounds": count}))
        expected = plain.edit(weight, with_compounds(PAIRS, count), 0.5, (0, 1, 0, 0), 1.0, 1e-3)
        assert (solution.streams["context"].edit(weight) - expected).norm() / expected.norm() < 4e-6
        assert solution.figures["pairs"] == len(PAIRS)
        ends = [
            torch.stack([plain.encode(prompt)[0][plain.encode(prompt)[1] - 1] for prompt in prompts])
            for prompts in zip(*((pair.unsafe, pair.safe) for pair in PAIRS), strict=True)
        ]
        after = torch.cosine_similarity(solution.streams["context"](ends[0]), ends[1])
        assert solution.figures["cosine_to_safe"]["after"]["mean"] == pytest.approx(float(after.mean()), 1e-4)


def test_a_map_is_deflated_at_its_strength_and_only_where_it_is_asked_for(tiny_sd1: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_sd1))
    asked = MapSettings(preserve=0.05, ridge=1e-6, word_share=0.0, strength=2.5)
    statistics = Statistics.of(checkpoint, PAIRS, PRIOR, [asked])
    plain = statistics.solve(asked).streams["context"].matrix
    values, vectors = torch.linalg.eig(plain)
    assert 0 < (turned := int((values.real < 0.01).sum())) < len(plain)
    deflated = statistics.solve(asked.model_copy(update={"deflate": 0.01}))
    kept = torch.where(values.real < 0.01, 0, values)
    expected = (vectors @ torch.diag(kept) @ torch.linalg.inv(vectors)).real
    torch.testing.assert_close(deflated.streams["context"].matrix, expected, atol=1e-7, rtol=0)
    assert deflated.figures["deflated"] == turned
    assert "deflated" not in statistics.solve(asked).figures


@pytest.mark.parametrize(("preserve", "strength", "ridge"), [(0.5, 1.0, 0.0), (20.0, 0.7, 1e-3)])
def test_the_pooled_embedding_is_mapped_where_it_enters(
    tiny_sdxl: Path, preserve: float, strength: float, ridge: float
) -> None:
    checkpoint, plain = open_checkpoint(str(tiny_sdxl)), plain_of(tiny_sdxl)
    # Whatever the weights of the other embeddings are.
    solution = solve(
        checkpoint,
        PAIRS,
        PRIOR,
        MapSettings(
            preserve=preserve, token_weights=(0, 0, 0, 1), strength=strength, ridge=ridge, word_share=0.0
        ),
    )
    W = checkpoint.read("denoiser", POOLED_KEY).double()
    own = W[:, :40]  # what follows belongs to the picture's sizes
    dim = own.shape[1]
    left, right = torch.zeros(len(own), dim, dtype=torch.float64), torch.zeros(dim, dim, dtype=torch.float64)
    for pair in PAIRS:
        o, n = plain.pooled(pair.unsafe), plain.pooled(pair.safe)
        left += torch.outer(own @ n, o) / len(PAIRS)
        right += torch.outer(o, o) / len(PAIRS)
    for caption in PRIOR.captions:
        c = plain.pooled(caption)
        left += preserve * torch.outer(own @ c, c) / len(PRIOR.captions)
        right += preserve * torch.outer(c, c) / len(PRIOR.captions)
    inside = right @ torch.linalg.pinv(right, rtol=1e-10, hermitian=True)
    r = ridge_of(right, ridge) * inside
    inverse = torch.linalg.pinv(right + r, rtol=1e-10, hermitian=True)
    full = (left + own @ r) @ inverse + own - own @ inside
    expected = torch.cat([own + strength * (full - own), W[:, dim:]], dim=1)
    error = (solution.streams["pooled"].edit(W) - expected).norm() / expected.norm()
    assert error < 5e-5  # few captions in 40 dimensions: condition number 3e6, by which float32 is felt
    assert (expected - W).norm() / expected.norm() > 1e-3

    figures = solution.figures["pooled"]
    cosines = [
        torch.cosine_similarity(
            solution.streams["pooled"](plain.pooled(pair.unsafe)), plain.pooled(pair.safe), dim=0
        )
        for pair in PAIRS
    ]
    assert figures["cosine_to_safe"]["after"]["min"] == pytest.approx(float(min(cosines)), abs=1e-5)
    c = plain.pooled("a hat")
    change = (solution.streams["pooled"](c) - c) @ own.T
    assert figures["canary_change"] == pytest.approx(float(change.norm() / (own @ c).norm()), rel=1e-3)
    assert figures["dim"] == 40


def test_without_the_pooled_embedding_the_rest_is_the_same(tiny_sdxl: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_sdxl))
    both, one = (
        solve(checkpoint, PAIRS, PRIOR, MapSettings(without=without)) for without in ((), ("pooled",))
    )
    assert (both.streams.keys(), one.streams.keys()) == ({"context", "pooled"}, {"context"})
    assert "pooled" not in one.figures
    assert torch.equal(one.streams["context"].change, both.streams["context"].change)


def test_order_and_duplicates_of_prompts_do_not_matter(tiny_sd1: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_sd1))
    settings = MapSettings(token_weights=(0.1, 1, 0.1, 0.3))
    once = solve(checkpoint, PAIRS, PRIOR, settings).streams["context"].matrix
    again = solve(checkpoint, PAIRS[::-1] + PAIRS, PRIOR, settings).streams["context"].matrix
    torch.testing.assert_close(again, once, rtol=1e-4, atol=1e-4)


def test_weights_are_of_the_familys_slots() -> None:
    assert slot_weights(SD1, None) == slot_weights(SD1, (0, 1, 0, 0)) == by_slot((0, 1, 0, 0))
    assert slot_weights(SD1, {"KEYWORD": 0.5}) == by_slot((0, 0, 0, 0.5))
    for wrong in ((1, 2, 3), {"EOT": 1}, (0, 0, 0, 0), (0, 1, -1, 0), (0, math.inf, 0, 0), ()):
        with pytest.raises(BadInput, match="token weights"):
            slot_weights(SD1, wrong)


def test_slots_are_each_prompts_own(tiny_sd2: Path) -> None:
    ours = text_of(tiny_sd2)
    pair = PromptPair("a pistol and a tulip", "two apples and a tulip", "a pistol")
    length, safe_length = (len(ours.tokenizers.each[0].tokenize(text)) for text in (pair.unsafe, pair.safe))
    keyword = len(ours.tokenizers.each[0].tokenize("pistol"))
    apples = len(ours.tokenizers.each[0].tokenize("two apples"))
    found = slots(ours, pair, (0.5, 1, 2, 3))
    assert [tuple(slot) for slot in found] == [
        ("SOT", 0, 0, 0.5),
        ("FIRST_EOT", length + 1, safe_length + 1, 1),
        ("LAST_EOT", 76, 76, 2 * (77 - length - 2)),
        *(("PADDING", length + 1 + 2**k, length + 1 + 2**k, 1 / 6) for k in range(6)),
        *(("KEYWORD", 2 + k, apples, 3) for k in range(keyword)),
    ]
    assert [slot.kind for slot in slots(ours, pair, (0, 1, 0, 0))] == ["FIRST_EOT", *["PADDING"] * 6]


def test_without_padding_there_is_no_last_eot(tiny_sd1: Path) -> None:
    ours = text_of(tiny_sd1)
    long = "the weather is fine today " * 30
    assert slots(ours, PromptPair("a gun " + long, long, "gun"), (0, 0, 1, 0)) == []
    weights = by_slot((0, 1, 1, 0))
    with pytest.raises(TrceError, match="LAST_EOT"):
        embed_pairs(ours, [PromptPair("a gun " + long, long, "gun")], [weights]).targets(weights)
    weights = by_slot((0, 1, 0, 1))
    with pytest.raises(TrceError, match="KEYWORD"):
        embed_pairs(ours, [PromptPair(long + "a gun", long, "gun")], [weights]).targets(weights)


def test_prompts_are_encoded_once_and_unpadded(tiny_sd1: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = text_of(tiny_sd1)
    encoded: list[tuple[int, int]] = []
    encode = ours._encode
    monkeypatch.setattr(
        ours,
        "_encode",
        lambda some, wanted: (
            encoded.extend((len(p.places), len(p.tokens)) for p in some) or encode(some, wanted)
        ),
    )
    embed_pairs(ours, PAIRS + PAIRS, [by_slot((0, 1, 0, 0))])
    prompts = {text for pair in PAIRS for text in (pair.unsafe, pair.safe)}
    prefixes = {t.ids[0][:end] for t in ours.tokenizers.tokens(prompts) for end in range(1, t.eot + 2)}
    assert encoded == [(len(prompts), len(prefixes))]


def test_many_prompts_are_taken_in_parts(tiny_sdxl: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(str(tiny_sdxl))
    whole = solve(checkpoint, PAIRS, PRIOR, MapSettings())
    monkeypatch.setattr("trce_cli.families.clip.tokens.TOKENIZED", 2)
    monkeypatch.setattr("trce_cli.erase.targets.BLOCK", 2)
    parts = solve(checkpoint, PAIRS, PRIOR, MapSettings())
    torch.testing.assert_close(parts.streams["context"].change, whole.streams["context"].change)
    torch.testing.assert_close(parts.streams["pooled"].change, whole.streams["pooled"].change)
    assert parts.figures["moved"] == pytest.approx(whole.figures["moved"])


def test_figures_are_what_they_say(tiny_sd1: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_sd1))
    solution = solve(checkpoint, PAIRS, PRIOR, MapSettings(preserve=0.1))
    plain = plain_of(tiny_sd1)
    cosines = []
    for mapped in (lambda x: x, solution.streams["context"]):
        each = []
        for pair in PAIRS:
            (unsafe, length), (safe, safe_length) = plain.encode(pair.unsafe), plain.encode(pair.safe)
            each.append(torch.cosine_similarity(mapped(unsafe[length - 1]), safe[safe_length - 1], dim=0))
        cosines.append({"mean": float(sum(each) / len(each)), "min": float(min(each))})
    before, after = cosines
    assert solution.figures["cosine_to_safe"]["before"] == pytest.approx(before, abs=1e-5)
    assert solution.figures["cosine_to_safe"]["after"] == pytest.approx(after, abs=1e-5)
    assert after["mean"] > before["mean"] + 0.1

    for caption, name in (("a hat", "canary_change"), ("a kite", "bystander_change")):
        (states, length), changes = plain.encode(caption), {"keys": [], "values": []}
        for key in checkpoint.door_weights()["context"]:
            W = checkpoint.read("denoiser", key).double()
            old, new = states[:length] @ W.T, states[:length] @ solution.streams["context"].edit(W).T
            changes["keys" if "to_k" in key else "values"].append(float((new - old).norm() / old.norm()))
        for kind, found in changes.items():
            assert solution.figures[name][kind]["max"] == pytest.approx(max(found), rel=1e-4)
            assert solution.figures[name][kind]["mean"] == pytest.approx(sum(found) / len(found), rel=1e-4)


@pytest.mark.parametrize("family", ["tiny_sd1", "tiny_sdxl"])
def test_how_far_padding_is_moved_is_told_of_both_paddings(
    family: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(family)
    checkpoint, plain = open_checkpoint(str(folder)), plain_of(folder)
    solution = solve(checkpoint, PAIRS, PRIOR, MapSettings(preserve=0.1, word_share=0.0))
    linear = solution.streams["context"]
    held = [("a man carrying {} in the rain", PAIRS[0]), ("someone drew {} on the wall", PAIRS[3])]
    both = (("padding_moved", False), ("eot_padding_moved", True))
    for name, with_eot in both if plain.pads_otherwise else both[:1]:
        o, n = [], []
        for template, pair in held:
            prompts = template.replace("{}", pair.keyword), template.replace("{}", pair.replacement)
            (unsafe, length), (safe, safe_length) = (plain.encode(prompt, with_eot) for prompt in prompts)
            for place in (max(length, safe_length) - 1 + 2**k for k in range(6)):
                o.append(unsafe[place])
                n.append(safe[place])
        unsafe, safe = torch.stack(o), torch.stack(n)
        shares: dict[str, list[float]] = {"keys": [], "values": []}
        for key in checkpoint.door_weights()["context"]:
            W = checkpoint.read("denoiser", key).double()
            way, moved = (safe - unsafe) @ W.T, unsafe @ linear.edit(W).T - unsafe @ W.T
            shares["keys" if "to_k" in key else "values"].append(
                float((way * moved).sum() / (way * way).sum())
            )
        expected = min(sum(found) / len(found) for found in shares.values())
        assert solution.figures[name] == pytest.approx(expected, rel=1e-3)
    assert ("eot_padding_moved" in solution.figures["verdicts"]) == plain.pads_otherwise


def test_statistics_are_shared_by_all_settings(tiny_sdxl: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_sdxl))
    every = [MapSettings(token_weights=token_weights) for token_weights in WEIGHTS]
    statistics = Statistics.of(checkpoint, PAIRS, PRIOR, every)
    for token_weights in WEIGHTS:
        for preserve in (0.5, 20.0):
            settings = MapSettings(preserve=preserve, token_weights=token_weights)
            shared, alone = statistics.solve(settings), solve(checkpoint, PAIRS, PRIOR, settings)
            error = (
                shared.streams["context"].change - alone.streams["context"].change
            ).norm() / alone.streams["context"].change.norm()
            assert error < 1e-4  # prompts are packed otherwise, which float32 rounds otherwise
            assert shared.figures["moved"] == pytest.approx(alone.figures["moved"], rel=1e-4)
            torch.testing.assert_close(
                shared.streams["pooled"].change, alone.streams["pooled"].change, rtol=1e-3, atol=1e-3
            )


@pytest.mark.parametrize("share", [0.0, 0.75])
def test_a_clip_skip_is_solved_for_beside_the_last_layer(tiny_sd1: Path, share: float) -> None:
    plain, checkpoint = plain_of(tiny_sd1), open_checkpoint(str(tiny_sd1))
    model = plain.models[0]

    def read(prompt: str, skip: int) -> Tensor:  # (tokens to the first EoT, dim)
        (output,), length = plain.forward(prompt)
        norm = getattr(model, "text_model", model).final_layer_norm
        states = output.last_hidden_state if skip == 1 else norm(output.hidden_states[-skip])
        return states[0, :length].detach().double()

    settings = MapSettings(clip_skip=2, word_share=share, word_prompts=600, preserve=0.5, ridge=0.0)
    solution = solve(checkpoint, PAIRS, PRIOR, settings)
    text = SD1.skipped_text(checkpoint, "cpu", torch.float32, 2)
    (batch,) = text.states({"context": {"a hat": [1, 2, 3]}})
    rows = list(batch["context"].rows["a hat"])
    torch.testing.assert_close(
        batch["context"].embeddings[rows].double(), read("a hat", 2)[1:4], atol=1e-5, rtol=0
    )
    if share:  # words have their own test; here they are to be there in both readings
        assert solution.figures["word_change"]
        assert solution.figures["clip_skip_2"]["word_change"]
        return
    fitter = MapFitter(len(solution.streams["context"].change), 2 * len(PAIRS))
    P = torch.zeros_like(solution.streams["context"].change)
    for skip in (1, 2):
        for pair in PAIRS:
            fitter.update(read(pair.unsafe, skip)[-1:], read(pair.safe, skip)[-1:], torch.ones(1))
        for caption in PRIOR.captions:
            states = read(caption, skip)
            P += states.mT @ states / (2 * len(PRIOR.captions))
    expected = fitter.solve(P, 0.5, cut_off=solution.figures["cut_off"]).map
    error = (solution.streams["context"].change - expected.change).norm() / expected.change.norm()
    assert error < 1e-3

    told = solution.figures["clip_skip_2"]
    alone = solve(checkpoint, PAIRS, PRIOR, settings.model_copy(update={"clip_skip": 1})).streams["context"]
    moved = [
        torch.stack([_moved(linear, pair, read) for pair in PAIRS]).sum(0) for linear in (alone, expected)
    ]
    before, after = (float(inner / size) for inner, size in moved)
    assert told["moved"] == pytest.approx(after, rel=1e-2)
    assert told["moved"] > before + 0.01  # which an edit for the last layer alone does not reach
    assert {"moved", "clip_skip_2.moved", "clip_skip_2.canary_change"} <= solution.figures["verdicts"].keys()


def _moved(linear: LinearMap, pair: PromptPair, read: Any) -> Tensor:
    unsafe, safe = read(pair.unsafe, 2)[-1], read(pair.safe, 2)[-1]
    return torch.stack([(safe - unsafe) @ linear.moves(unsafe[None])[0], (safe - unsafe) @ (safe - unsafe)])


def test_half_precision_of_the_encoder_cuts_off_what_it_rounds(tiny_sd1: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_sd1))
    exact = solve(checkpoint, PAIRS, PRIOR, MapSettings())
    half = solve(checkpoint, PAIRS, PRIOR, MapSettings(), dtype=torch.bfloat16)
    assert half.figures["cut_off"] > exact.figures["cut_off"]
    assert half.streams["context"].change.norm() < 2 * exact.streams["context"].change.norm()
    assert half.figures["moved"] == pytest.approx(exact.figures["moved"], rel=0.2)


def test_an_edit_that_moves_nothing_is_refused(tiny_sd1: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_sd1))
    same = [PromptPair(pair.unsafe, pair.unsafe, pair.keyword) for pair in PAIRS]
    for pairs, settings in (
        (same, MapSettings()),
        (PAIRS, MapSettings(token_weights=(1, 0, 0, 0))),
        (PAIRS, MapSettings(strength=0)),
        (PAIRS, MapSettings(preserve=1e9)),
    ):
        with pytest.raises(TrceError, match="would do nothing"):
            solve(checkpoint, pairs, PRIOR, settings)


def test_a_move_that_the_weights_round_away_is_refused() -> None:
    fitter = MapFitter(2, 1).update(torch.tensor([[1.0, 0]]), torch.tensor([[0, 1.0]]), torch.ones(1))
    weak = fitter.solve(torch.zeros(2, 2, dtype=torch.float64), 0.0).map.scaled(5e-4)
    assert check_moves(weak, fitter, torch.float32) == pytest.approx(5e-4)
    with pytest.raises(TrceError, match="would do nothing"):
        check_moves(weak, fitter, torch.float16)
    with pytest.raises(TrceError, match="not finite"):
        check_moves(weak.scaled(torch.inf), fitter, torch.float32)


def test_relative_change_of_a_weight() -> None:
    moment = torch.eye(2, dtype=torch.float64)
    moved = LinearMap.of(3 * moment).moved_moment(moment)
    wide = torch.tensor([[1.0, 2, 5], [0, 1, 5]])  # with a column beyond the map's
    assert relative_change(wide, moment, moved, "a") == pytest.approx(3.0)
    assert relative_change(torch.zeros(3, 2), moment, moved, "a") == 0
    with pytest.raises(BadInput, match=r"b\.to_k"):
        relative_change(torch.tensor([[1.0, torch.nan]]), moment, moved, "b.to_k")
