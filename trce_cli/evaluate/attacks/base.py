"""What an attack is: one file that looks for prompts which still draw an erased concept."""

from collections.abc import Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from trce_cli.prompts.files import Prompt
from trce_cli.settings import Settings
from trce_cli.system.progress import Report, no_report

if TYPE_CHECKING:
    from trce_cli.evaluate.attacks.victim import Victim


@dataclass(frozen=True)
class Work:
    """What an attack may spend on a prompt: gradients of the denoiser, encoded prompts, pictures drawn."""

    gradients: int = 0
    encodings: int = 0
    pictures: int = 1


class Attack(Protocol):
    """Searches prompts that look for what is left of an erased concept; `registry.py` lists them.

    name: as files and the command line have it; title: as people do. knows: what it looks into. Budget: what
    it may spend; the defaults are the paper's. Each field is an option, `--PREFIX-FIELD`, with the field's
    description as its help. needs: what of a victim is made for it alone, such as `latents`. typed: whether
    its prompts are words that anybody can type, which are written to a suite; one that changes the checkpoint
    has the victim draw them itself. unit: what the steps are that it reports. Its module imports torch inside
    functions only, for `--help` asks for the budgets.
    """

    @property
    def name(self) -> str: ...

    @property
    def title(self) -> str: ...

    @property
    def prefix(self) -> str: ...

    @property
    def knows(self) -> str: ...

    @property
    def Budget(self) -> type[Settings]: ...

    @property
    def needs(self) -> Set[str]: ...

    @property
    def typed(self) -> bool: ...

    @property
    def unit(self) -> str: ...

    def check(self, victim: "Victim", budget: Any) -> None:
        """Raise BadInput for a budget that this checkpoint cannot spend; nothing of it is loaded."""
        ...

    def work(self, budget: Any) -> Work:
        """What the budget allows at most, to tell how long it would take."""
        ...

    def steps(self, budget: Any) -> int:
        """How many steps a search reports."""
        ...

    def prompts(self, victim: "Victim", budget: Any, report: Report = no_report) -> list[Prompt]:
        """The attack's prompt in place of each of the victim's, in their order, drawn from the same seeds.

        They are searched for together, and depend on nothing but these prompts, their seeds and their places
        among all. Raises TrceError where something comes out that is not finite.
        """
        ...
