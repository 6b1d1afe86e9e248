"""Find spikes of the loss, of an example's loss, or of the gradient's norm, by a robust rule.

    x is a spike   if   x > limit(x_1 .. x_n) = m + factor * s

    m = median(x_1 .. x_n),    s = max(1.4826 * median |x_k - m|, 0.05 |m|),    n >= 20

x_1 .. x_n are the last `window` values before x, spikes included: after half a window the new level
of a loss that stays high is no spike any more. 1.4826 times the median deviation is the standard
deviation of normal values, whatever a few outliers are. The floor of 5 % keeps tiny jitter from
being a spike. An update that is skipped is not judged.

    B < b = median(B_1 .. B_n):    limit of the loss = m + factor * s * sqrt(b / B)
                                   limit of |G|      = (m + factor * s) * sqrt(b / B)

B is the number of examples. The mean over a short batch, such as the last one of an epoch, is
noisier. Three values are judged: the loss, the norm |G|, and the largest loss of one example, whose
limit does not depend on B. The mean over a batch hides one bad example; the largest loss shows it.

The same limit says which examples stand out of their batch: see `spike_examples`.

Source: Leys et al. 2013, "Detecting outliers: do not use standard deviation around the mean, use
absolute deviation around the median".
"""

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, final

from anybatch.batch import is_count, is_number
from anybatch.errors import LedgerError

__all__ = ["History", "Signal", "Spike", "SpikeExample", "SpikeWatch", "Verdict", "find_limit"]

LEAST = 20  # values before the first is judged
FLOOR = 0.05  # of the median
NORMAL = 1.4826  # standard deviation of a normal variable over its median deviation

Signal = Literal["loss", "norm", "example"]
_NAMES = {"loss": "loss", "norm": "norm of the gradient"} | {
    "example": "largest loss of an example"
}


@dataclass(frozen=True, slots=True)
class SpikeWatch:
    """Watch for a spike of the loss or the gradient's norm, and name the examples behind it.

    >>> import torch
    >>> import anybatch as ab
    >>> model = torch.nn.Linear(3, 1)
    >>> objective = ab.Objective(lambda model, batch: (model(batch[0])[:, 0] - batch[1]) ** 2)
    >>> inputs, targets = torch.rand(512, 3), torch.rand(512)
    >>> targets[77] = 100.0  # a mistake in the data
    >>> sgd, order = torch.optim.SGD(model.parameters(), lr=0.01), ab.Order(512, batch_size=8)
    >>> steps = ab.steps(
    ...     model, objective, sgd, (inputs, targets), order=order, epochs=2, spikes=SpikeWatch()
    ... )
    >>> spikes = [step.spike for step in steps if step.spike is not None]
    >>> max(spikes, key=lambda spike: spike.value).examples[0].id
    77

    The signals cost little: the loss, the largest loss of an example, and the norm of the gradient
    that is there. Only at a spike
    the gradient of that step is computed a second time, with norms and shares of its examples,
    before the weights change. The training keeps its bits.

    Args:
        window: number of earlier values that a value is compared with, at least 20.
        factor: how many deviations above the median a spike is.

    Raises:
        LedgerError: an argument is out of range.
    """

    window: int = 100
    factor: float = 4.0

    def __post_init__(self) -> None:
        if not (is_count(self.window) and self.window >= LEAST):
            raise LedgerError(
                f"SpikeWatch has window={self.window!r}. It must be a number of updates, at least "
                f"{LEAST}."
            )
        if not (is_number(self.factor) and 0 < self.factor < math.inf):
            raise LedgerError(
                f"SpikeWatch has factor={self.factor!r}. It must be a number above 0, such as 4.0."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class SpikeExample:
    """One example behind a spike.

    >>> print(SpikeExample(id=7, loss=9.0, norm=40.0, share=0.9, findings=("its label is 3",)))
    example 7: share 0.9, norm 40, loss 9; its label is 3
    """

    id: int  # without ids: its place in the batch
    loss: float | None  # m_i, or what it adds to the loss if there are several terms
    norm: float | None  # of its gradient; None: see `Spike.why`
    share: float | None  # of the gradient of the batch
    findings: tuple[str, ...]  # what is odd about it, each in words

    def __str__(self) -> str:
        names = ("share", "norm", "loss")
        values = {name: getattr(self, name) for name in names}
        figures = [f"{name} {value:.3g}" for name, value in values.items() if value is not None]
        return f"example {self.id}: " + "; ".join([", ".join(figures), *self.findings])


@dataclass(frozen=True, slots=True, kw_only=True)
class Spike:
    """A spike of one update, and the examples behind it.

    >>> spike = Spike(step=7, signal="loss", value=9.0, median=1.0, limit=1.2, examples=())
    >>> print(spike)
    Step 7: the loss is 9, after a median of 1. Above 1.2 it is a spike.
      No example stands out of its batch.
    """

    step: int
    signal: Signal
    value: float
    median: float  # of the values before
    limit: float  # above which a value is a spike
    examples: tuple[SpikeExample, ...]  # the largest part first
    why: str | None = None  # norms and shares are missing, if they are

    @property
    def summary(self) -> str:
        """Text of one line: the value, and the examples behind it."""
        names = ", ".join(str(example.id) for example in self.examples)
        behind = f"Behind it: example {names}." if names else "No example stands out of its batch."
        return f"{self._describe_value()} {behind}"

    def _describe_value(self) -> str:
        return (
            f"Step {self.step}: the {_NAMES[self.signal]} is {self.value:.4g}, after a median of "
            f"{self.median:.4g}. Above {self.limit:.4g} it is a spike."
        )

    def __str__(self) -> str:
        lines = [str(example) for example in self.examples]
        if self.why is not None:
            lines.append(f"Norms and shares are missing: {self.why}")
        return "\n  ".join(
            [self._describe_value(), *(lines or ["No example stands out of its batch."])]
        )

    def make_row(self) -> dict[str, Any]:
        """Build the row of this spike for the records."""
        row: dict[str, Any] = {"kind": "spike", "step": self.step, "signal": self.signal}
        row |= {"value": self.value, "median": self.median, "limit": self.limit}
        row["examples"] = [
            {
                "id": example.id,
                "loss": example.loss,
                "norm": example.norm,
                "share": example.share,
                "findings": list(example.findings),
            }
            for example in self.examples
        ]
        return row if self.why is None else row | {"why": self.why}


class Verdict(NamedTuple):
    """A value that is a spike, and what it was compared with."""

    signal: Signal
    value: float
    median: float
    limit: float


def find_limit(values: Sequence[float], factor: float) -> tuple[float, float]:
    """Find the median of values in rising order, and the limit above which a value stands out.

    Of an even number of values the lower middle one is the median: with two values, one of which
    is ten times the other, the larger one stands out.
    """
    median = _find_median(values)
    deviation = _find_median(sorted(abs(x - median) for x in values))
    return median, median + factor * max(NORMAL * deviation, FLOOR * abs(median))


@dataclass
class _Values:
    """Last values of one signal, in time and in rising order."""

    recent: deque[float]
    rising: list[float] = field(default_factory=list)

    def add(self, x: float) -> None:
        if len(self.recent) == self.recent.maxlen:
            del self.rising[bisect_left(self.rising, self.recent[0])]
        self.recent.append(x)
        insort(self.rising, x)


@final
class History:
    """Last values of each signal.

    Args:
        watch: the rule.
    """

    def __init__(self, watch: SpikeWatch) -> None:
        self.watch = watch
        self._values: dict[Signal, _Values] = {
            signal: _Values(deque(maxlen=watch.window)) for signal in ("loss", "norm", "example")
        }
        self._sizes = _Values(deque(maxlen=watch.window))

    def judge(self, values: Mapping[Signal, float], size: int) -> list[Verdict]:
        """Judge the values of an update, and add them; return its spikes, the worst one first.

        Args:
            values: of each signal.
            size: number of examples in the batch.
        """
        verdicts = [self._judge_one(signal, value, size) for signal, value in values.items()]
        for signal, value in values.items():
            self._values[signal].add(value)
        self._sizes.add(size)
        spikes = [verdict for verdict in verdicts if verdict is not None]
        return sorted(spikes, key=_measure_excess, reverse=True)

    def _judge_one(self, signal: Signal, x: float, size: int) -> Verdict | None:
        rising = self._values[signal].rising
        if len(rising) < LEAST:
            return None
        m = _find_median(rising)
        if x <= m + self.watch.factor * FLOOR * abs(m):  # the limit is not lower: no need for it
            return None
        median, limit = find_limit(rising, self.watch.factor)
        noise = math.sqrt(max(_find_median(self._sizes.rising) / size, 1.0))
        if signal == "norm":
            limit *= noise
        elif signal == "loss":
            limit = median + (limit - median) * noise
        return Verdict(signal, x, median, limit) if x > limit else None

    def _list_values(self) -> list[tuple[str, _Values]]:
        return [*self._values.items(), ("size", self._sizes)]

    def state_dict(self) -> dict[str, Any]:
        """Return the values, oldest first."""
        return {name: list(values.recent) for name, values in self._list_values()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what `state_dict` has returned; with a shorter window, the last values of it."""
        for name, values in self._list_values():
            numbers = [float(x) for x in state[name]]
            if not all(map(math.isfinite, numbers)):
                raise ValueError(f"the history of the {name} has a value that is not finite.")
            values.recent.clear()
            values.rising.clear()
            for x in numbers:
                values.add(x)


def _find_median(values: Sequence[float]) -> float:
    """Return the median of values in rising order; the lower middle one of an even number."""
    return values[(len(values) - 1) // 2]


def _measure_excess(verdict: Verdict) -> float:
    """Measure how far a value lies above its limit, in units of the limit over the median."""
    width = verdict.limit - verdict.median
    return (verdict.value - verdict.median) / width if width > 0 else math.inf
