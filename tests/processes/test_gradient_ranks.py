"""Ranks change neither the gradient nor the loss, and an error on one is an error on all.

Four processes over gloo take every scenario as groups of 1, 2 and 4 ranks, with ragged and empty
shares; they are started once. Oracle: `cases.oracle`, plain autograd on the unsplit batch in this
process. Tolerance: 1e-12 in float64, for sums in another order.
"""

import copy
import datetime
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import anybatch as ab
from anybatch.penalties import Penalty
from cases import PROBLEMS, SEED, STEP, Problem, distance, flat_gradient, oracle
from formulas import SCHEMES

KEY = ab.Key(SEED, STEP)
WORLDS = (1, 2, 4)
RAGGED = {1: (12,), 2: (8, 4), 4: (5, 0, 6, 1)}
GRAINS = {1: (12,), 2: (9, 3), 4: (3, 0, 6, 3)}
# problem, scheme, shares, and the micro-batch of each rank
SCENARIOS = {
    "one pass": ("tokens", "mean", RAGGED, (2, None, 3, 1)),
    "sum": ("convolution", "sum", RAGGED, (None, 2, None, 1)),
    "two passes": ("perceptron", "max", RAGGED, (2, None, 3, 1)),
    "terms": ("tokens", "terms", RAGGED, (2, None, 3, 1)),
    "contrastive": ("perceptron", "contrastive", RAGGED, (2, 3, None, 1)),
    "groups": ("layer norm", "group dro", RAGGED, (2, None, 3, 1)),
    "batch norm": ("batch norm", "mean", GRAINS, (3, None, None, 3)),
    "batch norm, two passes": ("batch norm", "tilted", GRAINS, (3, None, None, 3)),
    "dropout": ("dropout", "mean", GRAINS, (None, 3, 3, None)),
    "dropout, two passes": ("dropout", "top fraction", GRAINS, (None, 3, 3, None)),
}


def problem_of(name):
    problem_name, scheme_name, *_ = SCENARIOS[name]
    problem = PROBLEMS[problem_name](12, torch.float64, 7, range(3, 6))
    scheme = SCHEMES[scheme_name]
    return problem, scheme, scheme.tell or problem.tell


def share_of(batch, sizes, rank):
    start = sum(sizes[:rank])
    return tuple(leaf[start : start + sizes[rank]] for leaf in batch)


def outcome_of(name, rank, group, world):
    """Return what this rank has after two updates from the same weights, passing the state on."""
    problem, scheme, tell = problem_of(name)
    *_, shares, micro_batches = SCENARIOS[name]
    model = copy.deepcopy(problem.model)
    objective = ab.Objective(
        lambda model, batch: scheme.pack(tell(model, batch)),
        scheme.reduction,
        ab.L2(0.1, on="*weight*"),
        grain=problem.grain,
    )
    state, history = None, []
    for _ in range(2):
        result = ab.batch_gradient(
            model,
            objective,
            share_of(problem.batch, shares[world], rank),
            key=KEY,
            layout=ab.Layout(micro_batches[rank]),
            clip=ab.ClipNorm(0.5),
            ids=share_of((100 + torch.arange(12),), shares[world], rank)[0],
            reduction_state=state,
            group=group,
        )
        state, whole = result.reduction_state, result.gather()
        history.append(
            {
                "gradient": flat_gradient(model),
                "norm": result.norm,
                "loss": result.loss,
                "parts": dict(result.parts),
                "state": dict(state),
                "buffers": {name: b.clone() for name, b in model.named_buffers()},
                "examples": (result.num_examples, result.micro_batch),
                "own": (result.terms, dict(result.term_coefficients), result.ids),
                "gathered twice": whole.gather().ids,
                "gathered": (whole.terms, dict(whole.term_coefficients), whole.ids),
            }
        )
    return history


def failures(rank, group):
    """Return the error of each mistake on this rank: its type, text and notes."""
    results = {}
    for name, attempt in MISTAKES.items():
        try:
            attempt(rank, group)
            results[name] = None
        except Exception as error:
            results[name] = (type(error).__name__, str(error), getattr(error, "__notes__", []))
    return results


def update(rank, group, sizes=RAGGED[4], model=None, losses=None, batch=None, **options):
    objective = ab.Objective(
        losses or (lambda model, batch: model(batch[0])[:, 0]),
        options.pop("reduction", ab.Mean()),
        options.pop("penalty", None),
        grain=options.pop("grain", None),
    )
    batch = (torch.arange(36.0).reshape(12, 3),) if batch is None else batch
    share = share_of(batch, sizes, rank)
    return ab.batch_gradient(model or nn.Linear(3, 1), objective, share, group=group, **options)


class OutOfLuck(RuntimeError):
    """An error of the user's own."""


class Unlucky(Penalty):
    """Has no gradient."""

    def value(self, weight):
        return weight.sum()

    def add_gradient(self, weight, gradient):
        raise OutOfLuck("no gradient")


def unlucky(on, error):
    def losses(model, batch):
        values = model(batch[0])[:, 0]
        if (batch[0] == on).any():
            raise error
        return values

    return losses


def losses_of_draws_and_mistakes(model, batch):
    """Rank 0's examples draw, which calls for another attempt; rank 2's are a mistake."""
    values = model(batch[0])[:, 0]
    if (batch[0] == 0).any():
        return nn.functional.dropout(values, 0.5)
    raise OutOfLuck("after a draw elsewhere")


def with_nan(rank, group):
    x = torch.arange(36.0).reshape(12, 3)
    x[11] = torch.nan
    ids = share_of((100 + torch.arange(12),), RAGGED[4], rank)[0]
    update(rank, group, batch=(x,), ids=ids)


MISTAKES = {
    "user's error": lambda rank, group: update(
        rank, group, losses=unlucky(15, OutOfLuck("no such word"))
    ),
    "user's error in the second pass": lambda rank, group: update(
        rank, group, losses=only_with_grad(unlucky(15, OutOfLuck("late"))), reduction=ab.Tilted(0.1)
    ),
    "while memory is measured": lambda rank, group: update(
        rank, group, losses=unlucky(15, OutOfLuck("early")), layout=ab.Layout("auto")
    ),
    "two kinds": lambda rank, group: update(
        rank, group, losses=losses_of_draws_and_mistakes, key=KEY, grain=1, sizes=(5, 0, 5, 2)
    ),
    "draws without a key": lambda rank, group: update(
        rank, group, losses=losses_of_draws_and_mistakes
    ),
    "nan": with_nan,
    "sparse": lambda rank, group: update(
        rank,
        group,
        model=nn.Embedding(12, 3, sparse=True),
        losses=lambda model, batch: model(batch[0]).sum(1),
        batch=(torch.arange(12),),
    ),
    "ids": lambda rank, group: update(rank, group, ids=torch.arange(5)),
    "cut grain": lambda rank, group: update(
        rank,
        group,
        model=nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1)),
        grain=4,
        sizes=(4, 4, 2, 2),
    ),
    "seed and rank": lambda rank, group: update(rank, group, key=ab.Key(SEED + rank, 0)),
    "detached": lambda rank, group: update(
        rank, group, losses=lambda model, batch: model(batch[0])[:, 0].detach()
    ),
    "micro-batches": lambda rank, group: update(
        rank, group, layout=ab.Layout((1, 1) if rank == 2 else None)
    ),
    "observed on one rank": lambda rank, group: update(
        rank,
        group,
        model=nn.Linear(3, 1)
        if rank != 2
        else nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)),
        observe=ab.Observe(),
        key=KEY,
        grain=1,
    ),
    "penalty on one rank": lambda rank, group: update(
        rank, group, penalty=Unlucky(1.0) if rank == 2 else ab.L2(1.0)
    ),
    "all empty": lambda rank, group: update(rank, group, sizes=(0, 0, 0, 0)),
    "no mistake": lambda rank, group: update(rank, group),
}


def only_with_grad(losses):
    """Raises in passes with a graph alone: the second ones."""

    def wrap_model(model, batch):
        return losses(model, batch) if torch.is_grad_enabled() else model(batch[0])[:, 0] * 1.0

    return wrap_model


def auto(rank, group):
    """Memory runs out on rank 0 alone, above 2 examples."""
    tried = []

    def losses(model, batch):
        tried.append(len(batch[0]))
        if rank == 0 and len(batch[0]) > 2:
            raise torch.OutOfMemoryError("too much")
        return model(batch[0])[:, 0]

    model = nn.Linear(3, 1)
    nn.init.ones_(model.weight)
    result = update(rank, group, model=model, losses=losses, layout=ab.Layout("auto"))
    return {"gradient": model.weight.grad[0], "micro_batch": result.micro_batch, "tried": tried}


def work(rank, folder):
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 4)
    limit = datetime.timedelta(seconds=60)  # of waiting for a rank that has given up
    dist.init_process_group("gloo", store=store, rank=rank, world_size=4, timeout=limit)
    results = {}
    for world in WORLDS:
        group = dist.new_group(list(range(world)))
        for name in SCENARIOS if rank < world else ():
            results[name, world] = outcome_of(name, rank, group, world)
    results["failures"], results["auto"] = (
        failures(rank, dist.group.WORLD),
        auto(rank, dist.group.WORLD),
    )
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Return the results of each scenario, by rank."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    mp.spawn(work, args=(str(folder),), nprocs=4)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(4)]


def truth_of(name):
    problem, scheme, tell = problem_of(name)

    def formula(model, results):
        weights = [p for name, p in model.named_parameters() if "weight" in name]
        return scheme.formula(results) + 0.05 * sum(p.square().sum() for p in weights)

    return oracle(Problem(problem.model, problem.batch, tell, problem.grain), formula)


@pytest.mark.smoke
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", SCENARIOS)
def test_every_rank_has_the_gradient_of_the_unsplit_batch(results, name, world):
    truth = truth_of(name)
    clipped = truth.gradient * min(1, 0.5 / truth.gradient.norm())
    for rank in range(world):
        first = results[rank][name, world][0]
        assert distance(first["gradient"], clipped) < 1e-12
        assert first["norm"].item() == pytest.approx(truth.gradient.norm().item(), rel=1e-12)
        assert first["loss"].item() == pytest.approx(truth.loss.item(), rel=1e-12)
        for buffer, expected in truth.buffers.items():
            assert (first["buffers"][buffer] - expected).abs().max() < 1e-12


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", SCENARIOS)
def test_loss_parts_state_and_bits_are_the_same_on_every_rank(results, name, world):
    for update_number in range(2):
        first, *others = (results[rank][name, world][update_number] for rank in range(world))
        assert sum(first["parts"].values()).item() == pytest.approx(first["loss"].item())
        for other in others:
            assert torch.equal(other["gradient"], first["gradient"])
            for key in ("loss", "parts", "state", "buffers"):
                assert torch.equal(as_vector(other[key]), as_vector(first[key])), key


def as_vector(values):
    values = values.values() if isinstance(values, dict) else [values]
    flat = [v.double().flatten() for v in values if v is not None]
    return torch.cat(flat) if flat else torch.zeros(0)


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_state_of_a_reduction_does_not_depend_on_the_ranks(results, name):
    for update_number in range(2):
        one, *more = (results[0][name, world][update_number] for world in WORLDS)
        for other in more:
            assert distance(other["gradient"], one["gradient"]) < 1e-12
            assert torch.allclose(as_vector(other["state"]), as_vector(one["state"]), rtol=1e-12)
    if name == "groups":  # or the state would have no part in it
        first, second = results[0][name, 4]
        assert distance(second["gradient"], first["gradient"]) > 0.01


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", SCENARIOS)
def test_gather_puts_the_shares_together_in_order(results, name, world):
    shares = [results[rank][name, world][0] for rank in range(world)]
    assert [len(one["own"][2]) for one in shares] == list(SCENARIOS[name][2][world])
    for one in shares:
        terms, coefficients, ids = one["gathered"]
        assert one["examples"][0] == 12
        assert ids.tolist() == one["gathered twice"].tolist() == list(range(100, 112))
        for term in terms:
            own_values = [local["own"][0][term].values for local in shares]
            assert torch.equal(terms[term].values, torch.cat(own_values))
            own_coefficients = [local["own"][1][term] for local in shares]
            assert torch.equal(coefficients[term], torch.cat(own_coefficients))


def test_averaging_the_means_of_the_ranks_is_wrong_for_ragged_shares():
    problem = PROBLEMS["perceptron"](12, torch.float64, 7)
    truth = oracle(problem, lambda model, results: results.values.mean()).gradient
    means = []
    for rank in (0, 2, 3):  # as DistributedDataParallel does, were there no empty share
        share = share_of(problem.batch, RAGGED[4], rank)
        part = Problem(problem.model, share, problem.tell)
        means.append(oracle(part, lambda model, results: results.values.mean()).gradient)
    assert distance(torch.stack(means).mean(0), truth) > 0.01


@pytest.mark.parametrize(
    ("mistake", "kind", "message", "rank"),
    [
        ("user's error", "OutOfLuck", "no such word", 2),
        ("user's error in the second pass", "OutOfLuck", "late", 2),
        ("while memory is measured", "OutOfLuck", "early", 2),
        ("two kinds", "OutOfLuck", "after a draw elsewhere", 0),
        ("draws without a key", "ModelError", "Pass key=", None),
        ("nan", "DivergenceError", "1 of 12 examples, by id: 111", None),
        ("sparse", "ModelError", "gradient of weight is sparse", 0),
        ("ids", "BatchError", "Pass one id per example", 1),
        ("cut grain", "LayoutError", "a rank's share ends at example 10 of 12", 2),
        ("seed and rank", "ModelError", "Do not add the rank to the seed", None),
        ("detached", "LossError", "No loss of the batch depends on a trainable", None),
        ("micro-batches", "LayoutError", "hold 2 examples, but the share holds 6", 2),
        ("observed on one rank", "LedgerError", "couples examples", 2),
        ("penalty on one rank", "OutOfLuck", "no gradient", 2),
        ("all empty", "BatchError", "at least one example", None),
    ],
)
def test_an_error_on_one_rank_is_an_error_on_all(results, mistake, kind, message, rank):
    for failed in (one["failures"][mistake] for one in results):
        found_kind, text, notes = failed
        assert found_kind == kind
        assert message in text
        assert notes == ([] if rank is None else [f"raised on rank {rank}"])


def test_ranks_that_made_no_mistake_do_not_fail(results):
    assert [one["failures"]["no mistake"] for one in results] == [None] * 4


def test_memory_that_runs_out_on_one_rank_halves_the_micro_batch_on_all(results):
    expected = torch.arange(36.0).reshape(12, 3).mean(0)
    for one in results:
        # Tolerance: integers in float32, and one division.
        torch.testing.assert_close(one["auto"]["gradient"], expected, rtol=1e-6, atol=0)
    assert [one["auto"]["micro_batch"] for one in results] == [2, 1, 2, 1]
    assert 5 in results[0]["auto"]["tried"]
