"""`anybatch examples --similar`, `--similar-held-out` and `--export`.

Oracles: the projections that each step has in memory, bit for bit; a plain loop over the exported
rows; whole gradients by plain autograd at the weights of the checkpoint; and examples planted in
the digits: one twice, and one with a wrong label.
"""

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import anybatch as ab
from anybatch.data import load_digits
from anybatch.errors import RunError
from anybatch.runs.ledger_files import PROJECTION, iterate_projections, read_ledger
from anybatch.runs.similar import rank_similar
from command_line import refuse, run_command, write_recipe

SIZE = 64
TWIN, OTHER, WRONG, QUERY = 7, 300, 301, 302
"""Planted among 300 digits: 300 is a copy of 7, and 301 one of the held-out 302, labelled wrong."""

X = torch.rand(20, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(20) % 3


def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def train(folder: Path, epochs: int = 3, leave: int | None = None, **how: Any) -> dict[Any, Any]:
    """Train a small network; return the projection of each (step, epoch, example)."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    observe = ab.Observe(projections=SIZE)
    loop = ab.steps(
        model,
        ab.Objective(losses),
        torch.optim.SGD(model.parameters(), lr=0.5),
        (X, Y),
        order=ab.Order(20, batch_size=8, seed=2),
        epochs=epochs,
        run=ab.Run(folder),
        **({"observe": observe} | how),
    )
    rows = {}
    for step in loop:
        ledger = step.gradient.ledger
        assert ledger is not None
        if ledger.projections is not None:
            pairs = zip(step.gradient.ids.tolist(), ledger.projections.tolist(), strict=True)
            rows |= {(step.step, step.epoch, example): row for example, row in pairs}
        if step.step + 1 == leave:
            break
    loop.close()
    return rows


def read_rows(folder: Path) -> dict[Any, Any]:
    rows = {}
    for columns in iterate_projections(folder):
        ids = zip(*(columns[name].tolist() for name in ("step", "epoch", "example")), strict=True)
        rows |= dict(zip(ids, columns[PROJECTION].tolist(), strict=True))
    return rows


def test_a_run_keeps_each_projection_bit_for_bit_also_if_it_is_left_and_resumed(
    tmp_path: Path,
) -> None:
    expected = train(tmp_path / "whole")
    assert len(expected) == 3 * 20
    assert read_rows(tmp_path / "whole") == expected
    train(tmp_path / "cut", leave=5)  # in the second epoch, after the checkpoint of the first
    assert read_rows(tmp_path / "cut") != expected  # the control
    train(tmp_path / "cut")
    assert read_rows(tmp_path / "cut") == expected
    assert PROJECTION not in read_ledger(tmp_path / "cut")
    assert run_command("verify", tmp_path / "cut", "--json").report["ok"]


def test_the_cosine_is_the_mean_over_epochs_weighted_by_the_learning_rate(tmp_path: Path) -> None:
    rows = train(tmp_path / "run", schedule=ab.schedules.StepDecay(0.5, factor=0.1, at=(20,)))
    ranked = rank_similar(tmp_path / "run", 4, top=100)
    result = {row["example"]: row["cosine"] for row in ranked["aligned"] + ranked["opposed"]}
    expected = average_cosines(rows, 4, lambda epoch: 0.5 if epoch == 0 else 0.05)
    assert result == pytest.approx(expected, abs=1e-6)  # float32 in the files
    assert [row["cosine"] for row in ranked["aligned"]] == sorted(
        (cosine for cosine in result.values() if cosine > 0), reverse=True
    )
    assert ranked["aligned"][0].keys() >= {"visits", "loss", "norm"}
    unweighted = average_cosines(rows, 4, lambda epoch: 1)  # the control
    assert max(abs(unweighted[i] - result[i]) for i in result) > 1e-3


def average_cosines(rows: dict[Any, Any], example: int, rate: Any) -> dict[int, float]:
    """Average the cosines with an example, by a loop over all visits."""
    ours = {epoch: row for (_, epoch, i), row in rows.items() if i == example}
    sums: dict[int, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for (_, epoch, i), row in rows.items():
        if i != example:
            a, b = np.array(row), np.array(ours[epoch])
            sums[i][0] += rate(epoch) * (a @ b) / (np.linalg.norm(a) * np.linalg.norm(b))
            sums[i][1] += rate(epoch)
    return {i: total / weight for i, (total, weight) in sums.items()}


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train on digits with planted examples; return the run."""
    folder = tmp_path_factory.mktemp("planted")
    inputs, targets = (column.numpy() for column in load_digits().columns)
    more = [TWIN, 400]
    labels = [targets[TWIN], (targets[400] + 1) % 10]
    arrays = {"inputs": np.concatenate([inputs[:300], inputs[more]])}
    arrays["targets"] = np.concatenate([targets[:300], labels])
    np.savez(folder / "train.npz", **arrays)
    np.savez(folder / "held.npz", inputs=inputs[400:430], targets=targets[400:430])
    data = {"name": "npz", "args": {"path": str(folder / "train.npz")}}
    recipe = write_recipe(
        folder,
        data=data | {"held_out": {"path": str(folder / "held.npz")}},
        model={"name": "mlp", "args": {"inputs": [64], "hidden": [32]}},
        observe={"projections": 512},
        batch={"size": 32},
        run={"epochs": 40},
    )
    out = folder / "run"
    run_command("train", recipe, "--out", out, "--json")
    return out


def test_a_planted_duplicate_is_the_most_similar_example(copies: Path) -> None:
    report = run_command("examples", copies, "--similar", TWIN, "--json").report
    assert report["aligned"][0]["example"] == OTHER
    assert report["aligned"][0]["cosine"] > 0.96
    assert report["aligned"][1]["cosine"] < 0.95  # the control: others are less similar
    assert all(row["example"] != TWIN for row in report["aligned"] + report["opposed"])
    table = run_command("examples", copies, "--similar", TWIN, "--top", 1).out
    assert "aligned: a step on these lowers the loss of example 7" in table
    assert "opposed: a step on these raises the loss of example 7" in table


def test_a_planted_wrong_label_is_what_pulls_a_held_out_digit_away(copies: Path) -> None:
    report = run_command("examples", copies, "--similar-held-out", QUERY, "--json").report
    assert report["opposed"][0]["example"] == WRONG
    assert report["opposed"][0]["target"] != report["target"]
    assert report["class"] == report["opposed"][0]["target"]  # it is predicted wrongly
    other = run_command("examples", copies, "--similar-held-out", QUERY + 1, "--json").report
    assert other["opposed"][0]["example"] != WRONG  # the control: not of every digit


def test_held_out_cosines_are_those_of_whole_gradients_at_the_last_weights(
    copies: Path,
) -> None:
    args = ("examples", copies, "--similar-held-out", QUERY, "--top", 500, "--json")
    report = run_command(*args).report
    result = {row["example"]: row["cosine"] for row in report["aligned"] + report["opposed"]}
    run_command("export", copies, "--out", copies.parent / "weights.safetensors")
    weights = load_file(copies.parent / "weights.safetensors")
    train, contents = (np.load(copies.parent / f"{name}.npz") for name in ("train", "held"))
    one = compute_gradient(weights, contents["inputs"][0], contents["targets"][0])
    exact = {}
    for i in range(302):
        g = compute_gradient(weights, train["inputs"][i], train["targets"][i])
        exact[i] = float(g @ one / (g.norm() * one.norm()))
    errors = torch.tensor([result.get(i, 0) - exact[i] for i in exact])
    assert errors.square().mean().sqrt() < 2 / 4096**0.5  # of projections to 4,096 numbers
    spread = torch.tensor(list(exact.values())).std()
    assert spread > 0.2  # the control: an answer of 0 for all would be seen


def compute_gradient(weights: dict[str, Tensor], x: Any, y: Any) -> Tensor:
    """Compute the gradient of one example's loss by plain autograd, as one vector."""
    free = [w.clone().requires_grad_() for w in weights.values()]
    (w1, b1, w2, b2) = (free[list(weights).index(n)] for n in sorted_names(weights))
    hidden = torch.relu(F.linear(torch.tensor(x).flatten(), w1, b1))
    loss = F.cross_entropy(F.linear(hidden, w2, b2), torch.tensor(y))
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, free)])


def sorted_names(weights: dict[str, Tensor]) -> list[str]:
    """Sort the names of two layers: first weight, first bias, last weight, last bias."""
    modules = sorted({name.rpartition(".")[0] for name in weights})
    return [f"{module}.{kind}" for module in modules for kind in ("weight", "bias")]


def test_the_export_holds_every_row_with_its_rate(copies: Path) -> None:
    file = copies.parent / "projections.npz"
    report = run_command("examples", copies, "--export", file, "--json").report
    assert report == {"run": str(copies), "file": str(file), "rows": 40 * 302}
    with np.load(file) as archive:
        arrays = dict(archive)
    assert arrays[PROJECTION].shape == (40 * 302, 512)
    assert arrays[PROJECTION].dtype == np.float32
    assert set(arrays) == {"step", "epoch", "example", PROJECTION, "learning_rate"}
    assert set(arrays["learning_rate"].tolist()) == {0.5}
    ledger = read_ledger(copies)
    for name in ("step", "epoch", "example"):
        assert np.array_equal(arrays[name], ledger[name])
    lengths = np.linalg.norm(arrays[PROJECTION], axis=1)
    large = ledger["norm"] > 1e-3
    assert np.median(np.abs(lengths[large] / ledger["norm"][large] - 1)) < 0.1
    assert "exists and is not written over" in refuse("examples", copies, "--export", file)


def test_a_mistake_gets_one_message_that_says_what_to_do(copies: Path, tmp_path: Path) -> None:
    run = train_without(tmp_path)
    for option in (("--similar", 3), ("--export", tmp_path / "x.npz")):
        message = refuse("examples", run, *option)
        assert "keeps no projections of gradients" in message
        assert "--set observe.projections=512" in message
    assert not (tmp_path / "x.npz").exists()
    message = refuse("examples", copies, "--similar", 99_999)
    assert "has no example 99999. Expected the id of an example that was trained on" in message
    message = refuse("examples", copies, "--similar-held-out", TWIN)
    assert "Example 7 is not held out" in message
    assert f"{QUERY}, {QUERY + 1}" in message
    assert "is no run" in refuse("examples", "nowhere", "--similar", 3)


def train_without(folder: Path) -> Path:
    """Train with a ledger of norms alone."""
    train(folder / "run", epochs=1, observe=ab.Observe())
    return folder / "run"


def test_a_run_cannot_go_on_with_other_projections_and_files_of_another_run_are_refused(
    tmp_path: Path,
) -> None:
    others = ab.Observe(projections=SIZE + 1)
    train(tmp_path / "run", epochs=1)
    with pytest.raises(RunError, match=r"was begun with observe = .*projections=64"):
        train(tmp_path / "run", epochs=2, observe=others)
    train(tmp_path / "other", epochs=2, observe=others)
    for file in sorted((tmp_path / "other" / "ledger").iterdir())[1:]:
        (tmp_path / "run" / "ledger" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "run" / "run.json").write_text('{"format": 1}')  # without checksums
    with pytest.raises(RunError, match=r"cannot be read: .* holds projections of type"):
        rank_similar(tmp_path / "run", 3, top=5)
    assert len(read_ledger(tmp_path / "run")["norm"]) == 2 * 20  # the control: the rest is read


def test_a_run_from_before_there_were_projections_goes_on() -> None:
    """The control is the text that such a run has kept."""
    before = (
        "Observe(norms=True, parameter_norms=False, alignment=False, share=False, "
        "noise_scale=False, gradients=False, grain_norms=False)"
    )
    assert repr(ab.Observe()) == before
    assert repr(ab.Observe(projections=8)) == before.replace(", grain", ", projections=8, grain")
