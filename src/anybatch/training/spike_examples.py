"""Choose the examples behind a spike, and say what is odd about each.

    gradient    drive_i = share_i,                    height_i = |c_i| n_i |grad m_i|
    loss        drive_i = c_i v_i / sum_j c_j v_j,    height_i = m_i

    in falling order of the drive:  name i,  rest <- rest - drive_i * x;    until rest <= m

x is the value of the spike and m the median of the values before it. An example is named only if
its height stands out of its batch, by the rule of `spikes`, and only if without all that are named
there would be no spike: rest <= limit. So a batch that is high as a whole, for instance since the
learning rate is too large, names nobody. Behind a spike of the largest loss are the examples whose
loss is above its limit.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from anybatch.training.spike_rows import Rows
from anybatch.training.spikes import SpikeExample, Verdict, find_limit

__all__ = ["Past", "choose_examples", "describe_example"]

MOST = 10  # examples that a spike names
TIMES = 2.0  # the median: from here on a figure is odd

Past = Callable[[Sequence[int]], Mapping[int, Sequence[float]]]
"""Norms of examples at their earlier visits, by id."""


def choose_examples(rows: Rows, verdict: Verdict, factor: float) -> list[int]:
    """Choose the examples behind a spike; return their places in the batch.

    Args:
        rows: of the whole batch.
        factor: of `SpikeWatch`.
    """
    if verdict.signal == "example":
        order = sorted(range(len(rows["loss"])), key=lambda i: -rows["loss"][i])
        return [i for i in order if rows["loss"][i] > verdict.limit][:MOST]
    drives, heights = _measure_drives(rows, verdict), rows["loss"]
    if verdict.signal == "norm":
        heights = rows.get("height", heights)
    _, limit = find_limit(sorted(heights), factor)
    places: list[int] = []
    rest = verdict.value
    for i in sorted(range(len(drives)), key=lambda i: -drives[i]):
        if rest <= verdict.median or drives[i] <= 0 or len(places) == MOST:
            break
        if heights[i] > limit or len(drives) == 1:
            places.append(i)
            rest -= drives[i] * verdict.value
    return places if rest <= verdict.limit else []


def describe_example(rows: Rows, i: int, past: Sequence[float]) -> SpikeExample:
    """Describe the example at a place of the batch.

    Args:
        past: its norms at earlier visits, if they are known.
    """
    figures: dict[str, Any] = {name: rows[name][i] for name in ("id", "loss")}
    figures |= {name: rows[name][i] if name in rows else None for name in ("norm", "share")}
    return SpikeExample(**figures, findings=tuple(_list_findings(rows, i, past)))


def _measure_drives(rows: Rows, verdict: Verdict) -> list[float]:
    if verdict.signal == "norm" and "share" in rows:
        return rows["share"]
    parts = rows["part"]
    total = sum(parts)
    return [part / total if total else 0.0 for part in parts]


def _list_findings(rows: Rows, i: int, past: Sequence[float]) -> list[str]:
    """List what is odd about an example, each in words."""
    findings = []
    if "norm" in rows and (times := _compare(rows["norm"], i)) >= TIMES:
        findings.append(f"its gradient is {times:.3g} times as long as the median of the batch")
    if past and "norm" in rows:
        findings.append(_compare_with_past(rows["norm"][i], past))
    if (times := _compare(rows["loss"], i)) >= TIMES:
        findings.append(f"its loss is {times:.3g} times the median of the batch")
    if "length" in rows:
        times = _compare(rows["length"], i)
        if times >= TIMES or 0 < times <= 1 / TIMES:
            findings.append(f"its length is {times:.3g} times the median of the batch")
    findings += _find_duplicates(rows, i)
    if "label" in rows:
        label = rows["label"][i]
        others = rows["label"].count(label) - 1
        findings.append(f"its label is {label}, as in {others} of {len(rows['label']) - 1} others")
    return findings


def _compare(values: Sequence[float], i: int) -> float:
    """Divide a value by the median of all; 0 if they cannot be compared."""
    median = sorted(values)[(len(values) - 1) // 2]
    return values[i] / median if median > 0 else 0.0


def _compare_with_past(norm: float, past: Sequence[float]) -> str:
    median = sorted(past)[(len(past) - 1) // 2]
    visits = "its earlier visit" if len(past) == 1 else f"its {len(past)} earlier visits"
    if median <= 0:
        return f"its gradient was 0 at {visits}"
    return f"its gradient is {norm / median:.3g} times as long as at {visits}"


def _find_duplicates(rows: Rows, i: int) -> list[str]:
    """Find the examples of the batch that have the same inputs."""
    contents = rows.get("content", [])
    twins = [j for j, content in enumerate(contents) if content == contents[i] and j != i]
    if not twins:
        return []
    names = ", ".join(str(rows["id"][j]) for j in twins[:5]) + (" ..." if twins[5:] else "")
    labels = rows.get("label")
    differ = labels is not None and any(labels[j] != labels[i] for j in twins)
    return [f"the same inputs as example {names}" + (" with another label" if differ else "")]
