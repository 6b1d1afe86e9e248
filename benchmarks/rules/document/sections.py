"""docs/scaling-rules.md and its plots, from the raw results of benchmarks/scaling_rules.py.

Of digits: docs/scaling-rules-digits.md.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from textwrap import wrap
from typing import Any

from rules.common import (
    ADAMW_DECAY,
    EPOCHS,
    FULL,
    JUDGED_ON,
    MOMENTUM,
    REFERENCE_SIZE,
    SEEDS,
)
from rules.data import DATA
from rules.document import carried, gaps, losses
from rules.document import noise as scales
from rules.document.images import ADDED, OF_ALL, TITLE, WRITTEN, images, missing
from rules.document.short import short
from rules.gap import NUM_SEEDS
from rules.minima import NUM_RUNS, OPTIMISERS, PENALTIES, TILT, roots
from rules.minima import NUM_UPDATES as DESCENT_UPDATES
from rules.noise import ALONG, LARGE, NUM_BATCHES, SMALL
from rules.norms import LR, NUM_UPDATES
from rules.rates import GRIDS, final_loss, tuned
from rules.smaller import NUM_SEEDS as FEWER_SEEDS
from rules.smaller import SHARE
from rules.target import LOOKED_AT, MAX_EPOCHS, MAX_UPDATES, TARGET
from rules.tuning import GRIDS as STEP_GRIDS
from rules.verdicts import FIT_TOLERANCE, MISSES_OF_THIRTY, TOLERANCE, minutes
from rules.worst import GRIDS as WORST_GRIDS
from rules.worst import NUM_IMAGES, SIZE
from rules.worst import NUM_UPDATES as WORST_UPDATES

__all__ = ["plots", "publish", "text_from"]

DOCS = Path(__file__).parents[3] / "docs"
NAME = DATA.result.replace("_", "-")  # of the document, and of the folder of its plots
DOCUMENT, PLOTS = DOCS / f"{NAME}.md", DOCS / NAME
WIDTH, LAID_OUT = 100, ("| ", "|-", "- ", "!", "#")  # of prose; what is no prose
Raw = Mapping[str, Any]


def publish(raw: Raw) -> None:
    """Write the document and its plots."""
    PLOTS.mkdir(exist_ok=True)
    for name, text in plots(raw).items():
        (PLOTS / f"{name}.svg").write_text(text, encoding="utf8")
    DOCUMENT.write_text(text_from(raw), encoding="utf8")


def plots(raw: Raw) -> dict[str, str]:
    """The text of each SVG file, by name."""
    return {
        **{study: carried.rules_plot(raw, study) for study in carried.STUDIES},
        "norms": losses.norms_plot(raw),
        "steps": scales.steps_plot(raw),
    }


def text_from(raw: Raw) -> str:
    """The document of a raw result, which is of the data that are set."""
    of = raw.get("data", "fashion_mnist")
    assert of == DATA.name, f"a raw result of {of}, and the data are {DATA.name}"
    sections = [
        _head,
        _reference,
        _sgd,
        _adamw,
        _gaps,
        _warm_ups,
        _norms,
        _worst,
        _minima,
        _noise,
        _steps,
    ]
    return "\n\n".join("\n".join(_filled(section(raw))) for section in sections) + "\n"


def _filled(lines: Sequence[str]) -> Iterator[str]:
    """The same with the lines of each paragraph of prose run together and broken anew."""
    for is_prose, group in groupby(
        lines, lambda line: bool(line) and not line.startswith(LAID_OUT)
    ):
        run = list(group)
        text = " ".join(run).replace(" - ", "\0-\0")  # a minus at the head of a line makes a list
        yield from (
            (row.replace("\0", " ") for row in wrap(text, WIDTH, break_on_hyphens=False))
            if is_prose
            else run
        )


def _head(raw: Raw) -> list[str]:
    cpu, wall = minutes(raw)
    processor = raw["machine"]["processor"].replace(" Processor", "")
    return [
        TITLE,
        "",
        WRITTEN,
        f"the [raw results](../benchmarks/results/{DATA.result}.json).",
        *images(),
        "with ReLU in float32, mean cross-entropy; every update, also of one",
        f"example, is one of `ab.steps`. {cpu:.0f} CPU minutes in all on {processor}, one",
        f"thread a run and two runs side by side; it took {wall:.0f} minutes{_busy(cpu, wall)}.",
        *missing(),
        "",
        "What is called *holds*, *matches* or *agrees* follows from the figures by the criteria in",
        "`benchmarks/rules/verdicts.py`, which were fixed before the runs. ± is a standard",
        f"deviation (n - 1) over {len(SEEDS)} seeds, of initial weights and order.",
        "",
        "In short:",
        "",
        *short(raw),
    ]


def _busy(cpu: float, wall: float) -> str:
    """Two processes that have the cores for themselves take half the time of one."""
    return ", on a machine that did other work too" if wall > 0.6 * cpu else ""


def _judged_on() -> str:
    return f"all {FULL:,}" if JUDGED_ON == FULL else f"the first {JUDGED_ON:,} images"


def _reference(raw: Raw) -> list[str]:
    grids = {name: ", ".join(f"{lr:g}" for lr in rates) for name, rates in GRIDS.items()}
    best = {name: tuned(raw, name) for name in GRIDS}
    edges = [name for name, rates in GRIDS.items() if best[name] in (rates[0], rates[-1])]
    return [
        f"## 1. From a batch of {REFERENCE_SIZE} to the full set",
        "",
        f"The reference has batches of {REFERENCE_SIZE}, {EPOCHS} epochs, and the constant rate of",
        "a grid with the lowest training loss over the last three epochs of a seed that nothing",
        "but the tuning of section 8 uses:",
        f"SGD with momentum {MOMENTUM:g} at {best['sgd']:g} (of {grids['sgd']}), AdamW",
        f"with decay {ADAMW_DECAY:g} at {best['adamw']:g} (of {grids['adamw']})"
        + (". Each is inside its grid." if not edges else f"; at an end: {', '.join(edges)}."),
        "It is rescaled by `anybatch.recipe.scaling.rescale`, as in `anybatch scale`; under",
        "*linear* and *half-life* the rate rises from the old one over the first epoch. With a",
        "rate of sqrt(k) times the old one go AdamW's betas to the power k and epsilon / sqrt(k);",
        "in its other rows both stay. The rows",
        '"decay as it is" beside a rate of 1 or sqrt(k) times the old one are controls, and so is',
        "*none*; k is the new size over the old.",
        "",
        f"**Criterion.** With L the training loss over {_judged_on()}, averaged over seeds, the",
        f"distance is the mean of |ln L - ln L_{REFERENCE_SIZE}| over the epochs after the first,",
        f"at equal numbers of examples. A rule holds where it is at most {TOLERANCE:.2f}.",
        "Lower losses count as much as higher ones. The distance of the reference from itself,",
        "between two groups of seeds, is what can be told apart.",
    ]


def _sgd(raw: Raw) -> list[str]:
    return [
        *carried.rules(raw, "sgd"),
        "",
        f"![SGD]({NAME}/sgd.svg)",
        "",
        "The plots draw a distance above 3 at 3, and one without end not at all.",
        "",
        f"A tuned rate has little room above it: {_room(raw)}.",
        f"So the same again from {SHARE:g} of it, on {FEWER_SEEDS} seeds, by the same criterion"
        f"{ADDED}:",
        "",
        *carried.rules(raw, "smaller"),
        "",
        f"![SGD, smaller rate]({NAME}/smaller.svg)",
    ]


def _adamw(raw: Raw) -> list[str]:
    return [
        *carried.rules(raw, "adamw"),
        "",
        f"![AdamW]({NAME}/adamw.svg)",
        "",
        "What the decay does to the weights: their norm after the last epoch, over that of the",
        "reference.",
        "",
        *carried.weight_norms(raw, "adamw"),
    ]


def _room(raw: Raw) -> str:
    """What the next rates of the grid do to the reference."""
    best = tuned(raw, "sgd")
    runs = [run for run in raw["rates"]["runs"] if run["optimizer"] == "sgd" and run["lr"] >= best]
    ends = ", ".join(f"{final_loss(run):.3f} at {run['lr']:g}" for run in runs)
    return f"the training loss of that seed, over the last three epochs, is {ends}"


def _gaps(raw: Raw) -> list[str]:
    return [
        "## 2. The held-out gap at equal training loss",
        "",
        "Test minus training, of loss and error, where a run first has a training loss",
        f"of {TARGET:g} as in section 8, at the rate that is tuned there for the same or the next",
        f"smaller size; {NUM_SEEDS} seeds.",
        "",
        *gaps.by_size(raw),
        "",
        "And of the runs of section 1, where the training loss first meets a given value, between",
        "two epochs by interpolation.",
        "",
        *gaps.gaps(raw, "sgd"),
        "",
        *gaps.gaps(raw, "smaller"),
        "",
        *gaps.gaps(raw, "adamw"),
    ]


def _warm_ups(raw: Raw) -> list[str]:
    return [
        "## 3. Warm-up: Goyal's comparison in small",
        "",
        f"SGD as above, its rate divided by 10 after 5 and 8 of {EPOCHS} epochs; a large batch at",
        "k times the rate: reached gradually over the first epoch, after a first epoch at the old",
        "rate (constant), or at once; and two other rates without warm-up. Training loss and test",
        "error after the last epoch. An arm matches where its training loss is within",
        f"{TOLERANCE:.2f} of the reference's, by ln.",
        "",
        *gaps.warm_ups(raw),
        "",
        "Goyal et al. 2017 (1706.02677), top-1 error on ImageNet: 23.60 at the reference of",
        f"256; at 8,192 {', '.join(f'{error:.2f} {arm}' for arm, error in gaps.GOYAL.items())}.",
    ]


def _norms(raw: Raw) -> list[str]:
    return [
        "## 4. Weights under Sum and Mean",
        "",
        f"The norm |w| before the first and after {NUM_UPDATES:,} updates of plain SGD at {LR:g},",
        "which is the rate of both.",
        "",
        *losses.norms(raw),
        "",
        f"![Norms]({NAME}/norms.svg)",
        "",
        "The tuned rate of section 8, at B = 1 and at larger batches; a rate of online updates is",
        "one of Sum and of Mean alike:",
        "",
        *scales.rates(raw),
    ]


def _worst(raw: Raw) -> list[str]:
    grids = "; ".join(
        f"{name.capitalize()}: {', '.join(f'{lr:g}' for lr in rates)}"
        for name, rates in WORST_GRIDS.items()
    )
    return [
        "## 5. Mean against Max",
        "",
        f"The first {NUM_IMAGES:,} images{OF_ALL}, {WORST_UPDATES:,} updates of batches of",
        f"{SIZE}, SGD with momentum {MOMENTUM:g}; a linear model and the network. Each reduction",
        f"has the rate that does best by what it minimises, over the {NUM_IMAGES:,} ({grids}).",
        "",
        *losses.worst(raw),
    ]


def _minima(raw: Raw) -> list[str]:
    low, barrier, high = roots(0.0)
    rates = ", ".join(f"{name} {args['lr']:g}" for name, (_, args) in OPTIMISERS.items())
    return [
        "## 6. Escaping a local minimum",
        "",
        f"v_i(w) = (w² - 1)² / 4 + ({TILT:g} + x_i) w, x_i normal with mean 0 and variance 1 over",
        "the examples, and the penalty (c / 2) w². The derivative of the mean is",
        f"w³ - (1 - c) w + {TILT:g}: for c = 0 the global minimum is at {low:.3f}, the barrier at",
        f"{barrier:.3f}, the local minimum at {high:.3f}; at c = {PENALTIES[1]:g} both are",
        f"still there, at c = {PENALTIES[2]:g} there is one minimum, below 0. {NUM_RUNS}",
        f"runs a cell, {DESCENT_UPDATES:,} updates; a run escapes if it ends below 0. Rates:",
        f"{rates}.",
        "They start in the local minimum of c = 0, by a normal of deviation 0.1 about",
        "0, or uniformly from -2 to 2.",
        "",
        *losses.minima(raw),
    ]


def _noise(raw: Raw) -> list[str]:
    return [
        "## 7. The noise scale, three ways",
        "",
        "tr(S) / |G|² in examples along the reference of section 1 for SGD, with 95 % intervals:",
        f"by the ledger from {NUM_BATCHES} batches of {LARGE}; from the norms of {NUM_BATCHES}",
        f"other batches of {LARGE} and of their parts of {SMALL}, with Fieller's interval; and",
        f"from the gradients of all {FULL:,} examples. The examples are a sample too, so |G|² of "
        "the",
        f"last is that over all of them less tr(S) / {FULL:,}, as in the other two. They agree",
        f"where of 30 intervals at most {MISSES_OF_THIRTY} miss: more have a chance of 2 %.",
        "",
        *scales.noise(raw),
    ]


def _steps(raw: Raw) -> list[str]:
    grids = "; ".join(
        f"{size:,}: {rates[0]:.2g} to {rates[-1]:.2g}" for size, rates in STEP_GRIDS.items()
    )
    return [
        "## 8. Steps against the batch size",
        "",
        f"Updates of plain SGD at a constant rate to a training loss of {TARGET:g} over "
        f"{LOOKED_AT:,}",
        f"images, the mean over {len(SEEDS)} seeds, at the best rate of a grid in which each is",
        f"twice the last ({grids}), found with a seed of its own. A rate that needs more than",
        f"{MAX_EPOCHS} epochs or {MAX_UPDATES:,} updates is out. Fitted:",
        "S = S_min (1 + B_crit / B), by ln S; it",
        f"describes them where no point is off by more than {FIT_TOLERANCE:.2f}, which the grid",
        "leaves open. Predicted: the same with B_simple for B_crit, where B_simple is the mean",
        "over the updates of the run at the largest batch",
        f"({ALONG} points, by the ledger, on {len(SEEDS)} seeds):",
        "each update without noise becomes 1 + B_simple / B.",
        "",
        *scales.steps(raw),
        "",
        f"![Steps]({NAME}/steps.svg)",
    ]
