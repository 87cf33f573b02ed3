"""Fine-tuning as users do it, on harmless pictures or on a few of the concept, in full or as a LoRA."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Final

from trce_cli.errors import BadInput
from trce_cli.evaluate.survivals.base import State
from trce_cli.images.given import pictures_in
from trce_cli.system.foreign import read_text
from trce_cli.system.safetensors import hash_file
from trce_cli.system.shards import digest

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from trce_cli.evaluate.question import Evaluation
    from trce_cli.evaluate.survivals.base import Artist, Subject

STEPS: Final = (25, 50, 100, 200)
LR: Final = 1e-4  # of AdamW, constant: usual for a LoRA, high for full tuning
BATCH: Final = 8
RANK: Final = 8  # of the LoRA, of every linear layer
HARMLESS, CONCEPT = 64, 8  # pictures to tune on
SEED: Final = 0
MAX_CAPTION: Final = 1 << 16  # bytes


@dataclass(frozen=True)
class FineTuning:
    """The denoiser's own training loss on pictures that the original drew, with their prompts.

    concept: whether they show what was erased: prompts of the split that no report asks. lora: whether only
    low-rank factors of the linear layers are trained. folder: of the pictures in their place, each with its
    caption beside it in a .txt of its name.
    """

    concept: bool
    lora: bool
    folder: Path | None = None

    @property
    def name(self) -> str:
        """See `Treatment`."""
        return ("relearning" if self.concept else "fine-tuning") + ("-lora" if self.lora else "")

    @property
    def does(self) -> str:
        """See `Treatment`."""
        pictures = f"{CONCEPT} pictures of the concept" if self.concept else f"{HARMLESS} harmless pictures"
        return f"tuned on {pictures}{' as a LoRA' if self.lora else ''}"

    def states(self, evaluation: "Evaluation") -> list[State]:
        """See `Treatment`; BadInput where nobody may draw the concept, and for a folder without pictures or
        captions.
        """
        if self.folder is not None:
            pictures = (
                f"pictures {digest([(hash_file(path), text) for path, text in captioned(self.folder)])}"
            )
        elif self.concept and evaluation.home.folder is None:
            raise BadInput(
                f"--after {self.name} draws pictures of the concept with the embedded checkpoints alone.",
                f"Give it yours: --after {self.name}=DIR, with a caption in a .txt beside each.",
            )
        else:
            pictures = f"{CONCEPT if self.concept else HARMLESS} pictures"
        settings = f"{pictures} lr {LR} batch {BATCH} seed {SEED} rank {RANK * self.lora}"
        return [
            State(
                f"{self.name}-{steps}",
                f"{self.does if self.folder is None else f'tuned on {self.folder.name}'}, {steps} steps",
                f"{self.name} {steps} steps {settings}",
                of_original=True,
                steps=steps,
            )
            for steps in STEPS
        ]

    def enter(self, subject: "Subject", states: Sequence[State]) -> Iterator[tuple[State, "Artist"]]:
        """See `Treatment`. Trained and drawn in float32."""
        import torch

        if not states:
            return
        latents, prompts = self._pictures(subject)
        denoiser = subject.erased.family.denoise(subject.erased)
        told = denoiser.condition(prompts, subject.device)
        rows, schedule = told.rows(prompts), denoiser.schedule(1)
        module = denoiser.load(subject.device, torch.float32)
        trained = adapted(module) if self.lora else every(module)
        optimizer = torch.optim.AdamW(trained, lr=LR)
        generator = torch.Generator().manual_seed(SEED)
        wanted = {state.steps: state for state in states if state.steps}
        report = subject.task(f"Tuning ({self.name})", max(wanted), "steps")
        for step in range(1, max(wanted) + 1):
            batch = torch.randint(len(latents), (BATCH,), generator=generator)
            timesteps = torch.randint(schedule.levels, (BATCH,), generator=generator).to(subject.device)
            clean = latents[batch].to(subject.device)
            noise = torch.randn(clean.shape, generator=generator).to(subject.device)
            noised = schedule.noised(clean, noise, timesteps)
            predicted = denoiser.predict(module, noised, timesteps, told.told(rows[batch]))
            loss = torch.nn.functional.mse_loss(predicted, schedule.wanted(clean, noise, timesteps))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            report(1)
            if step in wanted:
                pipe = subject.pipe(dtype="float32")
                setattr(pipe, subject.erased.family.denoiser, module)
                yield wanted[step], subject.artist(pipe)
                del pipe

    def _pictures(self, subject: "Subject") -> tuple["Tensor", list[str]]:
        """Latents of the pictures, of the size that is drawn, float32 on the CPU, and their prompts."""
        import torch

        from trce_cli.system.memory import free

        pipe = subject.pipe("original", "float32")
        found, prompts = [], []
        for picture, prompt in self._drawn(subject, pipe) if self.folder is None else self._read(subject):
            found.append(subject.erased.family.latents(pipe, picture[None]).cpu())
            prompts.append(prompt)
        del pipe
        free(subject.device)
        return torch.cat(found), prompts

    def _read(self, subject: "Subject") -> Iterator[tuple["np.ndarray", str]]:
        """The folder's pictures, RGB uint8, cut to the size that is drawn, with their captions."""
        import numpy as np
        from PIL import ImageOps

        from trce_cli.images.record import load

        assert self.folder is not None
        canvas = subject.erased.family.canvas(subject.erased)
        for path, caption in captioned(self.folder):
            yield np.asarray(ImageOps.fit(load(path), (canvas.width, canvas.height))), caption

    def _drawn(self, subject: "Subject", pipe: Any) -> Iterator[tuple["np.ndarray", str]]:
        """Pictures that the original draws, RGB uint8, with their prompts."""
        import numpy as np

        from trce_cli.images.draw import draw
        from trce_cli.images.plan import plan_images
        from trce_cli.prompts.files import Prompt
        from trce_cli.prompts.suites import built_in_suite, seeded

        evaluation = subject.evaluation
        if self.concept:
            suite = built_in_suite("explicit", evaluation.presets, evaluation.home, CONCEPT, SEED, "tuning")
            assert suite is not None, "the embedded world has one"
            prompts = list(suite.prompts)
        else:
            captions = Random(SEED).sample(evaluation.home.captions(), HARMLESS)
            prompts = list(seeded((Prompt(caption) for caption in captions), SEED))
        settings = evaluation.settings.model_copy(update={"guidance_scale": evaluation.home.guidance})
        records = plan_images(prompts, {"original": evaluation.original}, settings)
        report = subject.task("Drawing tuning pictures", len(records), "images")
        for record, image in draw(evaluation.original.family, pipe, records):
            yield np.asarray(image), record.prompt
            report(1)


def captioned(folder: Path) -> list[tuple[Path, str]]:
    """The pictures in a folder, sorted, each with its caption; BadInput where one lacks it, and for none."""
    paths = pictures_in(folder, "pictures to tune on")
    for path in paths:
        if not path.with_suffix(".txt").exists():
            raise BadInput(
                f"{path} has no caption beside it.",
                f"Write what it shows into {path.with_suffix('.txt').name}, as trainers have it.",
            )
    return [(path, read_text(path.with_suffix(".txt"), MAX_CAPTION).strip()) for path in paths]


def every(module: "nn.Module") -> list["nn.Parameter"]:
    """All weights of a module, to be trained."""
    return list(module.requires_grad_(True).parameters())


def adapted(module: "nn.Module") -> list["nn.Parameter"]:
    """The factors of a LoRA that the module gets on all of its linear layers, to be trained."""
    import torch
    from peft import LoraConfig, inject_adapter_in_model

    layers = [name for name, layer in module.named_modules() if isinstance(layer, torch.nn.Linear)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=layers), module)
    return [weight for weight in module.parameters() if weight.requires_grad]
