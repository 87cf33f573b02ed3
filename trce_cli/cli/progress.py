"""How far a command is: bars that fit the terminal, or where there is none a plain line every so often."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from rich.console import Console as RichConsole
    from rich.console import RenderableType
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID
    from rich.table import Column

WINDOW: Final = 60.0  # seconds that a rate is taken over
SETTLED: Final = 1.0  # seconds after which it says anything
# Seconds until a plain line is due: the first, and from one to the next.
FIRST: Final = 15.0
OFTEN: Final = 60.0
# Characters: a terminal that is narrower gets no rate, one that is as wide longer names and bars.
NARROW: Final = 76
WIDE: Final = 110


class Meter:
    """How much of a task is done, how fast it goes and how long it will take, by a clock in seconds.

    What is done within the first second says nothing of the rate: it may have been there already.
    """

    def __init__(self, total: float | None, unit: str, clock: Callable[[], float] = monotonic) -> None:
        self.total, self.unit, self._clock = total, unit, clock
        self.done = 0.0
        self.began = clock()
        self._seen = deque([(self.began, 0.0)])  # times, and what was done by then

    def advance(self, count: float) -> None:
        """So much more is done."""
        self.done += count
        now = self._clock()
        if now - self.began < SETTLED:
            self._seen.clear()
        self._seen.append((now, self.done))
        while len(self._seen) > 2 and now - self._seen[1][0] > WINDOW:
            self._seen.popleft()

    @property
    def rate(self) -> float | None:
        """Items a second lately; None while that cannot be told."""
        (first, before), (last, after) = self._seen[0], self._seen[-1]
        return (after - before) / (last - first) if last - first >= SETTLED and after > before else None

    @property
    def left(self) -> float | None:
        """Seconds until the task is done; None while that cannot be told."""
        if self.total is None or not self.rate:
            return None
        since = self._clock() - self._seen[-1][0]  # that nothing was told of
        return max(0.0, (self.total - self.done) / self.rate - since)

    def count(self) -> str:
        """`12/200`; nothing where no total is known."""
        return "" if self.total is None else f"{self.done:.0f}/{self.total:.0f}"

    def speed(self) -> str:
        """`0.35 images/s`, or `12 s each` where that reads better."""
        if not self.rate or not self.unit:
            return ""
        if self.rate < 0.1:
            return f"{1 / self.rate:.3g} s each"
        return f"{self.rate:{',.0f' if self.rate >= 100 else '.3g'}} {self.unit}/s"

    def sentence(self, text: str) -> str:
        """`Drawing: 12/200 images, 0.35 images/s, 9 min left`"""
        told = [f"{self.count()} {self.unit}".strip(), self.speed()]
        told.append(f"{spoken(self.left)} left" if self.left is not None else "")
        since = f"{spoken(self._clock() - self.began)} so far"
        return f"{text}: {', '.join(filter(None, told)) or since}"


def spoken(seconds: float) -> str:
    """`45 s`, `9 min`, `3 h 05 min`"""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02} min"


def clock(seconds: float) -> str:
    """`0:45`, `3:05:00`"""
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"


class Sink(Protocol):
    """Shows tasks; each is told of by its meter whenever that has changed, with a word on how it goes."""

    def begin(self, text: str, meter: Meter) -> Callable[[str], None]: ...


class Progress:
    """The tasks of one command."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink

    def task(self, text: str, total: float | None = None, unit: str = "") -> Callable[..., None]:
        """Begin a task of `total` items (None: unknown), which ends where the next one begins.

        Call what it returns with the number of items just done, and a word on how it goes if any.
        """
        meter = Meter(total, unit)
        show = self._sink.begin(text, meter)

        def report(done: float = 1, detail: str = "") -> None:
            meter.advance(done)
            show(detail)

        return report


class Silence:
    """For those who do not want to know."""

    def begin(self, text: str, meter: Meter) -> Callable[[str], None]:
        """See `Sink`."""
        return lambda detail: None


class Lines:
    """A plain line every so often, for log files."""

    def __init__(self, write: Callable[[str], None], now: Callable[[], float] = monotonic) -> None:
        self._write, self._now = write, now
        self._due = now() + FIRST

    def begin(self, text: str, meter: Meter) -> Callable[[str], None]:
        """See `Sink`; the time until the first line is counted from the command's beginning."""

        def show(detail: str) -> None:
            if self._now() >= self._due:
                self._write(meter.sentence(text) + (f"; {detail}" if detail else ""))
                self._due = self._now() + OFTEN

        return show


class Bars:
    """A bar a task; one of the same name takes the place of the last, and what is said lies below."""

    def __init__(self, progress: "RichProgress") -> None:
        self._progress = progress

    def begin(self, text: str, meter: Meter) -> Callable[[str], None]:
        """See `Sink`."""
        for earlier in self._progress.tasks:  # a task ends where the next begins
            if not earlier.finished:
                done, ended = earlier.completed or 1, earlier.fields["meter"]
                ended.total = ended.total and ended.done
                self._progress.update(earlier.id, total=done, completed=done)
        again = [task.id for task in self._progress.tasks if task.description == text]
        for task in again:
            self._progress.remove_task(task)
        bar = self._progress.add_task(text, total=meter.total, meter=meter, detail="")
        return lambda detail: self._update(bar, meter, detail)

    def _update(self, bar: "TaskID", meter: Meter, detail: str) -> None:
        self._progress.update(bar, completed=meter.done, detail=detail)


@contextmanager
def bars(console: "RichConsole") -> Iterator[Bars]:
    """Bars on a terminal while the block runs."""
    from rich.progress import BarColumn, ProgressColumn, Task
    from rich.progress import Progress as RichProgress
    from rich.table import Column
    from rich.text import Text

    class Told(ProgressColumn):
        """A text that is made of the task."""

        def __init__(self, told: Callable[[Task], str], column: "Column | None" = None) -> None:
            super().__init__(column or Column(no_wrap=True))
            self._told = told

        def render(self, task: Task) -> Text:
            return Text(self._told(task))

    def time(task: Task) -> str:
        left = None if task.finished else task.fields["meter"].left
        passed = task.finished_time if task.finished else task.elapsed
        return clock(passed or 0) if left is None else f"{clock(left)} left"

    class Fitting(RichProgress):
        """The bars, and below them how the running task goes."""

        def get_renderables(self) -> "Iterable[RenderableType]":
            yield self.make_tasks_table(self.tasks)
            for task in self.tasks:
                if detail := "" if task.finished else task.fields["detail"]:
                    yield Text(f"  {detail}", no_wrap=True, overflow="ellipsis")

    is_wide = console.width >= WIDE
    name = Column(no_wrap=True, overflow="ellipsis", max_width=48 if is_wide else 25)
    columns: list[ProgressColumn] = [
        Told(lambda task: task.description, name),
        BarColumn(bar_width=24 if is_wide else 12),
        Told(lambda task: task.fields["meter"].count()),
        Told(time),
    ]
    if console.width >= NARROW:
        columns.append(Told(lambda task: task.fields["meter"].speed()))
    with Fitting(*columns, console=console) as progress:
        yield Bars(progress)
