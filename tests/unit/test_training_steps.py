"""`steps` against a training loop written out in plain torch.

Everything is float64; 1e-12 allows for another order of summation, not for another formula.
"""

import time
from dataclasses import replace

import pytest
import torch
from torch import nn

import anybatch as ab
from training_by_hand import (
    OBJECTIVE,
    ORDER,
    N,
    by_hand,
    data,
    distance,
    example_losses,
    groups,
    network,
    run,
    sgd,
    weights,
)


@pytest.mark.parametrize(
    "make",
    [
        lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        lambda model: torch.optim.AdamW(model.parameters(), lr=0.01),
        lambda model: torch.optim.RMSprop(groups(model), lr=0.01),
    ],
)
def test_steps_train_as_a_loop_by_hand(make):
    model = network()
    assert distance(run(model, make(model)), by_hand(make)) < 1e-12


def test_a_loop_that_accumulates_ends_elsewhere():
    """Control: what a gradient that is not replaced would do."""
    assert distance(by_hand(sgd, accumulates=True), by_hand(sgd)) > 0.1


def test_two_loops_after_each_other_double_nothing():
    model = network()
    optimizer = sgd(model)
    run(model, optimizer, epochs=1)
    for p in model.parameters():
        p.grad += 1e3  # left behind by anybody
    run(model, optimizer, epochs=1)
    expected = by_hand(sgd, order=[0, 1, 2, 0, 1, 2])
    assert distance(weights(model), expected) < 1e-12


def test_the_names_of_the_documentation_work_as_written_there(tmp_path):
    model, examples = network(), data()
    optimizer = sgd(model)
    dataset = torch.utils.data.TensorDataset(*examples)
    for step in ab.steps(model, OBJECTIVE, optimizer, dataset,
                         order=ab.Order(len(dataset), batch_size=8, seed=0), epochs=2,
                         layout=ab.Layout(micro_batch=4), clip=ab.ClipNorm(1.0),
                         collate=torch.utils.data.default_collate,
                         transform=lambda example, key: example,
                         schedule=ab.Constant(0.1), state={"model": model},
                         run=tmp_path / "run"):  # fmt: skip
        assert isinstance(step, ab.Step)
    assert (step.step, step.epoch, step.examples, step.lr) == (5, 1, 46, 0.1)
    assert step.gradient.num_examples == 7


LAYOUTS = [
    ab.Layout(micro_batch=7),
    ab.Layout(micro_batch=1),
    ab.Layout("auto"),
    ab.Layout("auto", memory_bytes=2000),
]


@pytest.mark.fast(1)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("reduction", [ab.Mean(), ab.Tilted(0.5)])
def test_no_layout_changes_the_weights_after_fifty_steps(layout, reduction):
    objective, ends, sizes = ab.Objective(example_losses, reduction, ab.L2(0.01)), [], []
    order = ab.Order(N, batch_size=8, seed=4, last="carry")
    for cut in (None, layout):
        model = network()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        options = {"objective": objective, "order": order, "layout": cut, "epochs": 18}
        steps = []
        ends.append(run(model, optimizer, body=steps.append, **options))
        sizes.append({step.gradient.micro_batch for step in steps})
    assert len(steps) == 51
    assert distance(*ends) < 1e-12
    expected = {"auto": {8}, 7: {7}, 1: {1}}[layout.micro_batch]
    if layout.memory_bytes is not None:
        assert max(sizes[1]) < 8  # it has been cut
    else:
        assert sizes == [{8}, expected]


def test_a_short_batch_does_not_make_auto_cut_the_next():
    model, sizes = network(), []

    def losses(model, batch):
        sizes.append(len(batch[0]))
        return example_losses(model, batch)

    options = {
        "objective": ab.Objective(losses),
        "order": ab.Order(N, batch_size=11, seed=4),  # batches of 11, 11 and 1
        "layout": ab.Layout("auto"),
    }
    run(model, sgd(model), epochs=3, **options)
    assert sizes[-6:] == [11, 11, 1] * 2


def test_dropout_in_grains_has_the_same_bits_in_every_layout():
    ends = []
    for micro_batch in (None, 4, 8, "auto"):
        model = network(dropout=0.5)
        optimizer = sgd(model)
        objective = replace(OBJECTIVE, grain=4)
        ends.append(run(model, optimizer, objective=objective, layout=ab.Layout(micro_batch)))
    assert all(torch.equal(end, ends[0]) for end in ends)
    other = network(dropout=0.5)  # control: other keys, other weights
    optimizer = sgd(other)
    order = ab.Order(N, batch_size=8, seed=5)
    end = run(other, optimizer, objective=replace(OBJECTIVE, grain=4), order=order)
    assert distance(end, ends[0]) > 1e-3


def test_the_global_generators_are_left_alone():
    model = network(dropout=0.5)
    before = torch.get_rng_state()
    run(model, sgd(model))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_schedule_is_a_function_of_the_examples_used_and_groups_keep_their_proportion():
    schedule = ab.WarmUp(ab.StepDecay(0.1, 0.5, every=16), examples=30)

    def make(model):
        return torch.optim.SGD(groups(model), lr=0.1, momentum=0.9)

    model, history = network(), []
    optimizer = make(model)

    def body(step):
        history.append((step.examples, step.lr, optimizer.param_groups[1]["lr"]))

    end = run(model, optimizer, schedule=schedule, body=body)
    assert distance(end, by_hand(make, schedule)) < 1e-12
    sizes = [8, 8, 7] * 4
    before = [sum(sizes[:step]) for step in range(12)]
    assert [examples for examples, _, _ in history] == [sum(sizes[: s + 1]) for s in range(12)]
    assert [lr for _, lr, _ in history] == [schedule(examples) for examples in before]
    assert all(twice == 2 * lr for _, lr, twice in history)


def test_without_a_schedule_the_rates_are_the_users():
    model, history = network(), []
    optimizer = torch.optim.SGD(groups(model), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    def body(step):
        history.append([step.lr, optimizer.param_groups[1]["lr"]])
        scheduler.step()

    run(model, optimizer, epochs=1, body=body)
    assert history == [[0.1, 0.2], [0.05, 0.1], [0.025, 0.05]]


def test_a_rate_kept_in_a_tensor_is_told_as_a_number(tmp_path):
    model, history = network(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=torch.tensor(0.5))
    run(model, optimizer, epochs=1, body=lambda step: history.append(step.lr), run=tmp_path)
    assert history == [0.5] * 3


def test_epochs_end_where_the_next_update_belongs_to_another():
    for last, expected in [
        ("keep", [False, False, True] * 2),
        ("drop", [False, True] * 2),
        ("carry", [False, False, True, False, True]),  # epoch 1 begins at example 23, in step 2
    ]:
        model, history = network(), []
        optimizer = sgd(model)
        order = ab.Order(N, batch_size=8, last=last)
        run(model, optimizer, epochs=2, order=order, body=lambda s: history.append(s.ends_epoch))  # noqa: B023
        assert history == expected


def test_seconds_count_from_fetching_the_batch():
    class Slow:
        def __len__(self):
            return N

        def __getitem__(self, index):
            time.sleep(0.005)
            return tuple(part[index] for part in data())

    model, history = network(), []
    optimizer = sgd(model)

    def body(step):
        history.append(step.seconds)
        time.sleep(0.2)

    run(model, optimizer, epochs=1, data=Slow(), body=body)
    assert min(history[:2]) > 0.04
    assert sorted(history)[1] < 0.2  # the body's time is the user's; one may meet a busy machine


def pad(rows):
    inputs = nn.utils.rnn.pad_sequence([x for x, _ in rows], batch_first=True)
    lengths = torch.tensor([len(x) for x, _ in rows])
    return inputs, torch.stack([y for _, y in rows]), lengths


def test_collate_pads_each_micro_batch_to_its_own_and_masked_padding_changes_nothing():
    def losses(model, batch):
        inputs, targets, lengths = batch
        shapes.append(tuple(inputs.shape[:2]))
        mask = torch.arange(inputs.shape[1]) < lengths[:, None]
        errors = (model(inputs).sum(-1) - targets[:, None]).square()
        return ab.ExampleLosses((errors * mask).sum(1), counts=mask.sum(1))

    generator = torch.Generator().manual_seed(3)
    lengths = [1 + i * 7 % 5 for i in range(N)]
    rows = [
        (torch.randn(n, 5, generator=generator, dtype=torch.float64), torch.tensor(1.0))
        for n in lengths
    ]
    ends, expected = [], {}
    for micro_batch in (8, 3, 1):
        model, shapes = network(), []
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        options = {"objective": ab.Objective(losses), "data": rows, "collate": pad}
        layout = ab.Layout(micro_batch)
        ends.append(run(model, optimizer, epochs=1, layout=layout, **options))
        cuts = [ids for t in range(3) for ids in ORDER.indices(t).split(micro_batch)]
        expected = [(len(ids), max(lengths[i] for i in ids)) for ids in cuts]
        assert shapes == expected
    assert max(distance(end, ends[0]) for end in ends) < 1e-12
