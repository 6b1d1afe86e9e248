"""Tables, plots and figures of docs/scaling.md, from the raw results of benchmarks/scaling.py."""

from collections.abc import Iterable, Mapping
from math import log2, log10
from typing import Any

import scaling_model as model
from scaling_model import Link
from svg import Axis, Series, plot

__all__ = ["plots", "said", "tables"]

Result = Mapping[str, Any]

DEVICE_BYTES = 80e9
BATCH = 2**20
"""Of the figures at 4,096 ranks: 256 examples each."""
ALIGNED = ((4, 64), (3, 48), (3, 64), (8, 64), (8, 100), (48, 1024), (64, 1536), (100, 1024))
LARGE = ((4096, 65536), (4096, 98304), (4096, 100_000), (4096, 5000), (3072, 49152), (3072, 65536))
CASES = ALIGNED + LARGE
GRAINS_A_RANK = (1, 8, 64)
STRIDES = (1, 10, 100, 1000)
FORMS = {"plain": model.ring, "exact": model.exact}
NAMES = {
    "ring": "ring, in one piece",
    "exact": "exact, in one piece",
    "buckets": "exact, in buckets",
    "levels": "exact, in two levels",
    "halving": "the tree by halving",
}
UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))
RAGGED = "exact, 100,000 grains"


def tables(result: Result) -> dict[str, str]:
    """Markdown by name."""
    return {
        "counted": _counted(),
        "aligned": _aligned(CASES),
        "measured": _measured(result),
        "modelled": _modelled(result),
        "simulated": _simulated(result),
        "by_ranks": _by_ranks(result),
        "sharded": _sharded(result["simulated"]["ranks"][-1]),
        "orders": _orders(result),
        "ledger": _ledger(result),
    }


def plots(result: Result) -> dict[str, str]:
    """SVG files by name."""
    simulated = result["simulated"]
    parameters, ranks = simulated["parameters"], simulated["ranks"]
    billion = parameters.index(10**9)
    sizes, worlds = [], []
    for colour, (way, name) in enumerate(NAMES.items()):
        if way == "ring":
            continue  # the same line as exact in one piece
        seconds = [_seconds(simulated, way, ranks[-1], i) for i in range(len(parameters))]
        sizes.append(Series(name, list(zip(parameters, seconds, strict=True)), colour, marks=True))
        at = [(r, _seconds(simulated, way, r, billion)) for r in ranks]
        worlds.append(Series(name, at, colour, marks=True))
    seconds_axis = Axis("seconds", [1e-4, 1e-3, 1e-2, 0.1, 1, 10, 100, 1000], is_log=True)
    return {
        "parameters": plot(
            f"All-reduce of float32 gradients over {ranks[-1]:,} ranks, simulated",
            Axis("parameters", parameters, is_log=True),
            seconds_axis,
            sizes,
        ),
        "ranks": plot(
            "All-reduce of a gradient of 10^9 parameters, simulated",
            Axis("ranks", ranks, is_log=True),
            Axis("seconds", [0.01, 0.1, 1, 10], is_log=True),
            worlds,
        ),
    }


def _table(head: str, rows: Iterable[Iterable[str]]) -> str:
    columns = head.count("|") + 1
    lines = [f"| {head} |", "|" + "---|" * columns, *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines)


def _counted() -> str:
    """Messages and bytes of a rank, read off the closed forms."""
    one_message, one_byte = Link(1, 0), Link(0, 1)
    rows = []
    for ranks in (2, 3, 4, 8, 64, 512, 4096):
        ways = (model.ring, model.exact, model.halving)
        messages = [f"{way(ranks, 1, one_message, 0):,.0f}" for way in ways]
        num_bytes = [f"{way(ranks, 1, one_byte, 0):.3f} n" for way in (model.exact, model.halving)]
        rows.append([f"{ranks:,}", *messages, *num_bytes])
    head = "ranks | ring: messages | exact | halving | ring and exact: bytes | halving"
    return _table(head, rows)


def _aligned(cases: Iterable[tuple[int, int]]) -> str:
    rows = []
    for ranks, grains in cases:
        nodes = model.nodes_by_rank(grains, ranks)
        rows.append(
            [
                *(f"{ranks:,}", f"{grains:,}", f"{grains / ranks:.4g}", f"{max(nodes)}"),
                *(f"{sum(nodes) / ranks:.2f}", f"{model.busiest(nodes):.2f}"),
            ]
        )
    return _table("ranks | grains | a rank | nodes, most | mean | bytes over a ring's", rows)


def _measured(result: Result) -> str:
    rows = []
    for row in result["all-reduce"]["rows"]:
        seconds, over = row["seconds"], row["over plain"]
        ranks, num_bytes = row["ranks"], row["bytes"]
        wire = model.busiest(model.nodes_by_rank(10, ranks))
        rows.append(
            [
                *(f"{ranks}", f"{num_bytes // 1024:,}", f"{row['rounds']}"),
                *(f"{1e3 * seconds['plain']:.2f}", f"{1e3 * seconds['exact']:.2f}"),
                *(f"{over['exact']:.2f}", f"{over['exact, 10 grains']:.2f}", f"{wire:.2f}"),
            ]
        )
    head = "ranks | KiB | rounds | plain, ms | exact, ms | exact over plain | 10 grains over plain "
    return _table(head + "| its bytes over a ring's", rows)


def _turns(result: Result, ranks: int) -> float:
    """How many ranks share a core."""
    return float(max(1, ranks / result["machine"]["cores"]))


def _link(result: Result, way: str, ranks: int = 2) -> Link:
    """That of a way's own seconds at so many ranks, had each a core."""
    found, turns = result["all-reduce"], _turns(result, ranks)
    rows = [row for row in found["rows"] if row["ranks"] == ranks]
    times = [(row["bytes"], row["seconds"][way] / turns) for row in rows]
    return model.fitted(ranks, times, found["gamma"])


def _off(result: Result, row: Result, way: str) -> tuple[float, float, float]:
    """Measured over predicted: with a core for each rank; with the cores shared by all, from 2
    ranks and from 4."""
    gamma, ranks = result["all-reduce"]["gamma"], row["ranks"]
    alone, from_four = (
        FORMS[way](ranks, row["bytes"], _link(result, way, base), gamma) for base in (2, 4)
    )
    turns, seconds = _turns(result, ranks), row["seconds"][way]
    return seconds / alone, seconds / (alone * turns), seconds / (from_four * turns)


def _modelled(result: Result) -> str:
    rows = []
    for row in result["all-reduce"]["rows"]:
        is_last = row["ranks"] > 4
        off = [
            f"{ratio:.2f}" if is_last or place < 2 else "-"
            for way in FORMS
            for place, ratio in enumerate(_off(result, row, way))
        ]
        rows.append([f"{row['ranks']}", f"{row['bytes'] // 1024:,}", *off])
    head = "ranks | KiB | plain: own core | shared | from 4 | exact: own core | shared | from 4"
    return _table(head, rows)


def _seconds(simulated: Result, way: str, ranks: int, i: int) -> float:
    """Of the i-th number of parameters."""
    if way == "buckets":
        return float(simulated["ways"]["exact"][str(ranks)]["in buckets"][i])
    return float(simulated["ways"][way][str(ranks)]["seconds"][i])


def _time(seconds: float) -> str:
    """Three digits, in the unit that suits."""
    unit, name = next(((u, n) for u, n in UNITS if seconds >= u), UNITS[-1])
    value = seconds / unit
    return f"{value:,.0f} {name}" if value >= 100 else f"{value:.3g} {name}"


def _simulated(result: Result) -> str:
    """All ways at the most ranks, by parameters."""
    simulated = result["simulated"]
    ranks, rows = simulated["ranks"][-1], []
    for i, number in enumerate(simulated["parameters"]):
        ways = [*NAMES, "exact, ragged"]
        seconds = [_time(_seconds(simulated, way, ranks, i)) for way in ways]
        rows.append([f"10^{log10(number):.0f}", *seconds])
    return _table(" | ".join(["parameters", *NAMES.values(), RAGGED]), rows)


def _by_ranks(result: Result) -> str:
    """10^9 parameters, by ranks."""
    simulated = result["simulated"]
    i = simulated["parameters"].index(10**9)
    rows = [
        [f"{ranks:,}", *(_time(_seconds(simulated, way, ranks, i)) for way in NAMES)]
        for ranks in simulated["ranks"]
    ]
    return _table(" | ".join(["ranks", *NAMES.values()]), rows)


def _bytes_a_parameter(ranks: int, grains: int) -> dict[str, float]:
    """Of weights, AdamW's state and gradients, all float32; a row's name by where they lie."""
    nodes = log2(grains) + 1
    waiting = 4 / ranks if grains == 1 else 4 * nodes  # slices of the nodes of every rank's run
    return {
        "all of it on each rank": 4 + 8 + 4 * nodes,
        "the optimiser's state in parts (`anybatch.optim.zero`)": 4 + 8 / ranks + 4 * nodes,
        "all of it in shards (`fully_shard`)": (4 + 8) / ranks + waiting,
        "grains dealt out round by round (not built)": (4 + 8 + 4 * nodes) / ranks,
    }


WIRE = ("2", "3", "3 g", "3 g")
"""Times n (W-1)/W bytes an update, of a rank with g grains."""


def _sharded(ranks: int) -> str:
    rows = []
    columns = [_bytes_a_parameter(ranks, grains) for grains in GRAINS_A_RANK]
    for name, wire in zip(columns[0], WIRE, strict=True):
        fits = [f"{each[name]:.3g}: {DEVICE_BYTES / each[name] / 1e9:,.1f}" for each in columns]
        rows.append([name, *fits, wire])
    heads = [f"g = {grains}" for grains in GRAINS_A_RANK]
    return _table(" | ".join(["what lies where", *heads, "sent, in n (W-1)/W bytes"]), rows)


def _orders(result: Result) -> str:
    kept = {row["examples"]: row["index"] for row in result["randperm"]}
    rows = []
    for row in result["order"]:
        number = row["examples"]
        rows.append(
            [
                f"10^{log10(number):.0f}",
                *(f"{1e9 * row['index']:.1f}", f"{1e3 * row['jump']:.2f}"),
                f"{row['peak_bytes'] / 1e6:.2f}",
                f"{1e9 * kept[number]:.1f}" if number in kept else "-",
                f"{8 * number / 1e6:,.3f}".rstrip("0").rstrip("."),
            ]
        )
    head = "examples | ns an index | ms to a step anywhere | peak, MB | kept: ns an index | MB"
    return _table(head, rows)


def _ledger(result: Result) -> str:
    rows = []
    for name, row in result["ledger"].items():
        terabytes = [f"{row['bytes'] / stride:.3g}" for stride in STRIDES]
        cells = (f"{row['columns']}", f"{row['bytes']:.1f}", f"{1e6 * row['seconds']:.2f}")
        rows.append([name, *cells, *terabytes])
    heads = ["TB, every update", *(f"every {k:,}th" for k in STRIDES[1:])]
    return _table(" | ".join(["observed", "columns", "bytes a row", "µs a row", *heads]), rows)


def said(result: Result) -> dict[str, str]:
    """The figures in the sentences."""
    return {**_said_of_measurement(result), **_said_of_ranks(result), **_said_of_examples(result)}


def _span(values: Iterable[float], form: str = ".2f") -> str:
    found = sorted(values)
    return f"{found[0]:{form}} to {found[-1]:{form}}"


def _said_of_measurement(result: Result) -> dict[str, str]:
    found, machine = result["all-reduce"], result["machine"]
    rows = found["rows"]
    more = [row for row in rows if row["ranks"] > machine["cores"]]
    two = [row for row in rows if row["ranks"] == 2]
    between = [a >= 1 >= b for row in more for a, b, _ in [_off(result, row, "exact")]]
    said = {
        "processor": machine["processor"],
        "cores": f"{machine['cores']}",
        "seconds": f"{result['seconds']:.0f}",
        "gamma": f"{1e9 * found['gamma']:.3f}",
        "over_two": _span(row["over plain"]["exact"] for row in two),
        "over_more": _span(row["over plain"]["exact"] for row in more),
        "worst_bytes": f"{max(model.busiest(model.nodes_by_rank(g, r)) for r, g in CASES):.1f}",
        "bits": "; ".join(f"{way}: {n}" for way, n in found["different bits"].items()),
        "between": f"{sum(between)} of {len(between)}",
        "residual": _span(_off(result, row, way)[0] for row in two for way in FORMS),
    }
    for way in FORMS:
        link = _link(result, way)
        said[f"{way}_alpha"] = f"{1e6 * link.alpha:.0f}"
        said[f"{way}_beta"] = f"{1e9 * link.beta:.2f}"
        for place, name in enumerate(("own", "shared", "from_four")):
            which = more if place < 2 else [row for row in more if row["ranks"] > 4]
            said[f"{way}_{name}"] = _span(_off(result, row, way)[place] for row in which)
    return said


def _said_of_ranks(result: Result) -> dict[str, str]:
    simulated = result["simulated"]
    near, far = (Link(**simulated["cluster"][name]) for name in ("near", "far"))
    ranks, i = simulated["ranks"][-1], simulated["parameters"].index(10**9)
    half, bucket = far.alpha / far.beta, simulated["bucket"]
    times = {way: _seconds(simulated, way, ranks, i) for way in [*NAMES, "exact, ragged"]}
    ragged = simulated["ways"]["exact, ragged"][str(ranks)]
    plain = _bytes_a_parameter(ranks, 8)
    return {
        "ranks": f"{ranks:,}",
        "near": f"{1e6 * near.alpha:.1f} µs and {1e-9 / near.beta:.0f} GB/s",
        "far": f"{1e6 * far.alpha:.1f} µs and {1e-9 / far.beta:.0f} GB/s",
        "added": f"{1e-9 / simulated['cluster']['gamma']:,.0f} GB/s",
        "bucket": f"{bucket / 2**20:.0f} MiB",
        "messages": f"{simulated['ways']['exact'][str(ranks)]['messages']:,}",
        "half": f"{half / 1e3:.0f} kB",
        "bucket_ranks": f"{bucket / half:.0f}",
        "bucket_wanted": f"{ranks * half / 1e9:.1f} GB",
        "in_buckets": _time(times["buckets"]),
        "in_one": _time(times["exact"]),
        "bucket_factor": f"{times['buckets'] / times['exact']:.0f}",
        "levels_time": _time(times["levels"]),
        "levels_factor": f"{times['exact'] / times['levels']:.1f}",
        "halving_time": _time(times["halving"]),
        "halving_factor": f"{times['exact'] / times['halving']:.1f}",
        "small": _time(_seconds(simulated, "exact", ranks, 0)),
        "small_halving": _time(_seconds(simulated, "halving", ranks, 0)),
        "ragged_bytes": f"{ragged['bytes over n'] / 2:.1f}",
        "device": f"{DEVICE_BYTES / 1e9:.0f} GB",
        "whole_fits": f"{DEVICE_BYTES / plain['all of it on each rank'] / 1e9:.1f}",
        "state_fits": f"{DEVICE_BYTES / list(plain.values())[1] / 1e9:.1f}",
        "gathered": _time(4e9 * (ranks - 1) / ranks * far.beta),
    }


def _said_of_examples(result: Result) -> dict[str, str]:
    *_, largest = result["order"]
    first = result["order"][0]
    told = {name: row["told"] for name, row in result["ledger"].items()}
    seconds = [row["seconds"] for row in result["ledger"].values()]
    return {
        "index": f"{1e9 * largest['index']:.0f}",
        "index_over": f"{largest['index'] / first['index']:.2f}",
        "jump": f"{1e3 * largest['jump']:.2f}",
        "order_hours": f"{largest['index'] * 1e12 / 3600:.0f}",
        "order_update": f"{1e3 * largest['index'] * BATCH:.0f}",
        "batch": f"{BATCH:,}",
        "row_bytes": _span((row["bytes"] for row in result["ledger"].values()), ".0f"),
        "told_bytes": _span(told.values(), ".0f"),
        "told_update": _span((row * BATCH / 1e6 for row in told.values()), ".0f"),
        "ledger_hours": _span((s * 1e12 / 3600 for s in seconds), ".0f"),
        "rows": f"{next(iter(result['ledger'].values()))['rows']:,}",
    }
