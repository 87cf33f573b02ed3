"""What a preset may recommend for the two stages: the keys of its tables `[map]` and `[steer]`.

The numbers of stage 2 are the paper's for SD 1.x (arXiv 2503.07389).
"""

import math
import reprlib
from typing import Annotated, Any

from pydantic import Field, PlainSerializer, PlainValidator, ValidationInfo, field_validator

from trce_cli.errors import BadInput
from trce_cli.settings import Count, Flag, NotNegative, Number, Positive, Settings


def _token_weights(value: Any) -> tuple[float, ...] | dict[str, float]:
    numbers = value.values() if isinstance(value, dict) else value
    if not isinstance(value, list | tuple | dict) or not numbers:
        raise ValueError(f"must be a list in [ ] or a table of slots, not {reprlib.repr(value)}")
    for number in numbers:  # bool is an int
        if type(number) not in (int, float) or not (math.isfinite(number) and number >= 0):
            raise ValueError(f"must be finite numbers of at least 0, not {reprlib.repr(number)}")
    if not any(numbers):
        raise ValueError(f"must not all be zero, as in {reprlib.repr(value)}")
    if isinstance(value, dict):
        return {str(slot): float(number) for slot, number in value.items()}
    return tuple(float(number) for number in value)


def parse_token_weights(text: str) -> tuple[float, ...] | dict[str, float]:
    """`0,1,0,0` -> weights in the order of a family's slots; `FIRST_EOT=1,KEYWORD=.5` -> weights by slot.

    BadInput for what is neither.
    """
    try:
        if "=" not in text:
            return tuple(float(part) for part in text.split(","))
        named = (part.partition("=") for part in text.split(","))
        return {name.strip(): float(weight) for name, _, weight in named}
    except ValueError:
        raise BadInput(
            f"--token-weights {text!r} is not a list of numbers.",
            "Give one for each slot, for example 0,1,0,0, or some by name, for example FIRST_EOT=1.",
        ) from None


# Which slots there are, the family knows: it checks the names, or how many weights there are.
TokenWeights = Annotated[
    tuple[float, ...] | dict[str, float],
    PlainValidator(_token_weights),
    PlainSerializer(lambda weights: weights, return_type=Any),  # a tuple of any length, or a table
]


class MapTable(Settings):
    """`[map]`: what a preset may recommend for stage 1."""

    preserve: NotNegative = Field(
        1.0,  # a benign caption counts as much as a prompt pair
        description="lambda: how much a benign caption counts against a prompt pair; else the preset's, else "
        "the family's, which is {default} or, of language models, 0.3.",
    )
    word_share: Annotated[float, Field(ge=0, le=1)] = Field(
        0.75,  # measured on the embedded checkpoint, see docs/method.md
        description="Share of what is preserved that single words of the tokenizer's vocabulary have; the "
        "rest is the captions', 0 leaves words out; else the preset's, else {default}.",
    )
    word_prompts: Count = Field(
        6000,
        description="Prompts of single words that are preserved at most: a sample of the words in three "
        "templates each, or of few words all in up to six; else the preset's, else {default}.",
    )
    ridge: NotNegative = Field(
        1e-4,  # the largest that cost no erasure on the embedded checkpoint, see docs/method.md
        description="Bounds the edit, so that it survives rounded weights: how much a change counts, as a "
        "share of the mean variance of embeddings, 0 for no bound; else the preset's, else {default}.",
    )
    token_weights: Annotated[
        TokenWeights | None, Flag(metavar="W,W,...|SLOT=W,...", parse=parse_token_weights)
    ] = Field(
        None,
        examples=[{"FIRST_EOT": 1}],
        description="Weights of the tokens that are mapped: of all slots in order, or of some by name (of "
        "SD: SOT, FIRST_EOT, LAST_EOT, KEYWORD; of language models: END, SUFFIX, LAST, TAIL, KEYWORD); else "
        "the preset's, else the family's, which is FIRST_EOT=1 or END=0.5,KEYWORD=0.5.",
    )
    strength: NotNegative = Field(
        1.0,
        description="How much of the edit to apply, 1 is all of it; else the preset's, else {default}.",
    )
    deflate: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0,
        description="Directions of which the edit leaves less than this share, or which it turns round, are "
        "taken away altogether, against attacks; 0 for none; else the preset's, else {default}.",
    )
    compounds: Annotated[int, Field(ge=0, le=100)] = Field(
        0,
        description="Further phrases a concept that name up to three more, against attacks that "
        "put words before a prompt; else the preset's, else {default}.",
    )
    clip_skip: Count = Field(
        1,
        description="Erase for every clip skip up to this one, in one edit: 2 also what web UIs read at the "
        "text encoder's last layer but one; else the preset's, else {default}.",
    )


def _half_of_steps(earlier: dict[str, Any]) -> int:
    return (
        math.ceil(earlier["steps"] / 2) if "steps" in earlier else 1
    )  # 1 where steps are wrong, which is said


class TrajectoryTable(Settings):
    """What trajectories stage 2 is trained on."""

    steps: Count = Field(50, description="DDIM steps of a trajectory; else the preset's, else {default}.")
    early_steps: Count = Field(
        default_factory=_half_of_steps,
        examples=[25],
        description="How many of them, from the noise on, are tuned; else half.",
    )
    trajectories_per_concept: Count = Field(
        5, description="Seeds a concept; else the preset's, else {default}."
    )
    unconditional: Number = Field(
        2000,
        description="Unconditional states that hold everything else in place; else the preset's, else "
        "{default}.",
    )
    benign: Number = Field(
        1000,
        description="States under benign prompts, held to what the original predicts there; 0 is the paper's "
        "own loss; else the preset's, else {default}.",
    )
    guidance_scale: NotNegative = Field(
        3.0, description="Guidance of the trajectories; else the preset's, else {default}."
    )
    steering_guidance: NotNegative = Field(
        15.0, description="Guidance of the targets; else the preset's, else {default}."
    )

    @field_validator("early_steps")
    @classmethod
    def _check_early_steps_are_steps(cls, value: int, info: ValidationInfo) -> int:
        if value > info.data.get("steps", value):
            raise ValueError(f"is {value}, more than the {info.data['steps']} steps there are")
        return value


class TrainingTable(Settings):
    """How stage 2 is trained."""

    margin: NotNegative = Field(0.01, description="Margin of the hinge; else the preset's, else {default}.")
    regularisation: NotNegative = Field(
        100.0, description="Weight of the unconditional states; else the preset's, else {default}."
    )
    retention: NotNegative = Field(
        100.0, description="Weight of the states under benign prompts; else the preset's, else {default}."
    )
    lr: Positive = Field(1e-6, description="Learning rate; else the preset's, else {default}.")
    epochs: Count | None = Field(
        3, description="Passes over the unsafe states; else the preset's, else {default}."
    )
    max_steps: Count | None = Field(
        None, examples=[1000], description="Optimisation steps, instead of epochs."
    )
    batch_size: Count = Field(
        4,
        description="Unsafe states a step, over all processes, and as many unconditional and benign ones; "
        "else the preset's, else {default}.",
    )


class SteerTable(TrainingTable, TrajectoryTable):
    """`[steer]`: what a preset may recommend for stage 2."""
