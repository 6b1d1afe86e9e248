"""`order.sampler`: the batches of an order, for a torch DataLoader.

Oracle: `order.indices(step)`, which has its own tests against an order by hand.
"""

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import anybatch as ab

ORDERS = {
    "keep": ab.Order(23, batch_size=5, seed=3),
    "carry": ab.Order(23, batch_size=5, seed=3, last="carry"),
    "drop": ab.Order(23, batch_size=5, seed=3, last="drop"),
    "sorted": ab.Order(23, batch_size=5, shuffle=False),
    "by length": ab.ByLength([3, 9, 1, 4] * 6, batch_size=4, seed=1),
    "weighted": ab.Weighted([1.0, 2.0] * 10, batch_size=6, seed=2),
    "growing": ab.Growing(40, sizes=[(0, 4), (24, 8)], seed=1),
}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_each_iteration_is_an_epoch(order):
    sampler, step = order.sampler(), 0
    for epoch in range(3):
        number = len(sampler)
        batches = list(sampler)
        assert len(batches) == number > 0
        for ids in batches:
            assert ids == order.indices(step).tolist()
            assert order.epoch(step) == epoch
            step += 1
        assert order.epoch(step) == epoch + 1


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_the_shares_of_the_ranks_are_the_batch(order, num_ranks):
    samplers = [order.sampler(rank=r, num_ranks=num_ranks, start=1) for r in range(num_ranks)]
    epoch = list(zip(*samplers, strict=True))
    assert len(epoch) == len(order.sampler(start=1))
    for step, shares in enumerate(epoch, start=1):
        assert [i for share in shares for i in share] == order.indices(step).tolist()
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_another_number_of_ranks_goes_on_from_any_step():
    order = ORDERS["carry"]
    sampler = order.sampler(rank=1, num_ranks=2)
    read = iter(sampler)
    for _ in range(3):
        next(read)
    resumed = order.sampler()
    resumed.load_state_dict(sampler.state_dict())
    assert resumed.step == 3
    assert next(iter(resumed)) == order.indices(3).tolist()


def test_set_epoch_goes_to_its_first_step():
    order = ORDERS["keep"]  # 5 steps an epoch
    sampler = order.sampler(start=7)
    sampler.set_epoch(1)  # it lies there already
    assert sampler.step == 7
    sampler.set_epoch(3)
    assert sampler.step == 15
    sampler.set_epoch(0)
    assert next(iter(sampler)) == order.indices(0).tolist()


def test_set_epoch_of_batches_that_run_on_into_the_next_epoch():
    order = ORDERS["carry"]  # epoch 1 begins in the middle of step 4
    sampler = order.sampler()
    sampler.set_epoch(1)
    assert sampler.step == 5
    assert order.epoch(4) == 0
    assert order.epoch(5) == 1


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_data_loader_reads_the_batches(workers):
    order = ORDERS["keep"]
    data = TensorDataset(torch.arange(23))
    loader = DataLoader(data, batch_sampler=order.sampler(start=2), num_workers=workers)
    assert len(loader) == 3
    assert [batch.tolist() for (batch,) in loader] == [
        order.indices(step).tolist() for step in (2, 3, 4)
    ]
    assert len(list(loader)) == 5  # the next epoch


def test_an_order_of_ones_own():
    class Backwards:
        seed = 0

        def indices(self, step):
            return torch.tensor([9 - 2 * (step % 5), 8 - 2 * (step % 5)])

        def num_steps(self, epochs):
            return 5 * epochs

        def epoch(self, step):
            return step // 5

        def examples_before(self, step):
            return 2 * step

    from anybatch.order.sampler import BatchSampler

    assert next(iter(BatchSampler(Backwards(), rank=1, num_ranks=2))) == [8]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 2, "num_ranks": 2}, "rank is 2 of 2 ranks"),
        ({"rank": -1}, "rank is -1"),
        ({"num_ranks": 0}, "num_ranks is 0"),
        ({"start": -1}, "start is -1"),
        ({"start": 1.5}, "start is 1.5"),
    ],
    ids=str,
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(ab.errors.OrderError, match=message):
        ORDERS["keep"].sampler(**arguments)


def test_a_batch_with_fewer_examples_than_ranks_is_refused():
    order = ab.Order(21, batch_size=5)
    sampler = order.sampler(rank=0, num_ranks=2, start=4)
    with pytest.raises(ab.errors.OrderError, match=r"step 4 is smaller \(1\) than"):
        next(iter(sampler))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")  # torchdata 0.11
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("read", [1, 3, 5, 7])
def test_a_stateful_loader_goes_on_in_the_middle_of_an_epoch(workers, read):
    torchdata = pytest.importorskip("torchdata.stateful_dataloader", reason="torchdata is missing")
    order = ORDERS["keep"]  # 5 steps an epoch
    data = TensorDataset(torch.arange(23))

    def make():
        return torchdata.StatefulDataLoader(
            data, batch_sampler=order.sampler(), num_workers=workers, snapshot_every_n_steps=1
        )

    loader, batches = make(), []
    while len(batches) < read:
        for (batch,) in loader:
            batches.append(batch.tolist())
            if len(batches) == read:
                state = loader.state_dict()
                break
    resumed = make()
    resumed.load_state_dict(state)
    for _ in range(2):
        batches += [batch.tolist() for (batch,) in resumed]
    assert batches == [order.indices(step).tolist() for step in range(len(batches))]
    assert len(batches) >= 10
