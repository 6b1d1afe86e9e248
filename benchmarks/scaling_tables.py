"""Tables and plots of docs/scaling.md, from a raw result of benchmarks/scaling.py."""

from collections.abc import Mapping
from math import log2, log10
from typing import Any

import scaling_model as model
from scaling_model import Link
from svg import Axis, Series, plot
from tables import format_table

__all__ = ["BATCH", "bytes_by_place", "draw_plots", "format_tables", "read_seconds"]

Result = Mapping[str, Any]

DEVICE_BYTES = 80e9
BATCH = 2**20  # examples of an update at 4,096 ranks: 256 on each
ALIGNED = ((4, 64), (3, 48), (3, 64), (8, 64), (8, 100), (48, 1024), (64, 1536), (100, 1024))
LARGE = ((4096, 65536), (4096, 98304), (4096, 100_000), (4096, 5000), (3072, 49152), (3072, 65536))
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
RAGGED = "exact, ragged"
UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))


def format_tables(result: Result) -> dict[str, str]:
    """Format every table of the document, by name."""
    return {
        "machine": _format_machine(result),
        "messages": _format_messages(),
        "nodes": _format_nodes(),
        "measured": _format_measured(result),
        "links": _format_links(result),
        "predicted": _format_predicted(result),
        "network": _format_network(result),
        "by-parameters": _format_by_parameters(result),
        "by-ranks": _format_by_ranks(result),
        "memory": _format_memory(result["simulated"]["ranks"][-1]),
        "order": _format_order(result),
        "ledger": _format_ledger(result),
    }


def draw_plots(result: Result) -> dict[str, str]:
    """Draw every plot as SVG, by name."""
    simulated = result["simulated"]
    parameters, ranks = simulated["parameters"], simulated["ranks"]
    billion = parameters.index(10**9)
    by_parameters, by_ranks = [], []
    for colour, (way, name) in enumerate(NAMES.items()):
        if way == "ring":
            continue  # the line of the ring is that of exact in one piece
        seconds = [read_seconds(simulated, way, ranks[-1], i) for i in range(len(parameters))]
        points = list(zip(parameters, seconds, strict=True))
        by_parameters.append(Series(name, points, colour, marks=True))
        points = [(number, read_seconds(simulated, way, number, billion)) for number in ranks]
        by_ranks.append(Series(name, points, colour, marks=True))
    return {
        "parameters": plot(
            f"All-reduce of float32 gradients over {ranks[-1]:,} ranks, simulated",
            Axis("parameters", parameters, is_log=True),
            Axis("seconds", [1e-4, 1e-3, 1e-2, 0.1, 1, 10, 100, 1000], is_log=True),
            by_parameters,
        ),
        "ranks": plot(
            "All-reduce of a gradient of 10^9 parameters, simulated",
            Axis("ranks", ranks, is_log=True),
            Axis("seconds", [0.01, 0.1, 1, 10], is_log=True),
            by_ranks,
        ),
    }


def _format_machine(result: Result) -> str:
    machine = result["machine"]
    row = (machine["processor"], f"{machine['cores']}", f"{result['seconds']:.0f}")
    return format_table(("processor", "cores", "seconds of the command"), [row])


def _format_messages() -> str:
    """Format messages and bytes of a rank, by the closed forms."""
    one_message, one_byte = Link(1, 0), Link(0, 1)
    rows = []
    for ranks in (2, 3, 4, 8, 64, 512, 4096):
        ways = (model.ring, model.exact, model.halving)
        messages = [f"{way(ranks, 1, one_message, 0):,.0f}" for way in ways]
        num_bytes = [f"{way(ranks, 1, one_byte, 0):.3f} n" for way in (model.exact, model.halving)]
        rows.append([f"{ranks:,}", *messages, *num_bytes])
    head = ("ranks", "ring: messages", "exact", "halving", "ring and exact: bytes", "halving")
    return format_table(head, rows)


def _format_nodes() -> str:
    rows = []
    for ranks, grains in ALIGNED + LARGE:
        nodes = model.count_nodes(grains, ranks)
        counts = (f"{ranks:,}", f"{grains:,}", f"{grains / ranks:.4g}", f"{max(nodes)}")
        rows.append((*counts, f"{sum(nodes) / ranks:.2f}", f"{model.compare_busiest(nodes):.2f}"))
    head = ("ranks", "grains", "a rank", "nodes, most", "mean", "bytes over a ring's")
    return format_table(head, rows)


def _format_measured(result: Result) -> str:
    rows = []
    for row in result["all-reduce"]["rows"]:
        seconds, over, ranks = row["seconds"], row["over plain"], row["ranks"]
        ragged_bytes = model.compare_busiest(model.count_nodes(10, ranks))
        rows.append(
            [
                *(f"{ranks}", f"{row['bytes'] // 1024:,}", f"{row['rounds']}"),
                *(f"{1e3 * seconds['plain']:.2f}", f"{1e3 * seconds['exact']:.2f}"),
                *(f"{over['exact']:.2f}", f"{over['exact, 10 grains']:.2f}", f"{ragged_bytes:.2f}"),
            ]
        )
    rows.append(
        [
            *("different sums", "", ""),
            *(f"{result['all-reduce']['different bits'][way]}" for way in ("plain", "exact")),
            *("", f"{result['all-reduce']['different bits']['exact, 10 grains']}"),
        ]
    )
    head = ("ranks", "KiB", "rounds", "plain, ms", "exact, ms", "exact over plain")
    return format_table((*head, "10 grains over plain", "its bytes over a ring's"), rows)


def _fit_link(result: Result, way: str, ranks: int = 2) -> Link:
    """Fit the link to a way's seconds at this number of ranks, as if each rank had a core."""
    raw = result["all-reduce"]
    share = max(1, ranks / result["machine"]["cores"])
    rows = [row for row in raw["rows"] if row["ranks"] == ranks]
    times = [(row["bytes"], row["seconds"][way] / share) for row in rows]
    return model.fit_link(ranks, times, raw["gamma"])


def _format_links(result: Result) -> str:
    rows = []
    for way in FORMS:
        link = _fit_link(result, way)
        rows.append((way, f"{1e6 * link.alpha:.0f}", f"{1e9 * link.beta:.2f}"))
    gamma = f"{1e9 * result['all-reduce']['gamma']:.3f}"
    head = ("fitted to 2 ranks", "alpha, µs", "beta, ns a byte", "gamma, ns a byte (measured)")
    return format_table(head, [(*row, gamma) for row in rows])


def _compare_with_model(result: Result, row: Result, way: str) -> list[str]:
    """Return measured over predicted seconds: own core, shared cores, shared cores from 4 ranks."""
    ranks, seconds = row["ranks"], row["seconds"][way]
    share = max(1, ranks / result["machine"]["cores"])
    from_two, from_four = (
        FORMS[way](ranks, row["bytes"], _fit_link(result, way, base), result["all-reduce"]["gamma"])
        for base in (2, 4)
    )
    ratios = [seconds / from_two, seconds / (from_two * share), seconds / (from_four * share)]
    return [f"{ratio:.2f}" for ratio in ratios[: 3 if ranks > 4 else 2]] + ["-"] * (ranks <= 4)


def _format_predicted(result: Result) -> str:
    rows = []
    for row in result["all-reduce"]["rows"]:
        ratios = [cell for way in FORMS for cell in _compare_with_model(result, row, way)]
        rows.append([f"{row['ranks']}", f"{row['bytes'] // 1024:,}", *ratios])
    heads = [f"{way}: own core | shared | from 4" for way in FORMS]
    return format_table(["ranks", "KiB", *" | ".join(heads).split(" | ")], rows)


def _format_network(result: Result) -> str:
    cluster = result["simulated"]["cluster"]
    rows = [
        (name, f"{1e6 * link['alpha']:.1f}", f"{1e-9 / link['beta']:.0f}")
        for name, link in (
            ("within a machine", cluster["near"]),
            ("between machines", cluster["far"]),
        )
    ]
    rows.append(("a sum", "", f"{1e-9 / cluster['gamma']:,.0f}"))
    return format_table(("assumed", "µs a message", "GB/s"), rows)


def read_seconds(simulated: Result, way: str, ranks: int, i: int) -> float:
    """Return the simulated seconds for the i-th number of parameters."""
    if way == "buckets":
        return float(simulated["ways"]["exact"][str(ranks)]["in buckets"][i])
    return float(simulated["ways"][way][str(ranks)]["seconds"][i])


def _format_time(seconds: float) -> str:
    """Format three digits in the unit that fits."""
    unit, name = next(((u, n) for u, n in UNITS if seconds >= u), UNITS[-1])
    value = seconds / unit
    return f"{value:,.0f} {name}" if value >= 100 else f"{value:.3g} {name}"


def _format_by_parameters(result: Result) -> str:
    """Format all ways at the largest number of ranks."""
    simulated = result["simulated"]
    ranks, rows = simulated["ranks"][-1], []
    for i, number in enumerate(simulated["parameters"]):
        ways = [*NAMES, RAGGED]
        seconds = [_format_time(read_seconds(simulated, way, ranks, i)) for way in ways]
        rows.append([f"10^{log10(number):.0f}", *seconds])
    return format_table(["parameters", *NAMES.values(), "exact, 100,000 grains"], rows)


def _format_by_ranks(result: Result) -> str:
    """Format all ways at 10^9 parameters."""
    simulated = result["simulated"]
    i = simulated["parameters"].index(10**9)
    rows = [
        [f"{ranks:,}", *(_format_time(read_seconds(simulated, way, ranks, i)) for way in NAMES)]
        for ranks in simulated["ranks"]
    ]
    return format_table(["ranks", *NAMES.values()], rows)


def bytes_by_place(ranks: int, grains: int) -> dict[str, float]:
    """Return bytes a parameter on each rank, by where weights, state and gradients are.

    Weights take 4, AdamW's state 8, and each gradient 4. A rank that streams a tree over its g
    grains holds log2 g + 1 gradients.
    """
    nodes = log2(grains) + 1
    waiting = 4 / ranks if grains == 1 else 4 * nodes  # slices for the nodes of all other ranks
    return {
        "all of it on each rank": 4 + 8 + 4 * nodes,
        "optimiser state in parts (`run.shard`)": 4 + 8 / ranks + 4 * nodes,
        "all of it in shards (`fully_shard`)": (4 + 8) / ranks + waiting,
        "grains dealt in rounds (not built)": (4 + 8 + 4 * nodes) / ranks,
    }


def _format_memory(ranks: int) -> str:
    columns = [bytes_by_place(ranks, grains) for grains in GRAINS_A_RANK]
    rows = []
    for name, traffic in zip(columns[0], ("2", "3", "3 g", "3 g"), strict=True):
        cells = [f"{each[name]:.3g}: {DEVICE_BYTES / each[name] / 1e9:,.1f}" for each in columns]
        rows.append([name, *cells, traffic])
    heads = [f"g = {grains}" for grains in GRAINS_A_RANK]
    return format_table(["where", *heads, "bytes sent, in n (W-1)/W"], rows)


def _format_order(result: Result) -> str:
    randperm = {row["examples"]: row["index"] for row in result["randperm"]}
    rows = []
    for row in result["order"]:
        number = row["examples"]
        rows.append(
            [
                f"10^{log10(number):.0f}",
                *(f"{1e9 * row['index']:.1f}", f"{1e3 * row['jump']:.2f}"),
                f"{row['peak_bytes'] / 1e6:.2f}",
                f"{1e9 * randperm[number]:.1f}" if number in randperm else "-",
                f"{8 * number / 1e6:,.3f}".rstrip("0").rstrip("."),
            ]
        )
    head = ("examples", "ns an index", "ms to any step", "peak, MB")
    return format_table((*head, "`randperm`: ns an index", "MB"), rows)


def _format_ledger(result: Result) -> str:
    rows = []
    for name, row in result["ledger"].items():
        terabytes = [f"{row['bytes'] / stride:.3g}" for stride in STRIDES]
        cells = (f"{row['columns']}", f"{row['bytes']:.1f}", f"{1e6 * row['seconds']:.2f}")
        hours = f"{row['seconds'] * 1e12 / 3600:.0f}"
        traffic = (f"{row['told']:.0f}", f"{row['told'] * BATCH / 1e6:.0f}")
        rows.append([name, *cells, *terabytes, hours, *traffic])
    heads = ["TB, every update", *(f"every {stride:,}th" for stride in STRIDES[1:])]
    last = ("core hours to write", "bytes a row to each rank", "MB an update")
    return format_table(["observed", "columns", "bytes a row", "µs a row", *heads, *last], rows)
