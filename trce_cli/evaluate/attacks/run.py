"""Adaptive red-teaming of a checkpoint: prompts that look for what is left of an erased concept.

`attack` lets both attacks search, has the erased checkpoint draw what they found, and tells how often the
concept is seen without and with them. The attacks themselves are in `ring_a_bell` and `unlearn_diff`.
"""

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import Tensor

from trce_cli.errors import BadInput, TrceError
from trce_cli.evaluate.attacks.ring_a_bell import RingABell, concept_vector, search
from trce_cli.evaluate.attacks.unlearn_diff import UnlearnDiff, nearest, optimise, random_words
from trce_cli.evaluate.question import Evaluation
from trce_cli.families.base import Words
from trce_cli.images.draw import draw
from trce_cli.images.plan import checkpoint_hash, plan_images
from trce_cli.images.record import ImageRecord
from trce_cli.maths.statistics import Rate
from trce_cli.prompts.files import Prompt
from trce_cli.prompts.pairs import prompt_pairs
from trce_cli.system.machine import versions
from trce_cli.system.memory import free
from trce_cli.system.progress import Stage, no_stage
from trce_cli.system.whole import whole, write_json

if TYPE_CHECKING:
    from PIL import Image

COLUMNS: Final = (
    "prompt", "seed", "guidance", "width", "height", "attack", "source", "found_without", "found_with",
)  # fmt: skip
SCHEMA: Final = 1
PAIRS: Final = 50  # prompt pairs that give the concept vector, which more of them change little
AT_ONCE: Final = 256  # prompts that a text encoder reads at a time


@dataclass(frozen=True)
class Finding:
    """One attacked prompt: how the erased checkpoint drew what the attack made of a suite's prompt `source`.

    found_without, found_with: whether the concept was seen in what it drew of the source, and of the attack.
    """

    attack: str
    source: str
    drawn: ImageRecord
    found_without: bool
    found_with: bool


def attack(
    evaluation: Evaluation,
    attacks: Sequence[str],
    ring_a_bell: RingABell,
    unlearn_diff: UnlearnDiff,
    device: torch.device,
    dtype: str,
    *,
    batch_size: int = 16,
    seed: int = 0,
    stage: Stage = no_stage,
) -> tuple[list[Finding], dict[str, Any]]:
    """Attack the erased checkpoint with the prompts of the evaluation's suites; nothing is written.

    Only one of the two checkpoints is in memory at a time. Returns the findings of every attack, and what
    FILE.json says: settings, hashes, seconds, and how often the concept was found without and with each
    attack. Raises BadInput for budgets that the checkpoint cannot read or draw, TrceError where something
    comes out that is not finite.
    """
    attacker = Attacker(evaluation, device, dtype, batch_size, seed, stage)
    attacker.check(ring_a_bell, unlearn_diff)
    hashes = {role: checkpoint_hash(each) for role, each in evaluation.checkpoints.items()}
    prompts, latents = attacker.prompts, None
    seconds: dict[str, float] = {}
    found: dict[str, tuple[list[Prompt], np.ndarray]] = {}

    with attacker.using("original"), taking(seconds, "original"):
        pictures = attacker.pictures(prompts, "original", "Drawing what the original makes of the prompts")
        shown = attacker.found(pictures)
        if "unlearn-diff" in attacks:
            latents = attacker.latents(pictures)
    with attacker.using("erased"):
        encoder = evaluation.erased.family.words(attacker.pipeline)
        if encoder is None:
            raise BadInput(f"Attacks cannot search in the text encoder of {evaluation.erased.family.name}.")
        with taking(seconds, "without"):
            plain = attacker.found(attacker.pictures(prompts, "erased", "Drawing without an attack"))
        if "ring-a-bell" in attacks:
            with taking(seconds, "ring-a-bell"):
                found["ring-a-bell"] = attacker.ring_a_bell(encoder, ring_a_bell)
        if latents is not None:
            with taking(seconds, "unlearn-diff"):
                found["unlearn-diff"] = attacker.unlearn_diff(encoder, latents, plain, unlearn_diff)

    findings = [
        Finding(name, source.text, record, bool(missed), bool(hit))
        for name, (tried, hits) in found.items()
        for source, record, missed, hit in zip(
            prompts, attacker.records(tried, "erased"), plain, hits, strict=True
        )
    ]
    told = {
        "schema": SCHEMA,
        "versions": versions(),
        "original": {"name": evaluation.original.name, "sha256": hashes["original"]},
        "erased": {"name": evaluation.erased.name, "sha256": hashes["erased"]},
        "presets": [{"name": each.name, "sha256": each.sha256()} for each in evaluation.presets],
        "suites": [
            {"name": suite.name, "source": suite.source, "prompts": len(suite.prompts)}
            for suite in evaluation.suites
        ],
        "detector": attacker.detector.as_dict(),
        "settings": {
            "seed": seed,
            "steps": evaluation.settings.steps,
            "scheduler": findings[0].drawn.scheduler,
            "negative_prompt": evaluation.negative_prompt,
            "device": str(device),
            "dtype": dtype,
            "budgets": {
                name: asdict(ring_a_bell if name == "ring-a-bell" else unlearn_diff) for name in found
            },
        },
        "seconds": seconds,
        "original_shows_it": Rate.of("original", shown).as_dict(),
        "attacks": {
            name: {
                "found_without": Rate.of("without", plain).as_dict(),
                "found_with": Rate.of("with", hits).as_dict(),
            }
            for name, (_, hits) in found.items()
        },
    }
    return findings, told


class Attacker:
    """A suite's prompts against one erased checkpoint."""

    def __init__(
        self,
        evaluation: Evaluation,
        device: torch.device,
        dtype: str,
        batch_size: int,
        seed: int,
        stage: Stage,
    ) -> None:
        self.evaluation, self.device, self.dtype = evaluation, device, dtype
        self.batch_size, self.seed, self.stage = batch_size, seed, stage
        self.prompts = [prompt for suite in evaluation.suites for prompt in suite.prompts]
        self.detector = evaluation.detectors[0]
        self.denoiser = evaluation.erased.family.denoise(evaluation.erased)
        self.schedule = self.denoiser.schedule(1)
        self.pipeline: Any = None

    def check(self, ring_a_bell: RingABell, unlearn_diff: UnlearnDiff) -> None:
        """Raise BadInput for what the checkpoints can neither draw nor read, before anything is loaded."""
        drawn = [self.records(self.prompts, role) for role in self.evaluation.checkpoints][-1]
        if len({(record.width, record.height) for record in drawn}) > 1:
            raise BadInput(
                "The prompts ask for pictures of several sizes, which cannot be attacked at once.",
                "Give each size a file of its own.",
            )
        erased = self.evaluation.erased
        room = erased.family.truncated(erased, [""])[0] - 2  # SoT and EoT
        if max(ring_a_bell.length, unlearn_diff.length) > room:
            raise BadInput(f"{self.evaluation.erased.name} reads prompts of up to {room} words.")
        if unlearn_diff.timesteps > (most := self.schedule.levels):
            raise BadInput(f"{self.evaluation.erased.name} has {most} timesteps to choose from.")

    @contextmanager
    def using(self, role: str) -> Iterator[None]:
        """With the pipeline of the original or of the erased checkpoint in memory."""
        checkpoint = self.evaluation.checkpoints[role]
        self.stage(f"Loading {checkpoint.name}", None, "")
        self.pipeline = checkpoint.family.pipe(checkpoint, self.device, getattr(torch, self.dtype))
        self.module.requires_grad_(False)
        try:
            yield
        finally:
            self.pipeline = None
            free(self.device)

    @property
    def module(self) -> torch.nn.Module:
        """The denoiser of the pipeline in memory."""
        module: torch.nn.Module = getattr(self.pipeline, self.evaluation.erased.family.denoiser)
        return module

    def records(self, prompts: Sequence[Prompt], role: str) -> list[ImageRecord]:
        """How the prompts are drawn, as `trce evaluate` draws them."""
        negative = self.evaluation.negative_prompt if role == "erased" else ""
        settings = replace(self.evaluation.settings, negative_prompt=negative)
        records = plan_images(prompts, {role: self.evaluation.checkpoints[role]}, settings)
        return [replace(record, dtype=self.dtype) for record in records]

    def pictures(self, prompts: Sequence[Prompt], role: str, text: str) -> list["Image.Image"]:
        """What the pipeline in memory draws of the prompts, each from its own seed."""
        records = self.records(prompts, role)
        report = self.stage(text, len(records), "images")
        drawn = {}
        for record, image in draw(self.evaluation.erased.family, self.pipeline, records, self.batch_size):
            drawn[record.index] = image
            report(1)
        return [drawn[record.index] for record in records]

    def found(self, pictures: Sequence["Image.Image"]) -> np.ndarray:
        """Whether the detector's headline convention sees the concept, bool (pictures,)."""
        parts = [pictures[at : at + self.batch_size] for at in range(0, len(pictures), self.batch_size)]
        scores = [self.detector.scores(np.stack([np.asarray(picture) for picture in part])) for part in parts]
        return self.detector.hits(self.detector.conventions[0], np.concatenate(scores))

    def generators(self, prompts: Sequence[Prompt]) -> list[torch.Generator]:
        """A stream of random numbers for each prompt, which the others do not touch."""
        seeds = [Random(f"{self.seed} {prompt.seed} {prompt.text}").getrandbits(63) for prompt in prompts]
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    def ring_a_bell(self, encoder: Words, settings: RingABell) -> tuple[list[Prompt], np.ndarray]:
        """Ring-A-Bell's prompts in place of the suite's, and whether each was found."""
        pairs = prompt_pairs(self.evaluation.presets)
        pairs = Random(self.seed).sample(pairs, min(PAIRS, len(pairs)))

        main = self.evaluation.erased.family.streams[0]

        @torch.no_grad()
        def encode(ids: Sequence[Tensor]) -> Tensor:
            parts = zip(*(each.split(AT_ONCE) for each in ids), strict=True)
            return torch.cat([encoder(part)[main][:, : settings.positions].float() for part in parts])

        unsafe, safe = (
            encode(encoder.ids([getattr(pair, side) for pair in pairs])) for side in ("unsafe", "safe")
        )
        moved = settings.strength * concept_vector(unsafe, safe)
        rounds = range(0, len(self.prompts), self.batch_size)
        report = self.stage("Ring-A-Bell", len(rounds) * settings.generations, "generations")
        tried = []
        for at in rounds:
            asked = self.prompts[at : at + self.batch_size]
            words = search(
                encode(encoder.ids([prompt.text for prompt in asked])) + moved,
                lambda words: encode(encoder.word_ids(words)),
                len(encoder.words),
                settings,
                self.generators(asked),
                report,
            )
            tried += [replace(one, text=encoder.text(row)) for one, row in zip(asked, words, strict=True)]
        return tried, self.found(self.pictures(tried, "erased", "Drawing Ring-A-Bell's prompts"))

    def unlearn_diff(
        self, encoder: Words, latents: Tensor, plain: np.ndarray, settings: UnlearnDiff
    ) -> tuple[list[Prompt], np.ndarray]:
        """The suite's prompts behind UnlearnDiffAtk's prefixes, and whether each was found.

        latents: of what the original draws, (prompts, channels, height, width). plain: which prompts are
        found without a prefix, and are left as they are. The others go on until they are found.
        """
        tried, found, generators = [*self.prompts], plain.copy(), self.generators(self.prompts)
        words = random_words(len(encoder.words), settings.length, generators)
        prefixes = encoder.table[words.to(self.device)]
        levels = settings.noise_levels(self.schedule.levels)
        for number, level in enumerate(levels, start=1):
            rows = np.flatnonzero(~found)
            batches = [rows[at : at + self.batch_size] for at in range(0, len(rows), self.batch_size)]
            if not batches:
                break
            where = f"timestep {number} of {len(levels)}"
            report = self.stage(f"UnlearnDiffAtk, {where}", len(batches), "batches")
            for batch in batches:
                loss = self.denoising_loss(encoder, batch, latents[batch], level, generators)
                prefixes[batch] = optimise(prefixes[batch], encoder.table, loss, settings)
                report(1)
            for row, best in zip(rows, nearest(prefixes[rows], encoder.table).cpu(), strict=True):
                source = self.prompts[row]
                tried[row] = replace(source, text=f"{encoder.text(best)} {source.text}")
            again = [tried[row] for row in rows]
            found[rows] = self.found(self.pictures(again, "erased", f"Drawing with prefixes, {where}"))
        return tried, found

    @torch.no_grad()
    def latents(self, pictures: Sequence["Image.Image"]) -> Tensor:
        """Pictures -> latents as the U-Net sees them, float32 (pictures, channels, height, width)."""
        vae, parts = self.pipeline.vae, []
        for picture in pictures:
            pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1
            encoded = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode()
            parts.append(encoded.float() * vae.config.scaling_factor)
        if not all(bool(part.isfinite().all()) for part in parts):
            raise TrceError("The original's autoencoder gives NaN or infinity.", "Try --dtype fp32.")
        return torch.cat(parts)

    def denoising_loss(
        self,
        encoder: Words,
        rows: np.ndarray,
        latents: Tensor,
        level: int,
        generators: Sequence[torch.Generator],
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """The loss of prefixes before the prompts of these rows at timestep `level`, of new noise each time.

        It is of the U-Net alone: neither guidance nor a negative prompt enters it.
        """
        timesteps = torch.full((len(rows),), level, device=self.device)

        def loss(words: Tensor, prefixes: Tensor) -> Tensor:
            texts = [
                f"{encoder.text(prefix)} {self.prompts[row].text}"
                for row, prefix in zip(rows, words, strict=True)
            ]
            told = encoder(encoder.ids(texts), prefixes)
            noise = torch.stack(
                [torch.randn(latents.shape[1:], generator=generators[row]) for row in rows]
            ).to(self.device)
            noisy = self.schedule.noised(latents, noise, timesteps)
            wanted = self.schedule.wanted(latents, noise, timesteps)
            dtype = next(self.module.parameters()).dtype
            prediction = self.denoiser.predict(self.module, noisy.to(dtype), timesteps, told)
            return (prediction - wanted).square().mean((1, 2, 3))

        return loss


@contextmanager
def taking(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Note how long the block takes."""
    start = monotonic()
    yield
    seconds[name] = monotonic() - start


def budgets(
    evaluation: Evaluation, ring_a_bell: Mapping[str, Any], unlearn_diff: Mapping[str, Any]
) -> tuple[RingABell, UnlearnDiff]:
    """What the user gave (None: not given), else the papers' budgets, or for the embedded checkpoint its own.

    Raises BadInput for numbers that make no sense.
    """
    own = evaluation.home.budgets
    ring, unlearn = RingABell(**own.get("ring-a-bell", {})), UnlearnDiff(**own.get("unlearn-diff", {}))
    ring = replace(ring, **{name: value for name, value in ring_a_bell.items() if value is not None})
    given = {name: value for name, value in unlearn_diff.items() if value is not None}
    return ring, replace(unlearn, **given)


def write(output: Path, findings: Sequence[Finding], told: Mapping[str, Any]) -> Path:
    """Write the suite file, and beside it FILE.json with what was told; returns the latter's path."""
    record = output.with_suffix(".json")
    with whole(output) as table, table.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(COLUMNS)
        for each in findings:
            drawn = each.drawn
            asked = (drawn.prompt, drawn.seed, drawn.guidance_scale, drawn.width, drawn.height)
            found = (int(each.found_without), int(each.found_with))
            rows.writerow((*asked, each.attack, each.source, *found))
    write_json(record, told)
    return record
