"""Compare the figures of a page with plain autograd, one example after the other, in float64.

Where nothing else is said, figures agree to 1e-9, relative: both sides round in float64, where a
sum of 1e5 products is good to some 1e-11.
"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import anybatch as ab
from anybatch.questions import compute_worked_batch
from anybatch.recipe.build import build
from anybatch.recipe.runs import read_run_recipe
from anybatch.report import evidence, pairs
from anybatch.report.replay import restore_position
from anybatch.report.runs import explain_run
from anybatch.runs.digest import digest
from explain_by_hand import (
    LENET,
    OBSERVED,
    distance,
    each_gradient,
    flat,
    rows,
    train_run,
    under,
    unpack,
)

EXACT = 1e-9
STEP = 43  # three updates after a checkpoint


class Case:
    """A page of one update of a run, and the same by hand."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.report = explain_run(folder, step=STEP)[0].sections
        place = restore_position(folder, STEP, allow_code=False)
        self.model, self.optimizer = place.setup.model, place.setup.optimizer
        self.ids = place.setup.order.indices(STEP)
        self.inputs, self.targets = (c[self.ids] for c in place.setup.data.columns)
        self.each = each_gradient(self.model, self.inputs, self.targets)
        self.rows = rows(self.each)
        self.mean = self.rows.mean(0)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(train_run(tmp_path_factory.mktemp("explain"), **OBSERVED))


def test_every_example_has_its_loss_norm_angle_and_share(case: Case) -> None:
    figures = case.report["examples"]
    losses = F.cross_entropy(case.model(case.inputs), case.targets, reduction="none")
    norms = case.rows.norm(dim=1)
    cosines = case.rows @ case.mean / (norms * case.mean.norm())
    share = case.rows @ case.mean / 24 / case.mean.norm() ** 2
    assert figures["ids"] == case.ids.tolist()
    assert figures["labels"] == [str(y) for y in case.targets.tolist()]
    assert distance(unpack(figures["terms"][0]["losses"]), losses.detach()) < EXACT
    assert distance(unpack(figures["terms"][0]["coefficients"]), np.full(24, 1 / 24)) < EXACT
    assert distance(unpack(figures["norms"]), norms) < EXACT
    assert distance(unpack(figures["angles"]), cosines.acos().rad2deg()) < 1e-6  # in float32
    assert distance(unpack(figures["share"]), share) < EXACT
    assert unpack(figures["share"]).sum() == pytest.approx(1, abs=EXACT)


def test_what_cancels_is_the_length_of_the_sum_against_the_sum_of_the_lengths(case: Case) -> None:
    figures = case.report["examples"]["cancelled"]
    assert figures["sum"] == pytest.approx(float(case.mean.norm()), rel=EXACT)
    assert figures["lengths"] == pytest.approx(float(case.rows.norm(dim=1).mean()), rel=EXACT)
    wrong = float(case.rows.mean(0).abs().sum())  # the control: another norm is told apart
    assert abs(figures["sum"] - wrong) > 0.1 * wrong
    for row in figures["parameters"]:
        each_row = torch.stack([one[row["name"]].flatten() for one in case.each])
        assert row["sum"] == pytest.approx(float(each_row.mean(0).norm()), rel=EXACT)
        assert row["lengths"] == pytest.approx(float(each_row.norm(dim=1).mean()), rel=EXACT)


def test_inner_products_of_all_pairs_by_parameter(case: Case) -> None:
    figures = case.report["pairs"]
    inner = unpack(figures["inner"])
    assert figures["places"] == list(range(24))
    by_hand = []
    for i in range(24):
        for j in range(i + 1):
            a, b = case.each[i], case.each[j]
            by_hand.append([float((a[name] * b[name]).sum()) for name in figures["parameters"]])
    assert distance(inner, by_hand) < EXACT
    assert distance(inner[::-1], by_hand) > 0.01  # the control: another order of pairs


def test_single_weights_of_each_example_and_of_each_stage(case: Case) -> None:
    weights, gradients = case.report["weights"], unpack(case.report["pairs"]["gradients"])
    column = 0
    for one in weights["parameters"]:
        for index in one["places"]:
            by_hand = [float(each[one["name"]][tuple(index)]) for each in case.each]
            assert distance(gradients[:, column], by_hand) < EXACT
            w = dict(list_parameters(case))[one["name"]].detach()
            assert unpack(weights["before"])[column] == float(w[tuple(index)])
            assert unpack(weights["data"])[column] == pytest.approx(np.mean(by_hand), rel=1e-6)
            column += 1
    assert column == gradients.shape[1]
    first = weights["parameters"][0]
    largest = sum(each[first["name"]].abs() for each in case.each)
    assert tuple(first["places"][0]) == tuple(
        int(k) for k in np.unravel_index(int(largest.argmax()), largest.shape)
    )


REDUCTIONS = {
    "Mean": lambda v: v.mean(),
    "Sum": lambda v: v.sum(),
    "Max": lambda v: v.max(),
    "TopFraction(q=0.5)": lambda v: v.sort(descending=True).values[:12].mean(),
    "Tilted(t=1.0)": lambda v: v.exp().mean().log(),
}


@pytest.mark.parametrize("name", REDUCTIONS)
def test_the_batch_under_every_reduction(case: Case, name: str) -> None:
    row = next(row for row in case.report["reductions"]["rows"] if row["name"] == name)
    losses = F.cross_entropy(case.model(case.inputs), case.targets, reduction="none").detach()
    gradient = under(case.model, case.inputs, case.targets, REDUCTIONS[name])
    cosine = gradient @ case.mean / (gradient.norm() * case.mean.norm())
    assert row["value"] == pytest.approx(float(REDUCTIONS[name](losses)), rel=EXACT)
    assert row["norm"] == pytest.approx(float(gradient.norm()), rel=EXACT)
    assert row["ratio"] == pytest.approx(float(gradient.norm() / case.mean.norm()), rel=EXACT)
    angle = float(cosine.clamp(-1, 1).acos().rad2deg())
    assert row["angle"] == pytest.approx(angle, abs=0.05)  # float32; acos is steep near 1


def test_the_rate_that_makes_sum_and_mean_equal_makes_the_same_step(case: Case) -> None:
    figures = case.report["reductions"]["compared"]
    rate, penalty = figures["rate"], figures["penalty"]
    by_mean = rate["mean"] * under(case.model, case.inputs, case.targets, REDUCTIONS["Mean"])
    by_sum = rate["sum"] * under(case.model, case.inputs, case.targets, REDUCTIONS["Sum"])
    assert rate["mean"] == 0.05
    assert distance(by_sum, by_mean) < EXACT
    assert figures["distance"] < EXACT
    contents = {n: 0.01 * w.detach() if n.endswith("weight") else torch.zeros_like(w)
            for n, w in case.model.named_parameters()}  # fmt: skip
    omega = flat(contents)
    unchanged = distance(24 * case.mean + omega, 24 * (case.mean + omega))
    assert penalty["norm"] == pytest.approx(float(omega.norm()), rel=EXACT)
    assert penalty["unchanged"] == pytest.approx(unchanged, rel=EXACT)
    assert penalty["times_count"] < EXACT < penalty["unchanged"]


def test_where_the_update_goes_is_what_momentum_makes_of_it(case: Case) -> None:
    velocity = {n: case.optimizer.state[w]["momentum_buffer"] for n, w in list_parameters(case)}
    for row in case.report["layers"]["rows"]:
        name = row["name"]
        data = torch.stack([each[name] for each in case.each]).mean(0)
        w = dict(list_parameters(case))[name].detach()
        update = data + (0.01 * w if name.endswith("weight") else 0)
        step = 0.05 * (0.9 * velocity[name] + update)
        assert row["data"] == pytest.approx(float(data.norm()), rel=EXACT)
        assert row["update"] == pytest.approx(float(update.norm()), rel=EXACT)
        assert row["step"] == pytest.approx(float(step.norm()), rel=1e-7)  # w' - w cancels
        assert row["relative"] == pytest.approx(float(step.norm() / w.norm()), rel=1e-7)
    parts = {part["name"]: part["value"] for part in case.report["layers"]["parts"]}
    contents = [w.detach() for name, w in list_parameters(case) if name.endswith("weight")]
    squares = sum(float(w.square().sum()) for w in contents)
    assert parts["L2"] == pytest.approx(0.005 * squares, rel=EXACT)
    assert case.report["about"]["loss"] == pytest.approx(sum(parts.values()), rel=EXACT)


def list_parameters(case: Case) -> list[tuple[str, torch.nn.Parameter]]:
    return list(case.model.named_parameters())


def test_a_picture_of_a_parameter_is_the_root_mean_square_of_its_blocks(case: Case) -> None:
    row = next(row for row in case.report["layers"]["rows"] if row["name"] == "5.weight")
    data = torch.stack([each["5.weight"] for each in case.each]).mean(0)
    update = (data + 0.01 * dict(list_parameters(case))["5.weight"].detach()).numpy()
    rows_, columns = row["picture"]["blocks"]
    pictured = unpack(row["picture"]["values"])
    for r, c in ((0, 0), (3, 7), (pictured.shape[0] - 1, pictured.shape[1] - 1)):
        block = update[r * rows_ : (r + 1) * rows_, c * columns : (c + 1) * columns]
        assert pictured[r, c] == pytest.approx(np.sqrt((block**2).mean()), rel=1e-5)  # float32


def test_winners_and_gradients_of_max_pooling(case: Case) -> None:
    x = case.model[0](case.inputs).detach().requires_grad_()
    loss = F.cross_entropy(case.model[1:](x), case.targets, reduction="sum")
    (arriving,) = torch.autograd.grad(loss, x)  # by autograd's own pooling
    layer = case.report["pooling"]["layers"][0]
    assert [one["layer"] for one in case.report["pooling"]["layers"]] == [
        "MaxPool2d 1",
        "MaxPool2d 3",
    ]
    winners, gradients = unpack(layer["winners"]), unpack(layer["gradients"])
    for at, i in enumerate(layer["places"]):
        for k, channel in enumerate(layer["channels"]):
            routed = np.zeros(64)
            np.add.at(routed, winners[at, k].ravel(), gradients[at, k].ravel())
            assert distance(routed, arriving[i, channel].flatten()) < EXACT
            visited = unpack(layer["inputs"])[at, k]
            assert distance(visited, x[i, channel].detach()) < 1e-3  # half precision
    wins = np.zeros((24, 64), bool)
    for i, image in enumerate(x[:, layer["channels"][0]].detach()):
        for r in range(0, 8, 2):
            for c in range(0, 8, 2):
                window = image[r : r + 2, c : c + 2].flatten()
                best = int((window == window.max()).nonzero()[0])  # of equals the first
                wins[i, (r + best // 2) * 8 + c + best % 2] = True
    assert (unpack(layer["chosen"])[0].ravel() == wins.sum(0)).all()
    wrong = distance(gradients[0, 0].repeat(4), arriving[0, layer["channels"][0]].flatten())
    assert wrong > 0.5  # the control: a gradient split over the window


def test_the_noise_scale_is_that_of_the_unbiased_estimates(case: Case) -> None:
    squares, square = case.rows.square().sum(1).sum(), case.mean.square().sum()
    trace = float((squares - 24 * square) / 23)
    signal = float(square) - trace / 24
    figures = case.report["noise"]
    if signal > 0 and figures["scale"]["value"] is not None and figures["scale"]["high"] < np.inf:
        assert figures["scale"]["value"] == pytest.approx(trace / signal, rel=1e-6)
    b = figures["scale"]["low"]
    assert b > 0
    row = next(row for row in figures["buys"] if row["size"] == 48)
    assert row["low"]["steps"] == pytest.approx(1 + b / 48, rel=EXACT)
    assert row["low"]["examples"] == pytest.approx(1 + 48 / b, rel=EXACT)
    assert row["low"]["off"] == pytest.approx((b / 48) ** 0.5, rel=EXACT)
    windows = figures["over_training"]
    assert (windows[0]["first"], windows[-1]["last"]) == (0, 59)
    assert sum(window["examples"] for window in windows) == 1438


def test_partial_sums_add_one_example_after_the_other(case: Case) -> None:
    figures = case.report["stages"]["partial"]
    sums = [float(case.rows[: k + 1].sum(0).norm()) / 24 for k in range(24)]
    lengths = [float(case.rows[: k + 1].norm(dim=1).sum()) / 24 for k in range(24)]
    assert distance(unpack(figures["sums"]), sums) < 1e-6  # in float32
    assert distance(unpack(figures["lengths"]), lengths) < 1e-6


def test_the_run_tells_the_same_loss_and_the_next_checkpoint_the_same_weights(case: Case) -> None:
    about = case.report["about"]
    assert about["recorded_loss"] == about["loss"]
    assert (about["base"], about["replayed"]) == (40, 3)
    last = explain_run(case.folder, step=59)[0].sections["weights"]
    selection = dict(
        restore_position(case.folder, 60, allow_code=False).setup.model.named_parameters()
    )
    assert distance(unpack(last["after"]), at(last["parameters"], selection)) < 1e-12


def test_updates_are_replayed_to_the_bit(case: Case, tmp_path: Path) -> None:
    before = restore_position(
        case.folder, 60, allow_code=False
    )  # from the checkpoint after 60 updates
    shutil.copytree(case.folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000000000060")
    again = restore_position(tmp_path / "run", 60, allow_code=False)  # from that after 40
    assert before.base is not None
    assert again.base is not None
    assert (before.base.step, again.base.step) == (60, 40)
    assert digest(before.state.dump()) == digest(again.state.dump())


def at(places: list[dict[str, Any]], parameters: dict[str, torch.nn.Parameter]) -> list[float]:
    """Return the weights at the places that a page shows."""
    return [
        float(parameters[one["name"]].detach()[tuple(i)]) for one in places for i in one["places"]
    ]


def test_a_run_without_the_checkpoint_begins_at_its_recipes_own_start(case: Case) -> None:
    place = restore_position(case.folder, 2, allow_code=False)
    fresh = build(read_run_recipe(case.folder), allow_code=False)
    assert place.base is None
    assert place.state.num_updates == 2
    first = explain_run(case.folder, step=0)[0].sections
    expected = at(first["weights"]["parameters"], dict(fresh.model.named_parameters()))
    assert unpack(first["weights"]["before"]).tolist() == expected


def test_the_compute_worked_batch_has_the_figures_of_the_first_question() -> None:
    figures = compute_worked_batch()
    assert figures["losses"] == pytest.approx([2, -2])
    assert figures["loss"] == pytest.approx(0, abs=1e-12)
    assert figures["norms"] == pytest.approx([8.43**0.5, 9.07**0.5])
    assert figures["mean"] == pytest.approx([1.35, 0.15, 0, -0.2, -0.8])
    assert figures["after"] == pytest.approx([-0.135, -0.015, 0, 3.22, -0.72])


def test_where_memory_is_short_the_examples_with_the_largest_share_are_kept(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_weights = sum(w.numel() for _, w in list_parameters(case))
    monkeypatch.setattr(evidence, "MAX_ELEMENTS", 6 * num_weights + 1)
    figures = explain_run(case.folder, step=STEP)[0].sections
    share = case.rows @ case.mean
    selection = sorted(share.abs().topk(6).indices.tolist())
    assert figures["pairs"]["places"] == selection
    each_row = case.rows[selection]
    rows_, columns = torch.tril_indices(6, 6)
    inner = unpack(figures["pairs"]["inner"]).sum(1)
    assert distance(inner, (each_row @ each_row.T)[rows_, columns]) < EXACT
    assert figures["stages"]["partial"] is None
    for before, now in zip(
        case.report["reductions"]["rows"], figures["reductions"]["rows"], strict=True
    ):  # now by a pass each
        assert now["norm"] == pytest.approx(before["norm"], rel=EXACT)
    monkeypatch.setattr(evidence, "MAX_ELEMENTS", num_weights)
    figures = explain_run(case.folder, step=STEP)[0].sections
    assert "do not fit in memory" in figures["pairs"]["why"]
    assert figures["weights"] is None


def test_a_page_holds_no_more_pairs_than_it_has_room_for(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pairs, "MAX_PRODUCTS", 8 * 50)  # by 8 parameters: for 10 examples
    figures = explain_run(case.folder, step=STEP)[0].sections["pairs"]
    selection = sorted((case.rows @ case.mean).abs().topk(10).indices.tolist())
    assert figures["places"] == selection
    each_row = case.rows[selection]
    inner = unpack(figures["inner"]).sum(1)
    assert distance(inner, (each_row @ each_row.T)[tuple(torch.tril_indices(10, 10))]) < EXACT


def test_without_shares_the_pairs_of_the_longest_gradients_are_kept(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pairs, "MAX_PRODUCTS", 8 * 50)
    objective = ab.Objective(lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="none"))
    observe = ab.Observe(gradients=True)
    gradient = ab.batch_gradient(
        case.model, objective, (case.inputs, case.targets), observe=observe
    )
    figures = ab.explain(gradient).sections["pairs"]
    assert figures["places"] == sorted(case.rows.norm(dim=1).topk(10).indices.tolist())


def test_classes_are_those_of_the_precision_that_the_run_has(tmp_path: Path) -> None:
    precision = {"dtype": "float32", "precision": "bfloat16"}
    run = train_run(tmp_path, run={**LENET["run"], **precision})
    place = restore_position(run, 10, allow_code=False)
    model, (inputs, targets) = place.setup.model.eval(), place.setup.data.columns

    def by_hand(ids: torch.Tensor, *, enabled: bool) -> torch.Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            return torch.cat([model(inputs[some]) for some in ids.split(256)])

    every = torch.arange(len(targets))
    each_row, plain = (by_hand(every, enabled=enabled).argmax(1) for enabled in (True, False))
    differ = (each_row != plain).nonzero().flatten()
    assert len(differ) > 5  # the control
    figures = explain_run(run, step=10, ids=differ)[0].sections
    assert figures["examples"]["predicted"] == [str(y) for y in each_row[differ].tolist()]
    held_out = place.setup.splits.held_out

    def losses(*, enabled: bool) -> list[float]:
        outputs, of = by_hand(held_out, enabled=enabled), targets[held_out]
        values = F.cross_entropy(outputs.float(), of, reduction="none")
        return [float(values[of == k].mean()) for k in range(10)]

    classes = figures["run"]["classes"]
    assert classes["count"] == torch.bincount(targets[held_out]).tolist()
    assert distance(classes["loss"], losses(enabled=True)) < 1e-6  # float32
    assert distance(classes["loss"], losses(enabled=False)) > 1e-5  # the control


def test_micro_batches_change_nothing_but_rounding(case: Case, tmp_path: Path) -> None:
    shutil.copytree(case.folder, tmp_path / "run")
    recipe = tmp_path / "run" / "recipe.toml"
    recipe.write_text(recipe.read_text().replace("[batch]", "[batch]\nmicro_batch = 7"))
    figures = explain_run(tmp_path / "run", step=STEP)[0].sections
    for key in ("norms", "share"):
        each_row = unpack(case.report["examples"][key])
        assert distance(unpack(figures["examples"][key]), each_row) < EXACT
