"""Ledger of a run on disk, and its ranking of examples.

Oracles: what each step of the same training says in memory, bit for bit; plain loops over the rows.
"""

import subprocess
import sys
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import anybatch as ab
from anybatch.errors import RunError
from anybatch.runs.ledger_files import rank_examples, read_ledger

X = torch.rand(20, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(20) % 3
ALL = ab.Observe(norms=True, alignment=True, share=True)


def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> ab.ExampleLosses:
    logits = model(batch[0])
    hits = (logits.detach().argmax(1) == batch[1]).float()
    values = F.cross_entropy(logits, batch[1], reduction="none")
    return ab.ExampleLosses(values, metrics={"accuracy": hits})


def train(run: Any, epochs: int = 3, leave: int | None = None, observe: Any = ALL) -> list[Any]:
    """Step, epoch, example, loss, norm, alignment and share of each visit, from memory."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    order = ab.Order(20, batch_size=8, seed=2)
    loop = ab.steps(
        model,
        ab.Objective(losses),
        optimizer,
        (X, Y),
        order=order,
        epochs=epochs,
        observe=observe,
        layout=ab.Layout(micro_batch=3),
        run=run,
    )
    rows = []
    for step in loop:
        result, ledger = step.gradient, step.gradient.ledger
        columns = [result.ids, result.losses.values]
        columns += [ledger.norms, ledger.alignment, ledger.share]
        rows += [(step.step, step.epoch, *row) for row in zip(*map(Tensor.tolist, columns))]  # noqa: B905
        if step.step + 1 == leave:
            break
    loop.close()
    return rows


def on_disk(folder: Path) -> list[Any]:
    columns = read_ledger(folder)
    names = ("step", "epoch", "example", "loss", "norm", "alignment", "share")
    return list(zip(*(columns[name].tolist() for name in names), strict=True))


def test_each_visit_of_an_example_is_a_row(tmp_path):
    expected = train(tmp_path / "run")
    assert on_disk(tmp_path / "run") == expected
    assert len(expected) == 60
    columns = read_ledger(tmp_path / "run")
    assert columns["coefficient"][:8].tolist() == pytest.approx([1 / 8] * 8)
    assert set(columns["count"]) == {1.0}
    for step in range(9):
        assert columns["share"][columns["step"] == step].sum() == pytest.approx(1, abs=1e-5)


@pytest.mark.fast(1)
def test_a_metric_of_every_type_is_read_back_as_it_was(tmp_path):
    hits = torch.tensor([True, False, False, True, True, False, True, True, False])
    metrics = {
        name: hits.to(kind)
        for name, kind in {
            "bool": torch.bool,
            "double": torch.float64,
            "byte": torch.uint8,
            "long": torch.int64,
        }.items()
    }
    model, x = nn.Linear(1, 1), torch.arange(9.0)[:, None]

    def losses(model, batch):
        ids = batch[:, 0].long()
        named = {name: values[ids] for name, values in metrics.items()}
        return ab.ExampleLosses(model(batch)[:, 0].square(), metrics=named)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    order = ab.Order(9, batch_size=4, seed=0)
    how = {"order": order, "epochs": 1, "run": ab.Run(tmp_path / "run"), "observe": ALL}
    list(ab.steps(model, ab.Objective(losses), optimizer, x, **how))
    columns = read_ledger(tmp_path / "run")
    ids = columns["example"]
    assert len(ids) == 9
    assert len(metrics["bool"].unique()) == 2  # so equality is not that of constants
    for name, values in metrics.items():
        np.testing.assert_array_equal(columns[name], values[torch.tensor(ids)].numpy())
        assert columns[name].dtype == values.numpy().dtype


def test_writing_a_ledger_does_not_import_pandas(tmp_path):
    pytest.importorskip("pandas")
    write = (
        "import sys, torch\n"
        "from pathlib import Path\n"
        "from anybatch.runs.ledger_files import LedgerFiles\n"
        "files = LedgerFiles(Path(sys.argv[1]))\n"
        "files.begin(0)\n"
        "files.add(0, [{'step': torch.arange(3), 'projection': torch.ones(3, 2)}])\n"
        "files.flush()\n"
    )
    for extra, imports in (("", "False"), ("import pyarrow; pyarrow.array([1])\n", "True")):
        code = f"{write}{extra}print('pandas' in sys.modules)"
        words = [sys.executable, "-c", code, str(tmp_path / imports)]
        output = subprocess.run(words, capture_output=True, text=True, check=True).stdout
        assert output.strip() == imports  # the second is the control
        assert len(list((tmp_path / imports).glob("*.parquet"))) == 1


@pytest.mark.parametrize("leave", [1, 2, 4, 5, 8])
def test_a_resumed_run_has_each_row_once(tmp_path, leave):
    whole = train(tmp_path / "whole")
    train(ab.Run(tmp_path / "cut", checkpoint_every=2), leave=leave)
    train(ab.Run(tmp_path / "cut", checkpoint_every=2))
    assert on_disk(tmp_path / "cut") == whole


def test_what_a_crash_leaves_half_written_does_not_count(tmp_path):
    expected = train(tmp_path / "run")
    folder = tmp_path / "run" / "ledger"
    (folder / "steps-000000000009-000000000012.partial").write_bytes(b"PAR1 cut off")
    assert on_disk(tmp_path / "run") == expected


def test_an_unobserved_run_has_no_ledger(tmp_path):
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    order = ab.Order(20, batch_size=8)
    objective, folder = ab.Objective(losses), tmp_path / "run"
    list(ab.steps(model, objective, optimizer, (X, Y), order=order, epochs=1, run=folder))
    assert not (folder / "ledger").exists()
    with pytest.raises(
        RunError, match=r"has no ledger: there are no files in .*observe.norms=true"
    ):
        read_ledger(folder)


def test_a_damaged_file_is_named(tmp_path):
    train(tmp_path / "run")
    file = next((tmp_path / "run" / "ledger").iterdir())
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(RunError, match="cannot be read"):
        read_ledger(tmp_path / "run")


def test_without_pyarrow_a_run_is_refused_before_it_trains(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(RunError, match=r"pip install 'anybatch\[data\]'"):
        train(tmp_path / "run")


def by_hand(columns: dict[str, Any]) -> dict[int, dict[str, float]]:
    """Means and forgetting of each example by a loop over its visits."""
    visits = defaultdict(list)
    for place, example in enumerate(columns["example"].tolist()):
        visits[example].append(place)
    result = {}
    for example, places in visits.items():
        right = [columns["accuracy"][p] > 0.5 for p in places]
        result[example] = {
            "loss": np.mean([columns["loss"][p] for p in places]),
            "norm": np.mean([columns["norm"][p] for p in places]),
            "share": np.mean([columns["share"][p] for p in places]),
            "forgetting": sum(a and not b for a, b in pairwise(right)),
        }
    return result


@pytest.mark.slow
@pytest.mark.parametrize("by", ["loss", "norm", "share", "forgetting"])
def test_examples_are_ranked_by_their_means_or_by_what_was_forgotten(tmp_path, by):
    train(tmp_path / "run", epochs=8)
    columns = read_ledger(tmp_path / "run")
    expected = by_hand(columns)
    rows = rank_examples(columns, by, 5)
    largest = sorted((values[by] for values in expected.values()), reverse=True)[:5]
    assert [row[by] for row in rows] == pytest.approx(largest, rel=1e-6)  # float32 means
    for row in rows:
        assert row["visits"] == 8
        assert row[by] == pytest.approx(expected[row["example"]][by], rel=1e-6)
    if by == "forgetting":
        assert largest[0] > 0  # some were


def test_a_value_that_was_not_kept_is_refused(tmp_path):
    columns = {"example": np.arange(3), "loss": np.ones(3)}
    with pytest.raises(RunError, match=r"cannot rank by 'share'.*observe.share=true"):
        rank_examples(columns, "share", 3)
    with pytest.raises(RunError, match="a loss with the metric accuracy"):
        rank_examples(columns, "forgetting", 3)
