"""Settings: each is written once, as the field of a model with its default, bounds and description.

From that field come the option of the command line, its help and its check (`cli/options.py`) and, for what a
preset may recommend, the key of its table (`prompts/presets.py`).
"""

import importlib.util
import reprlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from trce_cli.errors import BadInput, what_is_wrong

MAX_COUNT: Final = 100_000  # of what is listed before it is done: steps, pictures, states
MAX_SEED: Final = (1 << 64) - 1  # what torch.Generator takes


def _at_most(most: int) -> AfterValidator:
    """A bound that goes without saying in the help."""

    def check(value: int) -> int:
        if value > most:
            raise ValueError(f"must be at most {most}, not {reprlib.repr(value)}")
        return value

    return AfterValidator(check)


Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1), _at_most(MAX_COUNT)]
Number = Annotated[int, Field(ge=0), _at_most(MAX_COUNT)]
Seed = Annotated[int, Field(ge=0, description="Seed of every random choice."), _at_most(MAX_SEED)]


def one_of(names: Collection[str]) -> AfterValidator:
    """What a text in a settings model must be, where the names are found and not written down."""

    def check(name: str) -> str:
        if name not in names:
            raise ValueError(f"must be one of {', '.join(names)}, not {name!r}")
        return name

    return AfterValidator(check)


class Settings(BaseModel):
    """The base of all settings: types as written, no key that is not named, nothing changes afterwards.

    A field's description is the help of its option. `{default}` in it stands for the default, which is shown
    behind the help where the text does not speak of it.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    @classmethod
    def of(cls, values: Mapping[str, Any], spelt: Callable[[str], str] = str) -> Self:
        """These settings; BadInput for the first wrong one, which it calls what `spelt` makes of its name."""
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            name = f"{spelt(str(first['loc'][0]))} " if first["loc"] else ""
            raise BadInput(f"{name}{what_is_wrong(first)}.") from None

    def given(self) -> dict[str, Any]:
        """What was set, without what was left to its default."""
        return {
            name: getattr(self, name) for name in type(self).model_fields if name in self.model_fields_set
        }


def _installed(name: str) -> str:
    if not importlib.util.find_spec(name):
        raise ValueError(f"is of no use: {name} is not installed (pip install {name})")
    return name


class Tracking(Settings):
    """Who follows a run."""

    log_with: Annotated[Literal["tensorboard", "wandb", "trackio"], AfterValidator(_installed)] | None = (
        Field(None, description="Tell this tracker the figures as well.")
    )


@dataclass(frozen=True)
class Flag:
    """How a setting is spelt on the command line, where that does not follow from its name and type.

    names: such as `--output` and `-o`; `--grid/--no-grid` for a setting that can be taken back. metavar:
    what stands for its value in the help. parse: makes the value of the text. gone: why an option of old
    command lines has no effect any more; it is still taken, with a remark, and not in the help.
    """

    names: tuple[str, ...] = ()
    metavar: str | None = None
    parse: Callable[[str], Any] | None = None
    gone: str | None = None


def option_name(name: str) -> str:
    """The option of a setting: `early_steps` -> `--early-steps`."""
    return "--" + name.replace("_", "-")
