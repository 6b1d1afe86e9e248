"""`anybatch profile`: where the time of an update goes.

The oracle is a phase that is made slow on purpose: the profile must find it there.
"""

import re
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest

from anybatch.advice.flame import draw_flame_graph
from anybatch.advice.profile import OTHER, PHASES, measure_profile
from anybatch.recipe.build import build
from command_line import recipe, refuse, run_command, write_recipe


def sleep_in(monkeypatch: pytest.MonkeyPatch, place: str, seconds: float) -> None:
    """Make a function sleep before it does its work."""
    import importlib

    module, name = place.rsplit(".", 1)
    try:
        owner = importlib.import_module(module)
    except ModuleNotFoundError:
        module, owner_name = module.rsplit(".", 1)
        owner = getattr(importlib.import_module(module), owner_name)
    original = getattr(owner, name)

    def slow(*args, **kwargs):
        time.sleep(seconds)
        return original(*args, **kwargs)

    slow.__code__ = slow.__code__.replace(
        co_name=original.__name__, co_filename=original.__code__.co_filename
    )
    monkeypatch.setattr(owner, name, slow)


@pytest.mark.fast(2)
@pytest.mark.parametrize(
    ("place", "phase"),
    [
        ("anybatch.training.loop._Loop.read", "reading data"),
        ("anybatch.gradient.passes.run_forward", "forward pass"),
        ("anybatch.gradient.passes.run_backward", "backward pass"),
        ("anybatch.runs.state.TrainingState.update", "optimiser"),
        ("anybatch.runs.run_files.RunFiles.record_update", "records"),
    ],
)
def test_a_slow_phase_is_found(monkeypatch, place, phase):
    sleep_in(monkeypatch, place, 0.03)
    result = measure_profile(build(recipe(), allow_code=False), 5)
    assert next(iter(result.phases)) == phase
    assert result.phases[phase] > 0.6
    assert result.seconds > 0.03


def test_shares_add_up_and_operators_are_counted():
    result = measure_profile(build(recipe(), allow_code=False), 10)
    assert sum(result.phases.values()) == pytest.approx(1)
    assert set(result.phases) <= {*PHASES, OTHER}
    assert 0 < result.operator_share <= 1
    calls = {one.name: one.calls for one in result.operators}
    assert calls["aten::addmm"] == 1  # softmax regression: one layer
    assert result.num_updates == 20


def test_a_recipe_with_fewer_updates_is_measured_too():
    result = measure_profile(build(recipe(**{"batch.size": 1438}), allow_code=False), 30)
    assert result.num_updates == 60  # the recipe has one


def test_the_command_prints_words_tables_and_a_flame_graph(tmp_path: Path):
    file = write_recipe(tmp_path)
    svg = tmp_path / "flame.svg"
    out = run_command("profile", file, "--updates", "100", "--svg", svg).out
    assert re.search(r"An update takes \d+\.\d\d ms", out)
    assert "forward pass" in out
    assert "addmm" in out
    texts = [element.text for element in ElementTree.parse(svg).iter() if element.text]
    assert any("make_updates: 100.0 %" in text for text in texts)
    assert "exists and is not written over" in refuse("profile", file, "--svg", svg)


def test_the_report_is_one_object(tmp_path: Path):
    report = run_command("profile", write_recipe(tmp_path), "--updates", "3", "--json").report
    assert report["seconds"] > 0
    assert sum(report["phases"].values()) == pytest.approx(1)


def test_a_flame_graph_is_as_wide_as_its_shares():
    svg = draw_flame_graph({("a", "b"): 3, ("a", "c"): 1, ("d",): 4, ("<e>",): 0}, "t & u")
    boxes = {
        group[0].text.split(":")[0]: float(group[1].get("width"))
        for group in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}g")
    }
    assert boxes == {"a": 600, "b": 450, "c": 150, "d": 600}
