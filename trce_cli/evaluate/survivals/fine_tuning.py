"""Fine-tuning as users do it, on harmless pictures or on a few of the concept, in full or as a LoRA."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from random import Random
from typing import TYPE_CHECKING, Final

from trce_cli.errors import BadInput
from trce_cli.evaluate.survivals.base import State

if TYPE_CHECKING:
    from torch import Tensor, nn

    from trce_cli.evaluate.question import Evaluation
    from trce_cli.evaluate.survivals.base import Artist, Subject

STEPS: Final = (25, 50, 100, 200)
LR: Final = 1e-4  # of AdamW, constant: usual for a LoRA, high for full tuning
BATCH: Final = 8
RANK: Final = 8  # of the LoRA, of every linear layer
HARMLESS, CONCEPT = 64, 8  # pictures to tune on
SEED: Final = 0


@dataclass(frozen=True)
class FineTuning:
    """The denoiser's own training loss on pictures that the original drew, with their prompts.

    concept: whether they show what was erased: prompts of the split that no report asks. lora: whether only
    low-rank factors of the linear layers are trained.
    """

    concept: bool
    lora: bool

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
        """See `Treatment`; BadInput for a LoRA without peft, and where nobody may draw the concept."""
        if self.lora and find_spec("peft") is None:
            raise BadInput(f"--after {self.name} needs the package peft.", "pip install peft")
        if self.concept and evaluation.home.folder is None:
            raise BadInput(
                f"--after {self.name} is of the embedded checkpoints alone, whose pictures it draws."
            )
        count = CONCEPT if self.concept else HARMLESS
        settings = f"{count} pictures lr {LR} batch {BATCH} seed {SEED} rank {RANK * self.lora}"
        return [
            State(
                f"{self.name}-{steps}",
                f"{self.does}, {steps} steps",
                f"{self.name} {steps} steps {settings}",
                of_original=True,
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
        wanted = {int(state.name.rpartition("-")[2]): state for state in states}
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
        """Latents of pictures that the original draws, float32 on the CPU, and their prompts."""
        import numpy as np
        import torch

        from trce_cli.images.draw import draw
        from trce_cli.images.plan import plan_images
        from trce_cli.prompts.files import Prompt
        from trce_cli.prompts.suites import built_in_suite, seeded
        from trce_cli.system.memory import free

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
        pipe, family = subject.pipe("original", "float32"), evaluation.original.family
        report = subject.task("Drawing pictures to tune on", len(records), "images")
        found = []
        for _, image in draw(family, pipe, records):
            found.append(family.latents(pipe, np.asarray(image)[None]).cpu())
            report(1)
        del pipe
        free(subject.device)
        return torch.cat(found), [prompt.text for prompt in prompts]


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
