"""What a figure means: good, weak or bad by two limits, so that nobody has to know what is usual."""

from dataclasses import dataclass
from typing import Literal

Word = Literal["good", "weak", "bad"]


@dataclass(frozen=True)
class Limits:
    """Up to where a figure is good, and up to where it is weak; beyond that it is bad.

    Less is better where `good` < `weak`, more is better where `good` > `weak`.
    """

    good: float
    weak: float

    @property
    def less_is_better(self) -> bool:
        """Whether it is good to be small."""
        return self.good < self.weak

    def word(self, value: float) -> Word:
        """The verdict on a value; the limits themselves are still good, or weak."""
        sign = 1 if self.less_is_better else -1
        if sign * value <= sign * self.good:
            return "good"
        return "weak" if sign * value <= sign * self.weak else "bad"
