"""Precision of the operations, the loss scale, and updates that are skipped.

Oracle: torch.autocast around a plain loop. Where the same operations run on the same shapes the
bits are the same; where a batch is cut, the gradient of each part is rounded on its own, by half a
unit in the last place (2^-9 in bfloat16, 2^-12 in float16), and the parts cancel in part: 8 times
that is allowed.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import anybatch as ab
from anybatch.errors import DivergenceError, ModelError, RunError
from anybatch.runs.run import read_records

X, Y = torch.rand(12, 6, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3


def net(norm: bool = False) -> nn.Module:
    torch.manual_seed(1)
    middle = [nn.BatchNorm1d(8)] if norm else []
    return nn.Sequential(nn.Linear(6, 8), *middle, nn.ReLU(), nn.Linear(8, 3))


def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def by_autocast(dtype: torch.dtype | None) -> Tensor:
    model = net()
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        loss = losses(model, (X, Y)).float().mean()
    loss.backward()
    return flat(model)


def by_us(precision: str, reduction: ab.Mean | ab.Tilted, micro_batch: int | None) -> Tensor:
    model = net()
    objective = ab.Objective(losses, reduction=reduction)
    layout = ab.Layout(micro_batch=micro_batch)
    ab.batch_gradient(model, objective, (X, Y), layout=layout, precision=precision)
    return flat(model)


@pytest.mark.parametrize(("precision", "limit"), [("bfloat16", 2**-6), ("float16", 2**-9)])
def test_a_narrow_precision_is_torchs_autocast(precision: str, limit: float) -> None:
    expected = by_autocast(getattr(torch, precision))
    assert torch.equal(by_us(precision, ab.Mean(), None), expected)
    assert distance(by_us(precision, ab.Mean(), 5), expected) < limit
    assert distance(by_autocast(None), expected) > 1e-5  # the control: it does make a difference


def test_every_pass_runs_in_it() -> None:
    history = []

    def watch_dtypes(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        history.append(torch.is_autocast_enabled("cpu"))
        return losses(model, batch)

    model, objective = net(), ab.Objective(watch_dtypes, reduction=ab.Tilted(1.0))
    cut = ab.Layout(micro_batch=4)
    ab.batch_gradient(model, objective, (X, Y), layout=cut, precision="bfloat16")
    ab.evaluate(model, objective, (X, Y), precision="bfloat16")
    assert history == [True] * 7  # two passes of three parts, one evaluation
    ab.batch_gradient(model, objective, (X, Y), layout=cut)
    assert history[7:] == [False] * 6


@pytest.mark.parametrize("reduction", [ab.Mean(), ab.Tilted(1.0)])
def test_a_loss_scale_saves_small_gradients_and_changes_no_others(
    reduction: ab.Mean | ab.Tilted,
) -> None:
    def tiny(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return 1e-7 * losses(model, batch)  # below the smallest number of float16, 6e-8, backwards

    def gradient(scale: float, precision: str) -> Tensor:
        model = net()
        objective = ab.Objective(tiny, reduction=reduction)
        ab.batch_gradient(
            model,
            objective,
            (X, Y),
            layout=ab.Layout(micro_batch=6),
            precision=precision,
            loss_scale=scale,
        )
        return flat(model)

    exact = gradient(1.0, "float32")
    assert distance(gradient(2.0**16, "float16"), exact) < 0.02
    assert distance(gradient(1.0, "float16"), exact) > 0.2  # the control: they vanish
    assert torch.equal(gradient(2.0**16, "float32"), exact)  # a power of two


def with_spikes(at: set[int]) -> tuple[nn.Module, ab.Objective, tuple[Tensor, Tensor]]:
    """A model whose gradient is not finite, though its loss is, on the examples of those ids."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    spiked = torch.tensor([[float(i in at)] for i in range(12)])

    def take_root(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, spike = batch
        y = model(x)
        return torch.sqrt(torch.where(spike > 0, 0 * y, y**2 + 1))[:, 0]  # sqrt(0): slope infinite

    return model, ab.Objective(take_root, grain=4), (X[:, :1], spiked)


def train(precision: str, at: set[int], run: str | None = None) -> list[ab.Step]:
    model, objective, data = with_spikes(at)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    order = ab.Order(12, batch_size=4, seed=3, shuffle=False)
    result = []
    before = [t.clone() for t in model.state_dict().values()]
    for step in ab.steps(
        model, objective, optimizer, data, order=order, epochs=2, precision=precision, run=run
    ):
        now = [t.clone() for t in model.state_dict().values()]
        same = all(torch.equal(a, b) for a, b in zip(before, now, strict=True))
        assert same == step.is_skipped  # buffers included
        before = now
        result.append(step)
    return result


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_an_update_that_is_not_finite_is_skipped_and_recorded(precision: str, tmp_path) -> None:
    result = train(precision, at={5}, run=str(tmp_path / "run"))
    assert [step.is_skipped for step in result] == [False, True, False] * 2
    rows = [r for r in read_records(tmp_path / "run" / "records.jsonl") if r["kind"] == "step"]
    assert [row.get("skipped", False) for row in rows] == [False, True, False] * 2
    assert not any(step.is_skipped for step in train(precision, at=set()))  # the control


def test_the_loss_scale_halves_and_doubles_and_is_carried_on() -> None:
    scale = ab.LossScale("float16", every=3)
    assert scale.value == 2.0**16
    scale.note(is_finite=False, step=0)
    assert scale.value == 2.0**15
    for step in (1, 2):
        scale.note(is_finite=True, step=step)
    later = ab.LossScale("float16", every=3)
    later.load_state_dict(scale.state_dict())
    later.note(is_finite=True, step=3)
    assert later.value == 2.0**16
    for precision in ("float32", "bfloat16"):
        constant = ab.LossScale(precision)
        constant.note(is_finite=False, step=0)
        assert constant.value == 1.0


def test_a_resumed_run_goes_on_with_its_loss_scale(tmp_path) -> None:
    def weights(stop_after: int | None, folder: str) -> Tensor:
        model, objective, data = with_spikes({5})
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        order = ab.Order(12, batch_size=4, seed=3, shuffle=False)
        loop = ab.steps(
            model,
            objective,
            optimizer,
            data,
            order=order,
            epochs=2,
            precision="float16",
            run=ab.Run(tmp_path / folder, checkpoint_every=1),
        )
        for number, _ in enumerate(loop, 1):
            if number == stop_after:
                break
        loop.close()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    whole = weights(None, "whole")
    weights(4, "cut")
    assert torch.equal(weights(None, "cut"), whole)


def test_a_loop_of_ones_own_scales_as_steps_does() -> None:
    def vector(model: nn.Module) -> Tensor:
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    def by_hand(scale: ab.LossScale | None) -> Tensor:
        model, objective, (x, spiked) = with_spikes({5})
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for t in range(6):
            rows = slice(t % 3 * 4, t % 3 * 4 + 4)
            gradient = ab.batch_gradient(
                model,
                objective,
                (x[rows], spiked[rows]),
                key=ab.Key(3, t),
                precision="float16",
                loss_scale=1.0 if scale is None else scale.value,
            )
            if gradient.is_finite:
                optimizer.step()
            if scale is not None:
                scale.note(gradient.is_finite)
        return vector(model)

    model, objective, data = with_spikes({5})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    order = ab.Order(12, batch_size=4, seed=3, shuffle=False)
    list(ab.steps(model, objective, optimizer, data, order=order, epochs=2, precision="float16"))
    assert torch.equal(by_hand(ab.LossScale()), vector(model))
    assert not torch.equal(by_hand(None), vector(model))  # the control


def test_updates_that_are_all_skipped_are_a_divergence() -> None:
    model, objective, data = with_spikes(set(range(12)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    order = ab.Order(12, batch_size=4, seed=3)
    loop = ab.steps(model, objective, optimizer, data, order=order, epochs=20)
    with pytest.raises(DivergenceError, match="32 updates in a row, up to step 31, were not"):
        list(loop)


def test_another_precision_is_refused() -> None:
    for call in (
        lambda: ab.batch_gradient(net(), ab.Objective(losses), (X, Y), precision="float8"),
        lambda: ab.evaluate(net(), ab.Objective(losses), (X, Y), precision="float8"),
    ):
        with pytest.raises(ModelError, match=r"'float8'\. It must be one of float32"):
            call()


def test_a_run_cannot_go_on_in_another_precision(tmp_path) -> None:
    train("bfloat16", set(), run=str(tmp_path / "run"))
    with pytest.raises(RunError, match="precision = 'bfloat16', and cannot go on with"):
        train("float32", set(), run=str(tmp_path / "run"))
