"""docs/scaling.md against its raw result; its closed forms against played messages."""

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from importlib import import_module
from math import log2
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from anybatch.gradient.pairwise_sum import Node, sum_nodes

ROOT = Path(__file__).parents[2]
RAW = json.loads((ROOT / "benchmarks" / "results" / "scaling.json").read_text())
RANKS = (1, 2, 3, 4, 5, 8, 24, 64)
NUM_BYTES = 1e6
DOCUMENT = (ROOT / "docs" / "scaling.md").read_text(encoding="utf8")
WORDS = " ".join(DOCUMENT.split())
MODULES = ("machine", "scaling", "scaling_model", "scaling_tables", "svg", "tables")


class Modules:
    """Modules benchmarks/scaling_NAME.py as attributes."""

    def __getattr__(self, name: str) -> ModuleType:
        return import_module(f"scaling_{name}")


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Modules]:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield Modules()
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture
def network(parts: Modules) -> Any:
    """Return a network with one kind of link: 10 µs, 1 ns a byte, 0.3 ns a byte added."""
    link = parts.model.Link(1e-5, 1e-9)
    return parts.model.Network(near=link, far=link, machine=8, gamma=3e-10)


def count_slices(model: ModuleType, way: str, ranks: int) -> int:
    return int(model.power_below(ranks)) if way == "halving" else ranks


def play_sums(rounds: Iterator[Any], values: Any) -> Any:
    """Return the final values of each rank [W, slices], by the messages alone."""
    sums = values.copy()
    for to, first, count, adds in rounds:
        before = sums.copy()
        for rank in np.flatnonzero(to >= 0):
            part = slice(first[rank], first[rank] + count[rank])
            message = before[rank, part]
            sums[to[rank], part] = sums[to[rank], part] + message if adds else message
    return sums


def test_tables_and_plots_are_those_of_the_raw_result(parts: Modules) -> None:
    fill = import_module("tables").fill_tables
    assert fill(DOCUMENT, parts.tables.format_tables(RAW)) == DOCUMENT
    plots = parts.tables.draw_plots(RAW)
    for name, text in plots.items():
        assert (ROOT / "docs" / "scaling" / f"{name}.svg").read_text(encoding="utf8") == text
        assert ElementTree.fromstring(text).findall("{*}circle")
    changed = json.loads(json.dumps(RAW))  # control
    changed["all-reduce"]["rows"][0]["over plain"]["exact"] *= 1.5
    changed["simulated"]["ways"]["levels"]["4096"]["seconds"][3] *= 1.5
    assert fill(DOCUMENT, parts.tables.format_tables(changed)) != DOCUMENT
    assert plots["parameters"] != parts.tables.draw_plots(changed)["parameters"]


def span(values: Iterable[float], digits: int = 2) -> str:
    """Format the smallest and the largest of some values."""
    values = list(values)
    return f"{min(values):.{digits}f} to {max(values):.{digits}f}"


def find_missing(sentences: list[str]) -> list[str]:
    """Return the sentences that the document does not have."""
    return [sentence for sentence in sentences if sentence not in WORDS]


def test_the_measured_figures_of_the_prose_are_those_of_the_raw_result(parts: Modules) -> None:
    rows = RAW["all-reduce"]["rows"]
    few, many = (
        span(row["over plain"]["exact"] for row in rows if (row["ranks"] == 2) is is_few)
        for is_few in (True, False)
    )
    order = {row["examples"]: row["index"] for row in RAW["order"]}
    ledger = list(RAW["ledger"].values())
    index = order[10**12]
    sentences = [
        f"takes {few} times the time of the plain one at 2 ranks, and {many} times",
        f"takes {1e9 * index:.0f} ns among 10^12 examples, {index / order[10**3]:.2f} times",
        f"takes {span((row['bytes'] for row in ledger), 0)} TB for an epoch",
        f"takes {index * 1e12 / 3600:.0f} core hours of indices",
        f"batches of {2**20:,} examples this is {1e3 * index * 2**20:.0f} ms an update",
        f"Measured on {ledger[0]['rows']:,} rows",
    ]
    assert find_missing(sentences) == []
    assert parts.tables.BATCH == 2**20


def test_the_simulated_figures_of_the_prose_are_those_of_the_raw_result(parts: Modules) -> None:
    simulated = RAW["simulated"]
    far, ways = simulated["cluster"]["far"], simulated["ways"]
    half = far["alpha"] / far["beta"]
    billion = simulated["parameters"].index(10**9)
    exact, levels, halving = (ways[way]["4096"] for way in ("exact", "levels", "halving"))
    one, buckets = exact["seconds"][billion], exact["in buckets"][billion]
    two, tree = levels["seconds"][billion], halving["seconds"][billion]
    sentences = [
        f"buckets of {simulated['bucket'] / 2**20:.0f} MiB, which are too small above "
        f"{simulated['bucket'] / half:.0f} ranks",
        f"takes {buckets:.1f} s in buckets and {1e3 * one:.0f} ms in one piece. A tree of messages "
        f"would take {1e3 * tree:.1f} ms",
        f"state of {80 / 28:.1f} billion parameters fill 80 GB. With the optimiser state in parts "
        f"it is {80 / (20 + 8 / 4096):.1f} billion",
        f"costs as much as {half / 1e3:.0f} kB, and a rank sends {exact['messages']:,}.",
        f"W alpha/beta = {4096 * half / 1e9:.1f} GB",
        f"in one piece take 1/{buckets / one:.0f} of the time",
        f"takes {1e3 * two:.0f} ms for 10^9 parameters, {one / two:.1f} times faster",
        f"takes {1e3 * tree:.1f} ms, {one / tree:.1f} times faster, and "
        f"{1e6 * halving['seconds'][0]:.0f} µs against {1e3 * exact['seconds'][0]:.1f} ms",
        f"cost {ways['exact, ragged']['4096']['bytes over n'] / 2:.1f} times the bytes of a ring",
        f"{4e12 * 4095 / 4096 * far['beta']:.0f} ms for 10^9 parameters",
    ]
    assert find_missing(sentences) == []
    assert parts.tables.bytes_by_place(4096, 8)["all of it on each rank"] == 28


def test_the_sentences_on_the_model_follow_from_the_table() -> None:
    table = DOCUMENT.split("<!-- table: predicted -->\n")[1].split("<!--")[0]
    cells = [row.strip("| ").split(" | ") for row in table.splitlines()[2:]]
    many = [
        [float(cell.replace(",", "").strip("-") or 0) for cell in row]
        for row in cells
        if row[0] != "2"
    ]
    assert len(many) == 10
    assert all(alone >= 1 >= shared for *_, alone, shared, _ in many)  # of exact
    assert all(row[2] > 1 for row in many)  # of plain
    last = [row for row in many if row[0] == 8]
    assert all(1 / 1.5 < ratio < 1.5 for row in last for ratio in (row[4], row[7]))


def test_the_raw_result_is_of_the_protocol(parts: Modules) -> None:
    scaling = import_module("scaling")
    rows = RAW["all-reduce"]["rows"]
    protocol = [(ranks, size) for ranks in scaling.WORLDS for size in scaling.SIZES]
    assert [(row["ranks"], row["bytes"]) for row in rows] == protocol
    assert all(row["rounds"] >= 7 for row in rows)
    bits = RAW["all-reduce"]["different bits"]
    assert (bits["exact"], bits["exact, 10 grains"]) == (1, 1)
    assert bits["plain"] > 1  # control
    assert [row["examples"] for row in RAW["order"]] == list(scaling.EXAMPLES)
    cluster = json.loads(json.dumps(scaling.asdict(scaling.CLUSTER)))
    assert RAW["simulated"]["cluster"] == cluster
    assert RAW["simulated"]["bucket"] == scaling.pairwise_sum.BUCKET_BYTES


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("way", ["ring", "exact", "halving"])
def test_closed_forms_are_what_the_played_messages_take(
    parts: Modules, network: Any, way: str, ranks: int
) -> None:
    model = parts.model
    form, slices = getattr(model, way), count_slices(parts.model, way, ranks)
    rounds = getattr(model, f"{way}_rounds")
    play = model.play(rounds(ranks), ranks, [NUM_BYTES / slices], network)
    seconds = form(ranks, NUM_BYTES, network.near, network.gamma)
    assert play.seconds[0] == pytest.approx(seconds, rel=1e-12, abs=1e-18)
    messages = form(ranks, 1, model.Link(1, 0), 0)
    if way != "halving" or ranks == slices:  # otherwise the ranks do not send alike
        assert set(play.messages) == {messages}
        assert set(play.slices / slices) == {form(ranks, 1, model.Link(0, 1), 0)}
    if ranks > 1:  # controls: a message too many, and a round that is not played
        wrong = seconds + network.near.alpha
        assert play.seconds[0] != pytest.approx(wrong, rel=1e-12)
        shorter = iter(list(rounds(ranks))[:-1])
        less = model.play(shorter, ranks, [NUM_BYTES / slices], network)
        assert less.seconds[0] != pytest.approx(seconds, rel=1e-12)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8, 24, 64])
def test_two_levels_take_what_their_closed_form_says(parts: Modules, ranks: int) -> None:
    model = parts.model
    near, far = model.Link(1e-6, 1e-10), model.Link(1e-5, 1e-9)
    network = model.Network(near=near, far=far, machine=8, gamma=3e-10)
    play = model.play(model.levels_rounds(ranks, 8), ranks, [NUM_BYTES / ranks], network)
    assert play.seconds[0] == pytest.approx(model.levels(ranks, NUM_BYTES, network), rel=1e-12)
    swapped = model.Network(near=far, far=near, machine=8, gamma=3e-10)  # control
    if ranks > 1:
        assert play.seconds[0] != pytest.approx(model.levels(ranks, NUM_BYTES, swapped), rel=1e-3)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("way", ["ring", "exact", "halving", "levels"])
def test_what_is_played_is_an_all_reduce(parts: Modules, way: str, ranks: int) -> None:
    slices = count_slices(parts.model, way, ranks)
    make = getattr(parts.model, f"{way}_rounds")
    rounds = list(make(ranks, 8) if way == "levels" else make(ranks))
    values = np.random.default_rng(0).integers(0, 2**40, (ranks, slices))
    total = np.broadcast_to(values.sum(0), values.shape)
    assert np.array_equal(play_sums(iter(rounds), values), total)
    if ranks > 1:  # control: a round too few
        assert not np.array_equal(play_sums(iter(rounds[1:]), values), total)


def tree_sum(values: Sequence[Any], level: int = 0) -> Any:
    """Sum by the package; each value is a node of 2^level grains."""
    nodes = (Node(i << level, level, value) for i, value in enumerate(values))
    return sum_nodes(nodes, torch.add)


@pytest.mark.parametrize("ranks", [2, 4, 8, 64])
def test_halving_and_two_levels_give_the_bits_of_the_tree(parts: Modules, ranks: int) -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal((ranks, ranks)).astype(np.float32)
    total = tree_sum(torch.from_numpy(values)).numpy()
    sums = play_sums(parts.model.halving_rounds(ranks), values)
    assert all(np.array_equal(row, total) for row in sums)
    machines = [tree_sum(rows) for rows in torch.from_numpy(values).split(min(ranks, 8))]
    assert np.array_equal(tree_sum(machines, level=3).numpy(), total)
    if ranks > 2:  # control: two operands commute
        assert not np.array_equal(play_sums(parts.model.ring_rounds(ranks), values)[0], total)


def test_several_nodes_a_rank_cost_what_the_closed_form_says(parts: Modules, network: Any) -> None:
    model = parts.model
    for ranks, nodes in ((1, 3), (3, 2), (8, 5)):
        seconds = model.exact(ranks, NUM_BYTES, network.near, network.gamma, nodes)
        rounds = model.exact_rounds(ranks)
        play = model.play(rounds, ranks, [NUM_BYTES / ranks], network, [nodes] * ranks)
        assert play.seconds[0] == pytest.approx(seconds, rel=1e-12)
    uneven = model.count_nodes(100, 8)
    play = model.play(model.exact_rounds(8), 8, [NUM_BYTES / 8], network, uneven)
    least, most = (
        model.exact(8, NUM_BYTES, network.near, network.gamma, k) for k in (1, max(uneven))
    )
    assert least < play.seconds[0] <= most


def test_a_power_of_two_of_grains_a_rank_is_one_node_whatever_the_ranks(parts: Modules) -> None:
    model = parts.model
    for ranks in (3, 7, 8, 100):
        assert set(model.count_nodes(16 * ranks, ranks)) == {1}
        assert model.compare_busiest([1] * ranks) == pytest.approx(1)
    # by hand, 8 grains on 3 ranks: 0 1 | 2 3, 4 | 5, 6 7
    assert model.count_nodes(8, 3) == [1, 2, 2]
    # each of the latter sends 2 nodes in 2 slices of 3, then one: 6 slices for a ring's 4
    assert model.compare_busiest([1, 2, 2]) == pytest.approx(6 / 4)
    for grains in range(2, 300):  # 2 log2 of the longest run
        longest = -(-grains // 7)
        assert max(model.count_nodes(grains, 7)) <= max(1, 2 * log2(longest))


def test_the_fit_recovers_the_link_of_its_times(parts: Modules) -> None:
    model = parts.model
    link = model.Link(2e-4, 1.5e-9)
    for ranks in (2, 4):
        times = [(2.0**p, model.ring(ranks, 2.0**p, link, 6e-11)) for p in (16, 20, 24)]
        fit = model.fit_link(ranks, times, 6e-11)
        assert (fit.alpha, fit.beta) == pytest.approx((link.alpha, link.beta), rel=1e-9)
        wrong = model.fit_link(ranks + 1, times, 6e-11)  # control: another count of messages
        assert wrong.alpha != pytest.approx(link.alpha, rel=0.1)


def test_the_simulated_seconds_are_played_again(parts: Modules) -> None:
    scaling = import_module("scaling")
    ways = RAW["simulated"]["ways"]
    for ranks in (8, 64):
        sizes = [4 * number / ranks for number in RAW["simulated"]["parameters"]]
        for way in ("ring", "exact", "halving"):
            rounds = getattr(parts.model, f"{way}_rounds")(ranks)
            play = parts.model.play(rounds, ranks, sizes, scaling.CLUSTER)
            assert play.seconds.tolist() == pytest.approx(ways[way][str(ranks)]["seconds"])
    for ranks, timing in ways["levels"].items():  # by the closed form, up to the most ranks
        for number, seconds in zip(RAW["simulated"]["parameters"], timing["seconds"], strict=True):
            form = parts.model.levels(int(ranks), 4 * number, scaling.CLUSTER)
            assert seconds == pytest.approx(form, rel=1e-9)


def test_buckets_pay_their_messages_again(parts: Modules) -> None:
    assert parts.model.in_buckets(10, 35, 2.0, 1.5) == 3 * 2.0 + 1.5
    assert parts.model.in_buckets(10, 30, 2.0, 0.1) == 3 * 2.0  # no last bucket
