"""`anybatch explain`: what it makes, what it refuses, what it leaves alone, and hostile data."""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from anybatch.errors import RunError
from anybatch.report import runs
from anybatch.report.packing import embed_json, pack
from anybatch.report.replay import restore_position
from anybatch.runs.records import read_records
from browser import browser, open_page
from command_line import anybatch, files_of, refuse, run_command, write_module, write_recipe
from explain_by_hand import LENET, data_of, train_run, unpack

HOSTILE = [
    "<script>document.title = 'run'</script>",
    "</script><img src=x onerror=\"document.title = 'run'\">",
    "a \"quoted\" 'name' & more",
    "line\u2028separator\u2029 and {{ braces }}",
    '<a href="https://evil.example">q</a> &lt;b',
]
MLP = {"model": {"name": "softmax_regression"}}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_run(tmp_path_factory.mktemp("command"), **MLP)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as figures:
        yield figures


def page_of(run: Path, *arguments: object) -> dict[str, Any]:
    """Read the figures of a page of the command."""
    file = run.parent / "page.html"
    file.unlink(missing_ok=True)
    run_command("explain", run, "--out", file, *arguments)
    return data_of(file.read_text())


def test_it_writes_one_file_into_the_run_and_changes_nothing_else(run: Path) -> None:
    before = files_of(run)
    figures = run_command("explain", run, "--json").report
    after = files_of(run)
    name = f"explain-step-{figures['step']}.html"
    assert figures["examples"] == 24
    assert Path(figures["file"]) == run / name
    assert figures["bytes"] == len(after.pop(name))
    assert after == before
    assert "exists and is not written over" in refuse("explain", run)


def test_the_step_nobody_named_is_early_has_been_made_and_says_why(run: Path) -> None:
    rows = [row for row in read_records(run / "records.jsonl") if row["kind"] == "step"]
    losses = [row["parts"]["data"] for row in rows]
    about = page_of(run)["about"]
    assert about["step"] < len(rows) / 2
    assert about["recorded_loss"] is not None
    assert min(losses) < losses[about["step"]] < losses[0]
    assert "about half of the way" in about["reason"]
    last = page_of(run, "--step", 60)["about"]  # the control: the one after the end
    assert last["recorded_loss"] is None
    assert last["reason"] is None


def test_the_page_opens_in_a_browser_if_asked(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened_pages: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda url: not opened_pages.append(url))
    file = run.parent / "opened page.html"
    run_command("explain", run, "--step", 1, "--out", run.parent / "not opened.html")
    assert opened_pages == []
    run_command("explain", run, "--step", 1, "--out", file, "--open")
    assert opened_pages == [file.resolve().as_uri()]
    assert "%20" in opened_pages[0]


def test_without_a_browser_the_page_is_written_all_the_same(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("webbrowser.open", lambda url: False)
    file = run.parent / "no-browser.html"
    ended = anybatch("explain", run, "--step", 1, "--out", file, "--open")
    assert ended.code == 0
    assert f"No browser could be started here. Open {file} yourself." in ended.err
    assert file.is_file()


def test_a_file_that_is_there_is_refused_before_anything_is_made(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "explain_run", None)
    file = run / "recipe.toml"
    assert "exists and is not written over" in refuse("explain", run, "--out", file)


def test_the_same_page_comes_out_twice(run: Path) -> None:
    run_command("explain", run, "--step", 5, "--out", run.parent / "a.html")
    run_command("explain", run, "--step", 5, "--out", run.parent / "b.html")
    assert (run.parent / "a.html").read_bytes() == (run.parent / "b.html").read_bytes()


def test_chosen_examples(run: Path) -> None:
    figures = page_of(run, "--batch", "3, 17,200")
    assert figures["examples"]["ids"] == [3, 17, 200]
    assert figures["about"]["is_chosen"] is True
    assert figures["about"]["recorded_loss"] is None
    assert unpack(figures["examples"]["share"]).sum() == pytest.approx(1)
    default = page_of(run)["about"]
    for name in ("step", "reason"):  # the weights are those of the page without --batch
        assert figures["about"][name] == default[name]


def test_an_example_may_come_twice(run: Path) -> None:
    figures = page_of(run, "--batch", "3,3")
    assert figures["examples"]["ids"] == [3, 3]
    assert unpack(figures["examples"]["share"]).tolist() == pytest.approx([0.5, 0.5])


def test_a_run_without_a_ledger_says_so_and_measures_at_its_checkpoints(run: Path) -> None:
    figures = page_of(run)
    assert "has no ledger" in figures["run"]["drivers"]["why"]
    assert [row["first"] for row in figures["noise"]["over_training"]] == [20, 40, 60]
    assert figures["pooling"] is None
    assert [row["ok"] for row in figures["run"]["checkpoints"]] == [True] * 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--step", "61"], "There is no step 61. The run has the steps 0 to 60"),
        (["--step", "100000000000"], "There is no step 100000000000. The run has the steps 0 to"),
        (["--batch", "3,x"], "--batch is '3,x'. It takes ids of examples, separated by commas"),
        (["--batch", 23 * "9"], "It takes ids of examples, separated by commas, such as 3,17,200"),
        (["--batch", "1797"], "There is no example 1797. The data have the ids 0 to 1796"),
    ],
)
def test_what_the_run_has_not_is_refused(run: Path, arguments: list[str], message: str) -> None:
    assert message in refuse("explain", run, *arguments)


def test_no_run_is_refused(tmp_path: Path) -> None:
    assert "is no run" in refuse("explain", tmp_path)


def test_a_step_that_would_take_too_long_names_the_nearest(tmp_path: Path) -> None:
    run = train_run(tmp_path, **MLP)
    records = run / "records.jsonl"
    slow = re.sub(r'"seconds": [\d.e-]+', '"seconds": 20.0', records.read_text())
    records.write_text(slow)
    message = refuse("explain", run, "--step", 30)  # 10 updates after the checkpoint after 20
    assert "is 10 updates after the checkpoint before it" in message
    assert "takes about 200 seconds by the run's own records, and at most 120 are" in message
    assert "Nearest steps without a wait: 20, 40, 60" in message
    with pytest.raises(RunError, match="Nearest steps"):
        restore_position(run, 59, allow_code=False)
    assert page_of(run, "--step", 24)["about"]["replayed"] == 4
    assert page_of(run)["about"]["replayed"] == 0  # nobody waits for a step that nobody named


def test_code_that_a_run_names_is_run_only_if_one_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "theirs", raising=False)
    write_module(
        tmp_path,
        "theirs",
        "from pathlib import Path\nPath('imported').touch()\n"
        "from torch import nn\ndef net(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n",
    )
    run = train_run(tmp_path / "own", model={"name": "theirs:net", "args": None})
    Path("imported").unlink()
    monkeypatch.delitem(sys.modules, "theirs")
    assert "It is imported only if you say so" in refuse("explain", run)
    assert not Path("imported").exists()
    assert page_of(run, "--allow-code")["about"]["model"] == "theirs:net"
    assert Path("imported").exists()


def test_layers_that_couple_examples_have_a_page_that_says_what_is_not_known(
    tmp_path: Path,
) -> None:
    run = train_run(
        tmp_path,
        model={"name": "resnet_small", "args": {"channels": 1, "width": 8}},
        batch={"size": 256},
        run={**LENET["run"], "dtype": "float32"},
    )
    figures = page_of(run)
    assert "couples examples" in figures["examples"]["unseen"]
    assert "couples examples" in figures["pairs"]["why"]
    assert "norms" not in figures["examples"]
    assert figures["layers"]["norms"]["step"] > 0
    rows = {row["name"]: row for row in figures["reductions"]["rows"]}
    assert rows["Sum"]["ratio"] == pytest.approx(256, rel=1e-3)  # float32


def hostile_run(folder: Path) -> Path:
    """A run of a table whose classes have such names, in a folder of such a name."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(80, 3, generator=generator)
    lines = ["a,b,c,label"]
    for row, (a, b, c) in enumerate(x.tolist()):
        name = HOSTILE[row % 5].replace('"', '""')
        lines.append(f'{a},{b},{c},"{name}"')
    (folder / "table.csv").write_text("\n".join(lines) + "\n", encoding="utf8")
    recipe_file = write_recipe(
        folder,
        model={"name": "mlp", "args": {"inputs": [3], "hidden": [8], "classes": 5}},
        data={
            "name": "csv",
            "args": {"path": str(folder / "table.csv"), "target": "label", "labels": HOSTILE},
        },
        batch={"size": 16},
        observe={"norms": True},
    )
    run = folder / "<b onclick=alert(1)>run"
    run_command("train", recipe_file, "--out", run)
    return run


def test_hostile_names_of_classes_are_shown_as_text(chromium: Any, tmp_path: Path) -> None:
    run = hostile_run(tmp_path)
    file = tmp_path / "page.html"
    run_command("explain", run, "--out", file)
    text = file.read_text()
    assert data_of(text)["run"]["classes"]["names"] == HOSTILE
    assert text.count("<script") == 16  # the page's own: figures, Plotly, fourteen modules
    assert "\u2028" not in text
    assert "<b onclick" not in text
    with open_page(chromium, file) as (page, visited):
        assert page.title().startswith("<b onclick=alert(1)>run, step")
        assert visited.complaints == []
        assert page.locator("main img, main b, main script").count() == 0
        output = {
            cell.strip() for cell in page.locator(".ledger td:nth-child(4)").all_inner_texts()
        }
        assert {one.split()[0] for one in HOSTILE} == {one.split()[0] for one in output}
        assert HOSTILE[0] in output
        page.click(".ledger tbody tr:nth-child(3) button[data-side=A]")
        page.fill("input[type=search]", "<script>")
        assert page.locator(".ledger tbody tr").count() > 0
        ids = data_of(text)["examples"]["ids"]
        labels = data_of(text)["examples"]["labels"]
        for k in map(labels.index, sorted(set(labels))):
            assert hover_over(page, k) == f"example {ids[k]}, class {labels[k]}"
            assert page.locator("main > section a").count() == 0


def hover_over(page: Any, example: int) -> str:
    """Return the first line of the tooltip of an example in the chart of one weight."""
    page.locator("#stages div.bars").scroll_into_view_if_needed()
    plot = page.locator("#stages div.bars .plot.drawn")
    page.wait_for_timeout(100)  # Plotly puts off what comes within 50 ms of the last
    plot.evaluate("(one, k) => Plotly.Fx.hover(one, [{curveNumber: 0, pointNumber: k}])", example)
    line = plot.locator(".hovertext .nums").first
    line.wait_for()
    return str(line.evaluate("one => (one.querySelector('tspan.line') ?? one).textContent"))


def test_hostile_text_is_shown_as_text(chromium: Any, tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("\n".join(HOSTILE * 12), encoding="utf8")
    recipe_file = write_recipe(
        tmp_path,
        model={"name": "gpt", "args": {"width": 8, "depth": 1, "heads": 2, "length": 64}},
        data={"name": "lines", "args": {"path": str(tmp_path / "lines.txt"), "length": 64}},
        objective={"loss": "token_cross_entropy"},
        batch={"size": 8},
        optimizer={"name": "adam", "lr": 1e-3},
    )
    run_command("train", recipe_file, "--out", tmp_path / "run")
    file = tmp_path / "page.html"
    run_command("explain", tmp_path / "run", "--out", file)
    with open_page(chromium, file) as (page, visited):
        texts = page.locator(".ledger .text").all_inner_texts()
        assert any(HOSTILE[0] in text for text in texts)
        assert page.title() != "run"
        assert page.locator("main img, main script").count() == 0
        assert visited.complaints == []
        assert visited.requests == []


def test_no_figure_can_end_its_element() -> None:
    text = embed_json({"names": HOSTILE, "nan": float("nan"), "row": (1, 2.5)})
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text) == {"names": HOSTILE, "nan": None, "row": [1, 2.5]}
    plain = json.dumps(HOSTILE)  # the control
    assert "</script>" in plain


@pytest.mark.parametrize(
    ("values", "code"),
    [
        (torch.tensor([1.5, float("nan")]), "f4"),
        (torch.tensor([1.5], dtype=torch.float64), "f8"),
        (torch.tensor([0, 255]), "u1"),
        (torch.tensor([0, 256]), "u2"),
        (torch.tensor([-1, 7]), "i4"),
        (torch.tensor([True, False]), "u1"),
        (torch.zeros(0, 3), "f4"),
    ],
)
def test_arrays_come_back_as_they_were(values: torch.Tensor, code: str) -> None:
    figures = pack(values)
    assert figures["dtype"] == code
    assert unpack(figures).shape == values.shape
    assert str(unpack(figures).tolist()) == str(values.tolist()).replace("True", "1").replace(
        "False", "0"
    )
