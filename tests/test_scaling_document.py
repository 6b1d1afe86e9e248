"""docs/scaling.md: what its raw result gives; its closed forms against played messages."""

import json
import sys
from collections.abc import Iterator, Sequence
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

ROOT = Path(__file__).parents[1]
RAW = json.loads((ROOT / "benchmarks" / "results" / "scaling.json").read_text())
RANKS = (1, 2, 3, 4, 5, 8, 24, 64)
NUM_BYTES = 1e6
MODULES = ("machine", "scaling", "scaling_model", "scaling_tables", "scaling_text")


class Modules:
    """benchmarks/scaling_NAME.py as an attribute each."""

    def __getattr__(self, name: str) -> ModuleType:
        return import_module(f"scaling_{name}")


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Modules]:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield Modules()
    for name in (*MODULES, "svg"):
        sys.modules.pop(name, None)


@pytest.fixture
def network(parts: Modules) -> Any:
    """One link alike everywhere: 10 µs, 1 ns a byte, 0.3 ns a byte added."""
    link = parts.model.Link(1e-5, 1e-9)
    return parts.model.Network(near=link, far=link, machine=8, gamma=3e-10)


def slices_of(model: ModuleType, way: str, ranks: int) -> int:
    return int(model.power_below(ranks)) if way == "halving" else ranks


def after(rounds: Iterator[Any], values: Any) -> Any:
    """What each rank holds in the end, [W, slices]: by the messages alone."""
    held = values.copy()
    for to, first, count, adds in rounds:
        before = held.copy()
        for rank in np.flatnonzero(to >= 0):
            part = slice(first[rank], first[rank] + count[rank])
            sent = before[rank, part]
            held[to[rank], part] = held[to[rank], part] + sent if adds else sent
    return held


def test_the_document_and_its_plots_are_what_the_raw_result_gives(parts: Modules) -> None:
    document = (ROOT / "docs" / "scaling.md").read_text(encoding="utf8")
    assert document == parts.text.text_from(RAW)
    plots = parts.text.plots(RAW)
    for name, text in plots.items():
        assert (ROOT / "docs" / "scaling" / f"{name}.svg").read_text(encoding="utf8") == text
        assert ElementTree.fromstring(text).findall("{*}circle")
    changed = json.loads(json.dumps(RAW))  # control
    changed["all-reduce"]["rows"][0]["over plain"]["exact"] *= 1.5
    changed["simulated"]["ways"]["levels"]["4096"]["seconds"][3] *= 1.5
    assert document != parts.text.text_from(changed)
    assert plots["parameters"] != parts.text.plots(changed)["parameters"]


def test_the_raw_result_is_of_the_protocol_as_it_is(parts: Modules) -> None:
    scaling = import_module("scaling")
    rows = RAW["all-reduce"]["rows"]
    asked = [(ranks, size) for ranks in scaling.WORLDS for size in scaling.SIZES]
    assert [(row["ranks"], row["bytes"]) for row in rows] == asked
    assert all(row["rounds"] >= 7 for row in rows)
    bits = RAW["all-reduce"]["different bits"]
    assert (bits["exact"], bits["exact, 10 grains"]) == (1, 1)
    assert bits["plain"] > 1  # control
    assert [row["examples"] for row in RAW["order"]] == list(scaling.EXAMPLES)
    cluster = json.loads(json.dumps(scaling.asdict(scaling.CLUSTER)))
    assert RAW["simulated"]["cluster"] == cluster
    assert RAW["simulated"]["bucket"] == scaling.tree.BUCKET_BYTES


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("way", ["ring", "exact", "halving"])
def test_closed_forms_are_what_the_played_messages_take(
    parts: Modules, network: Any, way: str, ranks: int
) -> None:
    model = parts.model
    form, slices = getattr(model, way), slices_of(parts.model, way, ranks)
    rounds = getattr(model, f"{way}_rounds")
    play = model.played(rounds(ranks), ranks, [NUM_BYTES / slices], network)
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
        less = model.played(shorter, ranks, [NUM_BYTES / slices], network)
        assert less.seconds[0] != pytest.approx(seconds, rel=1e-12)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8, 24, 64])
def test_two_levels_take_what_their_closed_form_says(parts: Modules, ranks: int) -> None:
    model = parts.model
    near, far = model.Link(1e-6, 1e-10), model.Link(1e-5, 1e-9)
    network = model.Network(near=near, far=far, machine=8, gamma=3e-10)
    play = model.played(model.levels_rounds(ranks, 8), ranks, [NUM_BYTES / ranks], network)
    assert play.seconds[0] == pytest.approx(model.levels(ranks, NUM_BYTES, network), rel=1e-12)
    swapped = model.Network(near=far, far=near, machine=8, gamma=3e-10)  # control
    if ranks > 1:
        assert play.seconds[0] != pytest.approx(model.levels(ranks, NUM_BYTES, swapped), rel=1e-3)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("way", ["ring", "exact", "halving", "levels"])
def test_what_is_played_is_an_all_reduce(parts: Modules, way: str, ranks: int) -> None:
    slices = slices_of(parts.model, way, ranks)
    make = getattr(parts.model, f"{way}_rounds")
    rounds = list(make(ranks, 8) if way == "levels" else make(ranks))
    values = np.random.default_rng(0).integers(0, 2**40, (ranks, slices))
    total = np.broadcast_to(values.sum(0), values.shape)
    assert np.array_equal(after(iter(rounds), values), total)
    if ranks > 1:  # control: a round too few
        assert not np.array_equal(after(iter(rounds[1:]), values), total)


def tree_sum(values: Sequence[Any], level: int = 0) -> Any:
    """By the package: each value is a node of 2^level grains."""
    nodes = (Node(i << level, level, value) for i, value in enumerate(values))
    return sum_nodes(nodes, torch.add)


@pytest.mark.parametrize("ranks", [2, 4, 8, 64])
def test_halving_and_two_levels_make_the_bits_of_the_tree(parts: Modules, ranks: int) -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal((ranks, ranks)).astype(np.float32)
    total = tree_sum(torch.from_numpy(values)).numpy()
    halved = after(parts.model.halving_rounds(ranks), values)
    assert all(np.array_equal(row, total) for row in halved)
    machines = [tree_sum(rows) for rows in torch.from_numpy(values).split(min(ranks, 8))]
    assert np.array_equal(tree_sum(machines, level=3).numpy(), total)
    if ranks > 2:  # control: two operands commute
        assert not np.array_equal(after(parts.model.ring_rounds(ranks), values)[0], total)


def test_several_nodes_a_rank_cost_what_the_closed_form_says(parts: Modules, network: Any) -> None:
    model = parts.model
    for ranks, nodes in ((1, 3), (3, 2), (8, 5)):
        seconds = model.exact(ranks, NUM_BYTES, network.near, network.gamma, nodes)
        rounds = model.exact_rounds(ranks)
        play = model.played(rounds, ranks, [NUM_BYTES / ranks], network, [nodes] * ranks)
        assert play.seconds[0] == pytest.approx(seconds, rel=1e-12)
    uneven = model.nodes_by_rank(100, 8)
    play = model.played(model.exact_rounds(8), 8, [NUM_BYTES / 8], network, uneven)
    least, most = (
        model.exact(8, NUM_BYTES, network.near, network.gamma, k) for k in (1, max(uneven))
    )
    assert least < play.seconds[0] <= most


def test_a_power_of_two_of_grains_a_rank_is_one_node_whatever_the_ranks(parts: Modules) -> None:
    model = parts.model
    for ranks in (3, 7, 8, 100):
        assert set(model.nodes_by_rank(16 * ranks, ranks)) == {1}
        assert model.busiest([1] * ranks) == pytest.approx(1)
    # by hand, 8 grains on 3 ranks: 0 1 | 2 3, 4 | 5, 6 7
    assert model.nodes_by_rank(8, 3) == [1, 2, 2]
    # each of the latter sends 2 nodes in 2 slices of 3, then one: 6 slices for a ring's 4
    assert model.busiest([1, 2, 2]) == pytest.approx(6 / 4)
    for grains in range(2, 300):  # 2 log2 of the longest run
        longest = -(-grains // 7)
        assert max(model.nodes_by_rank(grains, 7)) <= max(1, 2 * log2(longest))


def test_the_link_that_made_the_times_is_found(parts: Modules) -> None:
    model = parts.model
    link = model.Link(2e-4, 1.5e-9)
    for ranks in (2, 4):
        times = [(2.0**p, model.ring(ranks, 2.0**p, link, 6e-11)) for p in (16, 20, 24)]
        found = model.fitted(ranks, times, 6e-11)
        assert (found.alpha, found.beta) == pytest.approx((link.alpha, link.beta), rel=1e-9)
        wrong = model.fitted(ranks + 1, times, 6e-11)  # control: another count of messages
        assert wrong.alpha != pytest.approx(link.alpha, rel=0.1)


def test_the_simulated_seconds_are_played_again(parts: Modules) -> None:
    scaling = import_module("scaling")
    found = RAW["simulated"]["ways"]
    for ranks in (8, 64):
        sizes = [4 * number / ranks for number in RAW["simulated"]["parameters"]]
        for way in ("ring", "exact", "halving"):
            rounds = getattr(parts.model, f"{way}_rounds")(ranks)
            play = parts.model.played(rounds, ranks, sizes, scaling.CLUSTER)
            assert play.seconds.tolist() == pytest.approx(found[way][str(ranks)]["seconds"])
    for ranks, played in found["levels"].items():  # by the closed form, up to the most ranks
        for number, seconds in zip(RAW["simulated"]["parameters"], played["seconds"], strict=True):
            form = parts.model.levels(int(ranks), 4 * number, scaling.CLUSTER)
            assert seconds == pytest.approx(form, rel=1e-9)


def test_buckets_pay_their_messages_again(parts: Modules) -> None:
    assert parts.model.in_buckets(10, 35, 2.0, 1.5) == 3 * 2.0 + 1.5
    assert parts.model.in_buckets(10, 30, 2.0, 0.1) == 3 * 2.0  # nothing is left over
