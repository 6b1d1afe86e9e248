"""Whole updates by `torch.compile`: equal to plain updates, or refused with the cause.

Oracle: the same training by plain updates. In float64 rounding stays under 1e-12 over these few
updates; a wrong divisor changes 3 % of a gradient. Most tests trace and do not generate code, since
that takes seconds: the backend is "eager" or "aot_eager". One test uses torch's own.
"""

import copy
import dataclasses
import json

import pytest
import torch
from torch import nn

import anybatch as ab
from anybatch.errors import DivergenceError, ModelError, RunError
from anybatch.runs.records import read_records
from anybatch.training import compile_choice, compiled_updates, whole_update
from compiled_training import (
    BATCH,
    ORDER,
    adamw,
    amsgrad,
    begin,
    data,
    distance,
    losses,
    network,
    sgd,
    train,
    two_terms,
    weighted,
)


@pytest.fixture(autouse=True)
def quick_backend(monkeypatch, tmp_path):
    torch._dynamo.reset()
    monkeypatch.setattr(whole_update, "BACKEND", "eager")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def calls(monkeypatch):
    """Sizes of the batches of compiled updates."""
    sizes, call = [], whole_update.WholeUpdate.__call__

    def count(self, batch, ids):
        sizes.append(len(ids))
        return call(self, batch, ids)

    monkeypatch.setattr(whole_update.WholeUpdate, "__call__", count)
    return sizes


CASES = {
    "sgd": ({}, {"optimizer": sgd}),
    "adamw, weights, penalty, clip, schedule": (
        {"example_losses": weighted, "penalty": ab.L2(0.1) + ab.L1(0.01, on="*")},
        {"optimizer": adamw, "clip": ab.ClipNorm(0.1), "schedule": ab.Cosine(0.1, examples=200)},
    ),
    "amsgrad, groups, sum": (
        {"reduction": 0.01 * ab.Sum()},
        {"optimizer": amsgrad, "schedule": ab.StepDecay(0.1, every=30)},
    ),
    "two terms": (
        {"example_losses": two_terms, "reduction": {"fit": ab.Mean(total=0.5), "size": ab.Mean()}},
        {"optimizer": torch.optim.RMSprop},
    ),
}


@pytest.mark.fast(2)
@pytest.mark.parametrize("case", CASES)
def test_compiled_updates_equal_plain_ones(case, calls):
    parts, options = CASES[case]
    objective = ab.Objective(**{"example_losses": losses, **parts})
    compiled = train(True, objective, **options)
    assert calls == [BATCH] * 11  # all but the first and the short ends of two epochs
    assert distance(compiled, train(False, objective, **options)) < 1e-12
    wrong = {name: BATCH / (BATCH - 1) * r for name, r in objective.reductions.items()}
    wrong = wrong["data"] if set(wrong) == {"data"} else wrong
    other = dataclasses.replace(objective, reduction=wrong)  # the control: another divisor
    assert distance(compiled, train(False, other, **options)) > 1e-4


@pytest.mark.slow
def test_compiled_updates_of_inductor_equal_plain_ones(monkeypatch, calls):
    monkeypatch.setattr(whole_update, "BACKEND", "inductor")
    parts, options = CASES["adamw, weights, penalty, clip, schedule"]
    compiled = train(True, ab.Objective(**parts), **options)
    assert len(calls) == 11
    assert distance(compiled, train(False, ab.Objective(**parts), **options)) < 1e-12


def divide_by_one_less(reduction, term):
    value, c, is_valid = plain_reduce(reduction, term)
    wrong = len(c) / (len(c) - 1)
    return wrong * value, wrong * c, is_valid


plain_reduce = whole_update._reduce


def test_a_wrong_divisor_is_noticed_before_a_weight_moves(monkeypatch):
    monkeypatch.setattr(whole_update, "_reduce", divide_by_one_less)
    with pytest.raises(ModelError, match="differ in the coefficients of the term 'data'"):
        train(True)


def test_under_auto_a_wrong_divisor_leaves_the_training_as_it_is(monkeypatch, caplog):
    plain = train(False)
    monkeypatch.setattr(whole_update, "_reduce", divide_by_one_less)
    monkeypatch.setattr(compiled_updates.CompiledUpdates, "_is_worth", lambda self, step: True)
    assert distance(train("auto"), plain) == 0
    assert "update differ in the coefficients of the term" in caplog.text


@pytest.mark.fast(1)
@pytest.mark.parametrize(("factor", "match"), [(1.01, "step of 0.weight"), (None, "gradient of 0")])
def test_a_later_update_that_differs_is_noticed_at_the_tenth(factor, match, monkeypatch):
    call, count = whole_update.WholeUpdate.__call__, []

    def disturb(self, batch, ids):
        gradient = call(self, batch, ids)
        count.append(ids)
        with torch.no_grad():
            if len(count) == 10 and factor is not None:
                self._parameters[0].mul_(factor)
            elif len(count) == 10:
                self._gradients[0].mul_(1.01)
        return gradient

    monkeypatch.setattr(whole_update.WholeUpdate, "__call__", disturb)
    with pytest.raises(ModelError, match=f"At update 12 .*{match}"):
        train(True)
    count.clear()
    train(True, self_check=False)


class Sqrt(nn.Module):
    """A network whose gradient is infinite for an input of zeros, and whose loss is finite."""

    def __init__(self):
        super().__init__()
        self.network = network()

    def forward(self, inputs):
        return self.network(inputs) + self.network[0](inputs).square().sum(1, keepdim=True).sqrt()


@pytest.mark.fast(1)
@pytest.mark.parametrize("optimizer", [sgd, adamw, amsgrad, torch.optim.NAdam])
def test_an_update_that_is_not_finite_moves_nothing(optimizer, monkeypatch):
    monkeypatch.setattr(whole_update, "BACKEND", "aot_eager")
    model = Sqrt()
    with torch.no_grad():
        model.network[0].bias.zero_()
        model.network[0].bias.requires_grad_(False)
    examples = data()
    examples[0][ORDER.indices(3)[5]] = 0
    optimizer = optimizer([p for p in model.parameters() if p.requires_grad])
    skips = []
    updates = ab.steps(
        model, ab.Objective(losses), optimizer, examples, order=ORDER, steps=4, compile=True
    )
    for step in updates:
        skips.append(step.is_skipped)
        if step.step == 2:
            before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    assert skips == [False, False, False, True]
    for a, b in zip(before, (model.state_dict(), optimizer.state_dict()), strict=True):
        leaves, others = (torch.utils._pytree.tree_leaves(tree) for tree in (a, b))
        for leaf, other in zip(leaves, others, strict=True):
            assert torch.equal(leaf, other) if isinstance(leaf, torch.Tensor) else leaf == other


@pytest.mark.parametrize("compile", [True, False])
def test_a_loss_that_is_not_finite_is_named_by_the_id_of_its_example(compile):
    model, examples = network(), data()
    wrong = int(ORDER.indices(3)[5])
    examples[0][wrong] = torch.nan
    with pytest.raises(DivergenceError, match=f"1 of 16 examples, by id: {wrong}"):
        train(compile, model=model, examples=examples)
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_a_run_goes_on_compiled_from_its_checkpoint(tmp_path, calls):
    plain = train(False, steps=10)
    with pytest.raises(InterruptedError, match="stopped"):
        train_until(6, tmp_path / "run")
    calls.clear()
    resumed = train(True, steps=10, run=ab.Run(tmp_path / "run", checkpoint_every=3))
    assert len(calls) == 2  # updates 7 and 8: the first is plain, and 9 is short
    assert distance(resumed[-100:], plain[-100:]) < 1e-12
    rows = [r for r in read_records(tmp_path / "run/records.jsonl") if r["kind"] == "compile"]
    assert [(row["step"], row["updates"]) for row in rows] == [(1, "compiled"), (7, "compiled")]
    for other, name in ((False, "None"), ("auto", "'auto'")):
        with pytest.raises(RunError, match=f"compile = True, and cannot go on with {name}"):
            train(other, steps=12, run=tmp_path / "run")


def train_until(stop, folder):
    """Train as `train`, and fail before an update."""
    model = network()
    run = ab.Run(folder, checkpoint_every=3)
    updates = begin(True, model, sgd(model.parameters()), steps=10, run=run)
    for step in updates:
        if step.step == stop:
            updates.close()
            raise InterruptedError("stopped")


@pytest.mark.parametrize("is_faster", [True, False])
def test_auto_measures_and_keeps_the_faster_kind(is_faster, monkeypatch, caplog, calls, tmp_path):
    monkeypatch.setattr(compiled_updates, "_NUM_TIMED", 2)
    monkeypatch.setattr(compiled_updates, "_COMPILING", 0.0)
    monkeypatch.setattr(compile_choice.Choice, "is_faster", property(lambda self: is_faster))
    plain = train(False)
    assert distance(train("auto", run=tmp_path / "run"), plain) < 1e-12
    kind = "compiled" if is_faster else "plain"
    row = next(r for r in read_records(tmp_path / "run/records.jsonl") if r["kind"] == "compile")
    assert (row["step"], row["updates"]) == (7, kind)
    assert set(row["seconds"]) == {"plain", "compiled", "compiling"}
    assert f'compile="auto" goes on with {kind} updates: ' in caplog.text
    assert " ms compiled, " in caplog.text
    assert len(calls) == (8 if is_faster else 3)
    (file,) = (tmp_path / "cache/anybatch").glob("compiled-*.json")
    ((key, times),) = json.loads(file.read_text()).items()
    assert times == list(row["seconds"].values())
    file.write_text(json.dumps({key: [1.0, 0.5, 2.0]}))
    caplog.clear()
    calls.clear()
    assert distance(train("auto"), plain) < 1e-12  # it reads what was measured
    assert len(calls) == (11 if is_faster else 0)
    assert f"goes on with {kind} updates: an earlier training measured" in caplog.text


def test_auto_says_that_a_training_is_too_short(monkeypatch, caplog):
    monkeypatch.setattr(compiled_updates, "_NUM_TIMED", 2)
    assert distance(train("auto"), train(False)) == 0
    assert "compiling takes longer than it would save in 12 updates of" in caplog.text


def test_a_change_of_the_model_is_compiled_anew(calls):
    def train_frozen(compile):
        model, rows = network(), []
        for step in begin(compile, model, sgd(model.parameters()), steps=12):
            rows.append(step.loss)
            model[0].requires_grad_(step.step != 5)
        return torch.tensor(rows)

    compiled = train_frozen(True)
    assert len(calls) < 11
    assert distance(compiled, train_frozen(False)) < 1e-12
