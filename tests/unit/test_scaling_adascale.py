"""AdaScale: the gain from known noise, the schedule by progress, runs that are left and resumed.

The oracle of the rates is the recursion written out below, fed with the same variances; that of the
gain a problem whose tr(S) and |G|^2 are known: the loss |w - x|^2 / 2, with gradients w - x.
"""

from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import anybatch as ab
from anybatch.errors import LedgerError, RecipeError
from anybatch.optim.adascale import AdaScale
from anybatch.recipe.build import build
from anybatch.recipe.results import verify_run
from anybatch.recipe.runs import create_run, read_run_recipe, reopen_run
from anybatch.recipe.scaling import rescale
from anybatch.recipe.schema import Recipe
from anybatch.recipe.train import train
from anybatch.runs.records import read_records
from command_line import recipe, refuse, write_recipe

REFERENCE, SIZE, K = 64, 512, 8


def make_gradient(variance: float, square: float, *, is_finite: bool = True) -> Any:
    """An update whose noise is this."""
    noise = SimpleNamespace(variance=variance, gradient_square=square)
    return SimpleNamespace(ledger=SimpleNamespace(noise=noise), is_finite=is_finite)


def rate_of(schedule: Any = None, k: int = K) -> AdaScale:
    schedule = ab.Constant(0.1) if schedule is None else schedule
    return AdaScale(schedule, reference_size=REFERENCE, batch_size=k * REFERENCE)


def by_hand(noises: list[tuple[float, float]], schedule: Any, k: int) -> list[float]:
    """Compute the rate of each update and of the next, by algorithm 1 and appendix B.3."""
    theta, tau, rates = max(1 - k / 1000, 0.0), 0.0, []
    mean_s2 = mean_m2 = 0.0
    for t in range(len(noises) + 1):
        s2, m2 = max(mean_s2, 0.0), max(mean_m2, 0.0)
        r = 1.0 if t == 0 else (s2 + m2) / (s2 / k + m2)
        rates.append(r * schedule(REFERENCE * int(tau)))
        if t < len(noises):
            tau += r
            trace, square = noises[t]
            weight = theta if t + 1 > 1 / (1 - theta) else t / (t + 1)
            mean_s2 = weight * mean_s2 + (1 - weight) * trace / REFERENCE
            mean_m2 = weight * mean_m2 + (1 - weight) * square
    return rates


@pytest.mark.parametrize("k", [1, 3, 8, 200, 2000])
def test_rates_are_those_of_the_algorithm(k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    draws = torch.randn(300, 2, generator=generator, dtype=torch.float64)
    noises = [(float(64 * (2 + a)), float(0.5 + b / 3)) for a, b in draws]  # some below 0
    schedule = ab.StepDecay(0.1, 0.5, every=20 * REFERENCE)
    rate = rate_of(schedule, k)
    result = [rate(0)]
    for variance, square in noises:
        rate.update(make_gradient(variance, square))
        result.append(rate(10**9))  # the examples used here do not matter
    # two ways of rounding an average of 300
    assert result == pytest.approx(by_hand(noises, schedule, k), rel=1e-12)


def test_noise_alone_is_the_linear_rule_and_no_noise_gains_nothing() -> None:
    noisy, clear = rate_of(), rate_of()
    noisy.update(make_gradient(5.0, 0.0))
    clear.update(make_gradient(0.0, 5.0))
    assert (noisy.gain, clear.gain) == (K, 1.0)
    assert (
        noisy(0)
        == rescale(
            recipe(**{"batch.size": 64, "optimizer.lr": 0.1}), batch_size=512
        ).recipe.optimizer.lr
    )
    between = rate_of()
    between.update(make_gradient(64.0, 1.0))  # s2 = m2 = 1
    assert between.gain == pytest.approx(2 / (1 / 8 + 1))
    assert rate_of().gain == 1.0  # before anything is known


def test_progress_is_counted_in_updates_of_the_reference_size() -> None:
    rate = rate_of()
    for _ in range(5):
        rate.update(make_gradient(5.0, 0.0))
    assert rate.examples == REFERENCE * (1 + 4 * K)


def losses(model: nn.Module, batch: Tensor) -> Tensor:
    (w,) = model.parameters()
    return (w - batch).square().sum(1) / 2


class Mean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64))


def points() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4096, 3, generator=generator, dtype=torch.float64)


def run_loop(
    folder: Path | None, lr: float, updates: int, *, is_saved: bool = True
) -> tuple[Any, Mean]:
    model, data = Mean(), points()
    rate = AdaScale(ab.StepDecay(lr, 0.5, every=800), reference_size=16, batch_size=128)
    loop = ab.steps(
        model,
        ab.Objective(losses),
        torch.optim.SGD(model.parameters(), lr=lr),
        data,
        order=ab.Order(len(data), batch_size=128, seed=0),
        epochs=10,
        observe=ab.Observe(norms=False, noise_scale=True),
        schedule=rate,
        state={"rate": rate} if is_saved else None,
        run=None if folder is None else ab.Run(folder, checkpoint_every=5),
    )
    for step in loop:
        rate.update(step.gradient)
        if step.step + 1 == updates:
            break
    return rate, model


def test_the_gain_is_that_of_the_noise_of_the_data() -> None:
    rate, model = run_loop(None, 1e-12, 96)  # w does not move
    data, w = points(), Mean().w.detach()
    trace, square = float(data.var(0).sum()), float((w - data.mean(0)).square().sum())
    gain = (trace / 16 + square) / (trace / 128 + square)
    assert 1.5 < gain < 6  # neither end
    # 3 epochs, each of which sees all of the data; what is left is that of estimates of |G|^2
    assert rate.gain == pytest.approx(gain, rel=5e-3)
    wrong = (trace + square) / (trace / 8 + square)  # the control: of one example, not of 16
    assert rate.gain != pytest.approx(wrong, rel=0.2)
    assert torch.allclose(model.w, w, atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("leave", [5, 20, 45])
def test_a_loop_that_is_left_ends_with_the_same_bits(tmp_path: Path, leave: int) -> None:
    whole, wanted = run_loop(tmp_path / "whole", 0.01, 60)
    run_loop(tmp_path / "left", 0.01, leave)  # left before that step is saved
    resumed, result = run_loop(tmp_path / "left", 0.01, 60)
    assert resumed.state_dict() == whole.state_dict()
    assert torch.equal(result.w, wanted.w)


@pytest.mark.slow
def test_a_resume_that_forgets_the_noise_so_far_ends_elsewhere(tmp_path: Path) -> None:
    _, wanted = run_loop(tmp_path / "whole", 0.01, 60, is_saved=False)
    run_loop(tmp_path / "left", 0.01, 20, is_saved=False)
    _, result = run_loop(tmp_path / "left", 0.01, 60, is_saved=False)
    assert not torch.equal(result.w, wanted.w)


def test_an_update_that_was_skipped_is_none() -> None:
    rate = rate_of()
    rate.update(make_gradient(float("nan"), float("nan"), is_finite=False))
    assert rate.state_dict() == rate_of().state_dict()


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(LedgerError, match=r"noise was not observed\. .*Observe\(noise_scale=True"):
        rate_of().update(SimpleNamespace(ledger=None, is_finite=True))  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="at least reference_size = 64, got 32"):
        AdaScale(ab.Constant(0.1), reference_size=64, batch_size=32)
    with pytest.raises(RecipeError, match=r"reference_size to be a number of examples .*, got 0"):
        AdaScale(ab.Constant(0.1), reference_size=0, batch_size=32)
    with pytest.raises(RecipeError, match="expects a schedule such as"):
        AdaScale(0.1, reference_size=64, batch_size=64)  # type: ignore[arg-type]


MEASURED = {"batch.reference_size": 32, "batch.size": 256, "batch.scaling": "adascale"} | {
    "run.epochs": 2,
    "schedule.name": "step",
    "schedule.at": [500],
    "optimizer.args": {"momentum": 0.9},
    "optimizer.lr": 0.05,
    "average.decay": 0.9,
}


def start_run(folder: Path, stated: Recipe, leave: int | None = None) -> None:
    with create_run(stated, folder) as run:
        for progress in islice(train(build(stated, allow_code=False), run), leave):
            if leave is not None and progress.step.step + 1 == leave:
                progress.step.save()


@pytest.mark.slow
def test_a_recipe_measures_its_rate_and_ends_the_same_wherever_it_was_left(tmp_path: Path) -> None:
    stated = recipe(**MEASURED)
    start_run(tmp_path / "whole", stated)
    start_run(tmp_path / "left", stated, leave=4)
    setup = build(read_run_recipe(tmp_path / "left"), allow_code=False, fresh=False)
    with reopen_run(setup, tmp_path / "left") as run:
        assert len(list(train(setup, run))) == 8
    digests = {verify_run(tmp_path / name)["digest"] for name in ("whole", "left")}
    assert len(digests) == 1
    rows = [r for r in read_records(tmp_path / "whole" / "records.jsonl") if r["kind"] == "step"]
    rates = [row["lr"] for row in rows]
    assert rates[0] == 0.05
    assert 1.2 * 0.05 < max(rates) <= 8 * 0.05
    assert rates[-1] < max(rates) / 5  # the drop, at 500 examples of the reference
    assert setup.average is not None
    assert setup.average.decay == pytest.approx(0.9**8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer.name": "adam", "optimizer.args": {}}, "a rule for sgd and caffe_sgd, got"),
        ({"objective.reduction": "sum"}, "needs objective.reduction = 'mean', got sum"),
        ({"batch.size": 16}, "at least reference_size = 32, got 16"),
    ],
)
def test_a_recipe_that_adascale_is_no_rule_for_is_refused(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        build(recipe(**MEASURED | changes), allow_code=False)


def test_scale_does_not_state_what_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_recipe(tmp_path, batch={"reference_size": 32, "scaling": "adascale"})
    assert "measures the rate in training" in refuse("scale", path, "--batch-size", 64)
    assert rescale(recipe(**MEASURED), batch_size=64, rule="linear").recipe.optimizer.lr == 0.1
