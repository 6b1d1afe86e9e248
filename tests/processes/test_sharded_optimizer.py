"""An optimiser's state in parts on the ranks: the bits of weights and state of the whole.

Oracle: the optimiser itself, whole, in this process; there is no tolerance. Parameters do not come
out even over the ranks, one has no dimension, one is a matrix in columns. Ranks are processes over
gloo, groups of 1, 2, 3 and 4 of them, started once.
"""

import pickle
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn

from anybatch import distributed
from anybatch.errors import ModelError
from anybatch.optim.zero import ShardedOptimizer, check_elementwise
from anybatch.runs.digest import digest
from anybatch.training.launch import launch

WORLDS = (1, 2, 3, 4)
SHAPES = ((3, 5), (), (17,), (2, 2, 3), (1,), (4, 6))
OPTIMIZERS = {
    "momentum": partial(torch.optim.SGD, momentum=0.9, nesterov=True),
    "plain": torch.optim.SGD,
    "AdamW": torch.optim.AdamW,
    "amsgrad": partial(torch.optim.Adam, amsgrad=True, weight_decay=0.1),
    "one at a time": partial(torch.optim.AdamW, foreach=False),
    "Adagrad": torch.optim.Adagrad,
    "RMSprop": partial(torch.optim.RMSprop, momentum=0.9, centered=True),
    "NAdam": torch.optim.NAdam,
}


class ByNorm(torch.optim.SGD):
    """Optimiser that needs the whole parameter."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad / (1 + p.grad.norm()), alpha=group["lr"])


def parameters():
    generator = torch.Generator().manual_seed(1)
    result = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    result[-1] = nn.Parameter(result[-1].detach().T.contiguous().T)
    result.append(nn.Parameter(torch.randn(7, generator=generator, dtype=torch.float64)))
    return result


def optimizer_of(name, weights):
    """Two groups, of which one has a rate of its own."""
    return OPTIMIZERS[name]([{"params": weights[:4]}, {"params": weights[4:], "lr": 0.3}], lr=0.1)


def apply_updates(weights, optimizer, updates):
    for update in updates:
        generator = torch.Generator().manual_seed(update)
        for p in weights:
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        optimizer.step()


def whole(name):
    """Run the unsharded optimiser over five updates; loading widens some state of NAdam's."""
    weights = parameters()
    optimizer = optimizer_of(name, weights)
    apply_updates(weights, optimizer, range(3))
    optimizer.load_state_dict(optimizer.state_dict())
    apply_updates(weights, optimizer, range(3, 5))
    return digest({"weights": [p.detach() for p in weights], "state": optimizer.state_dict()})


def in_parts(name, group):
    """Three updates, the state as a checkpoint has it taken up anew, and two more."""
    weights = parameters()
    optimizer = ShardedOptimizer(optimizer_of(name, weights), group)
    apply_updates(weights, optimizer, range(3))
    state = pickle.loads(pickle.dumps(optimizer.state_dict()))
    fresh = optimizer_of(name, weights)
    fresh.load_state_dict(state)
    optimizer = ShardedOptimizer(fresh, group)
    apply_updates(weights, optimizer, range(3, 5))
    num_elements = sum(
        t.numel() for one in fresh.state.values() for t in one.values() if torch.is_tensor(t)
    )
    result = {"weights": [p.detach() for p in weights], "state": optimizer.state_dict()}
    return digest(result), num_elements


def work(group):
    rank = distributed.get_rank(group)
    results = {}
    for world in WORLDS:
        subgroup = dist.new_group(list(range(world)))
        if rank < world:
            results |= {(name, world): in_parts(name, subgroup) for name in OPTIMIZERS}
    return pickle.dumps(results)


@pytest.fixture(scope="module")
def results():
    return list(map(pickle.loads, launch(work, 4, imports=["test_sharded_optimizer"])))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_parts_make_the_bits_of_the_whole(results, name):
    digests = {one[name, w][0] for one in results for w in WORLDS if (name, w) in one}
    assert digests == {whole(name)}


def test_another_update_has_other_bits():
    """Control."""
    assert whole("AdamW") != whole("amsgrad")


@pytest.mark.parametrize("name", ["momentum", "AdamW"])
def test_each_rank_holds_its_part_of_the_state_and_no_more(results, name):
    [alone] = [results[0][name, 1][1]]
    for world in WORLDS[1:]:
        counts = [results[rank][name, world][1] for rank in range(world)]
        assert alone <= sum(counts) <= alone + 2 * len(SHAPES) * world  # "step" is on each
        assert max(counts) <= alone / world + 2 * len(SHAPES)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_goes_element_by_element_is_taken(name):
    weights = parameters()
    optimizer = optimizer_of(name, weights)
    before = digest(optimizer.state_dict())
    check_elementwise(optimizer)
    assert digest(optimizer.state_dict()) == before
    assert all(torch.equal(a, b) for a, b in zip(weights, parameters(), strict=True))


def test_what_does_not_is_refused():
    with pytest.raises(ModelError, match="ByNorm updates a slice of a parameter in another way"):
        check_elementwise(ByNorm(parameters(), lr=0.1))
