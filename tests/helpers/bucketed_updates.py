"""Updates whose buckets are sent while the last backward pass runs; see test_buckets.py.

12 examples in grains of 2, float32, a bucket for each parameter. The last grain of one rank, the
culprit, is what goes wrong, between the second and the first layer on the way back.
"""

import pickle
import time
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

import anybatch as ab
from anybatch import distributed
from anybatch.gradient import buckets, pairwise_sum, survey
from anybatch.gradient.auto_micro_batch import PeakBytes
from anybatch.gradient.buckets import Buckets
from anybatch.gradient.passes import Accumulator
from anybatch.gradient.tree_accumulator import TreeAccumulator

SHARES = {2: (8, 4), 4: (4, 0, 6, 2)}
EMPTY = {2: (12, 0), 4: (0, 6, 0, 6)}
CULPRIT = {2: 1, 4: 2}
MARKED = {2: 10, 4: 8}  # an example of the culprit's last grain
WIDE = 400  # of the layers whose memory is looked at
RUNS = ((4, 4), (7, 6))  # grains of two ranks, which come to 1 node each, and to 3 and 2
TOP = ab.TopFraction(0.5)


class OutOfLuck(RuntimeError):
    """An error of the user's own."""


class Trap(torch.autograd.Function):
    """Identity whose backward pass runs a callback."""

    @staticmethod
    def forward(ctx, x, happen):
        ctx.happen = happen
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.happen()
        return gradient, None


class Model(nn.Module):
    """Three layers, and a factor; `happen` before the first, on the way back of a marked grain."""

    def __init__(self, happen=None, again=None):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 1)
        self.factor = nn.Parameter(torch.tensor(1.5))
        self.happen, self.again, self.passes = happen, again, 0

    def forward(self, x, marked):
        self.passes += 1
        x = self.first(x).tanh()
        if marked and self.happen is not None:
            x = Trap.apply(x, self.happen)
        x = self.second(x)
        if marked and self.again is not None:
            x = self.again(self.second, x)
        return self.factor * self.third(x)[:, 0]


def data():
    """Inputs of several orders of magnitude, weights, and places."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(12, 6, generator=generator) * 10.0 ** torch.arange(-2, 1).repeat(2)
    return inputs, torch.ones(12), torch.arange(12)


def update(
    group,
    model=None,
    *,
    marked=-1,
    shares=SHARES,
    reduction=None,
    batch=None,
    is_late=False,
    **options,
):
    """Return the bits of an update; without a group those of one process."""

    def losses(model, batch):
        inputs, weights, places = batch
        return weights * model(inputs, bool((places == marked).any())).square()

    model, share = model or Model(), batch or data()
    objective = ab.Objective(losses, reduction or ab.Mean(), ab.L2(0.01), grain=2)
    if is_late:
        survey.get_facts(model, losses, survey.survey_model(model).mode).comes_in_portions = True
    if group is not None:
        rank, sizes = distributed.get_rank(group), shares[distributed.get_num_ranks(group)]
        start = sum(sizes[:rank])
        share = tuple(column[start : start + sizes[rank]] for column in share)
    ab.batch_gradient(model, objective, share, group=group, bitwise=True, **options)
    return b"".join(p.grad.numpy().tobytes() for p in model.parameters())


def raise_late():
    raise OutOfLuck("on the way back")


def raise_no_memory():
    raise torch.OutOfMemoryError("too much")


def light(world):
    """Return a batch whose weights keep the culprit's last grain out of the top fraction."""
    inputs, weights, places = data()
    for at in (MARKED[world], MARKED[world] + 1):
        weights[at] = 1e-6
    return inputs, weights, places


class Sparse(nn.Module):
    """Leaves a sparse gradient."""

    def __init__(self):
        super().__init__()
        self.rows = nn.Embedding(12, 3, sparse=True)

    def forward(self, x, marked):
        return self.rows(x[:, 0].abs().long()).sum(1)


def reentrant(layer, x):
    """A layer used twice more, whose gradient comes in three portions."""
    return checkpoint(layer, checkpoint(layer, x, use_reentrant=True), use_reentrant=True)


def plainly(layer, x):
    return layer(layer(x))


def forgetful():
    """Return a patch that ignores late gradients, for the control."""
    blind = property(lambda self: False, lambda self, result: None)
    return mock.patch.object(TreeAccumulator, "_in_portions", blind, create=True)


def late_on_one(group):
    """One rank sends nothing before its pass has ended."""
    return update(group, is_late=distributed.get_rank(group) == 0)


FAILS = {
    "on the way back": lambda world, group: update(group, Model(raise_late), marked=MARKED[world]),
    "on the way back, two passes": lambda world, group: update(
        group, Model(raise_late), marked=MARKED[world], reduction=ab.Tilted(0.1)
    ),
    "draws torch": lambda world, group: update(
        group, Model(lambda: torch.rand(1)), marked=MARKED[world]
    ),
    "draws NumPy": lambda world, group: update(
        group,
        Model(lambda: np.random.rand()),  # noqa: NPY002
        marked=MARKED[world],
    ),
    "out of memory": lambda world, group: update(
        group, Model(raise_no_memory), marked=MARKED[world], layout=ab.Layout("auto")
    ),
    "sparse": lambda world, group: update(group, Sparse()),
}
WORKS = {  # and what has the same bits, in one process
    "shares": (lambda world, group: update(group), lambda world: update(None)),
    "empty shares": (lambda world, group: update(group, shares=EMPTY), lambda world: update(None)),
    "two passes": (
        lambda world, group: update(group, reduction=TOP),
        lambda world: update(None, reduction=TOP),
    ),
    "last part skipped": (
        lambda world, group: update(group, reduction=TOP, batch=light(world)),
        lambda world: update(None, reduction=TOP, batch=light(world)),
    ),
    "auto": (
        lambda world, group: update(group, layout=ab.Layout("auto")),
        lambda world: update(None),
    ),
    "observed": (
        lambda world, group: update(group, observe=ab.Observe()),
        lambda world: update(None, observe=ab.Observe()),
    ),
    "grain norms": (
        lambda world, group: update(group, observe=ab.Observe(norms=False, grain_norms=True)),
        lambda world: update(None),
    ),
    "one rank sends late": (lambda world, group: late_on_one(group), lambda world: update(None)),
}


def count_calls(work):
    """Return the result, the number of buckets sent in a backward pass, and of all buckets."""
    messages, send = [], Buckets.send

    def counting(self, nodes):
        messages.append(torch._C._current_graph_task_id() != -1)
        send(self, nodes)

    with mock.patch.object(Buckets, "send", counting):
        return work(), sum(messages), len(messages)


def catch_error(work):
    """Return the error and its notes."""
    try:
        work()
    except Exception as error:
        return type(error).__name__, str(error), getattr(error, "__notes__", [])


def in_portions(world, group):
    """Bits and forward passes of two updates, and the bits where nobody looks.

    A mark on one example changes its whole grain, which the self-check would refuse.
    """
    model, how = Model(again=reentrant), {"marked": MARKED[world], "self_check": False}
    result = [(update(group, model, **how), model.passes) for _ in range(2)]
    with forgetful():
        return result, update(group, Model(again=reentrant), **how)


def height(group, shares):
    """Bytes at the height of an update of a wide model, in gradients."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(WIDE, WIDE, bias=False) for _ in range(8)))
    objective = ab.Objective(lambda m, x: m(x).square().sum(1), grain=1)
    contents = shares[distributed.get_rank(group)]
    if group is not None:
        distributed.call_together(lambda: None, group)
    with PeakBytes() as memory:
        ab.batch_gradient(model, objective, torch.ones(contents, WIDE), group=group, bitwise=True)
    return memory.peak / sum(p.nbytes for p in model.parameters())


def work(group):
    """Return the outcome of each update by name and number of ranks, pickled."""
    rank, results = distributed.get_rank(group), {}
    groups = {world: dist.new_group(list(range(world))) for world in SHARES}
    with mock.patch.object(pairwise_sum, "BUCKET_BYTES", 1):
        for world in [world for world in SHARES if rank < world]:
            local = groups[world]
            for name, attempt in FAILS.items():
                results[name, world] = (
                    catch_error(lambda a=attempt, w=world, o=local: a(w, o)),
                    update(local),
                )
            for name, (attempt, _) in WORKS.items():
                results[name, world] = count_calls(lambda a=attempt, w=world, o=local: a(w, o))
            results["in portions", world] = in_portions(world, local)
    if rank < 2:
        with mock.patch.object(buckets, "_MESSAGE_BYTES", 1):
            results["height"] = [height(groups[2], shares) for shares in RUNS]
        with (
            mock.patch.object(TreeAccumulator, "backward_passes", Accumulator.backward_passes),
            mock.patch.object(buckets, "_NUM_BUCKETS", 1),
        ):
            results["height of all at once"] = [height(groups[2], shares) for shares in RUNS]
    return pickle.dumps(results)


def hang(folder, group):
    """Let the culprit hang in its last backward pass; write down the error of the others."""

    def sleep_for_ever():
        while True:
            time.sleep(1)

    try:
        update(group, Model(sleep_for_ever), marked=MARKED[2])
    except distributed.RankError as error:
        (folder / str(distributed.get_rank(group))).write_text(str(error))
        raise
