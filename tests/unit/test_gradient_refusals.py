"""Refusals of `batch_gradient`: their types, and words that name the cause and the cure."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import anybatch as ab
from anybatch.errors import BatchError, DivergenceError, LayoutError, LossError, ModelError

LAYOUTS = [ab.Layout(), ab.Layout(2)]


def linear():
    torch.manual_seed(0)
    return nn.Linear(3, 1).double()


def outputs(model, x):
    return model(x)[:, 0]


def update(model=None, x=None, losses=outputs, layout=None, **options):
    x = torch.randn(5, 3, dtype=torch.float64) if x is None else x
    return ab.batch_gradient(model or linear(), ab.Objective(losses, **options), x, layout=layout)


def test_wrapped_models_that_average_by_themselves_are_refused():
    with pytest.raises(ModelError, match=r"average gradients a second time\. Pass the bare"):
        update(nn.DataParallel(linear()))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        replica = nn.parallel.DistributedDataParallel(linear())
        for model in (replica, nn.Sequential(replica)):
            with pytest.raises(ModelError, match=r"Pass the bare model, model\.module, and group="):
                update(model)
    finally:
        dist.destroy_process_group()


def test_sync_batch_norm_is_refused_in_training_alone():
    model = nn.Sequential(nn.Linear(3, 2), nn.SyncBatchNorm(2)).double()
    with pytest.raises(ModelError, match=r"SyncBatchNorm couples.*Use BatchNorm"):
        update(model)
    update(model.eval())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("losses", "shape"),
    [
        (lambda m, x: m(x).mean(), r"\(\)"),
        (lambda m, x: m(x)[1:, 0], r"\(\d,\)"),
        (lambda m, x: m(x), r"\(\d, 1\)"),
        (lambda m, x: m(x)[:, :, None], r"\(\d, 1, 1\)"),
    ],
    ids=["reduced", "too few", "a column", "a cube"],
)
def test_a_loss_that_is_not_one_an_example_is_refused(losses, shape, layout):
    with pytest.raises(LossError, match=rf"returned shape {shape} for a batch of .* one loss per"):
        update(losses=losses, layout=layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("reduction", [ab.Mean(), ab.Max()])
def test_a_batch_in_which_nothing_counts_is_refused(reduction, layout):
    def masked(model, x):
        return ab.ExampleLosses(outputs(model, x), torch.zeros(len(x)))

    with pytest.raises(LossError, match="All counts of the batch are 0"):
        update(losses=masked, layout=layout, reduction=reduction)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("reduction", [ab.Mean(), ab.Max()])
def test_a_loss_of_nan_is_told_by_the_ids_of_its_examples(reduction, layout):
    x = torch.randn(5, 3, dtype=torch.float64)
    x[1] = x[4] = torch.nan
    objective = ab.Objective(outputs, reduction)
    message = r"is nan\. It must be a finite number\. Not finite for 2 of 5 examples, by id: 17, 20"
    with pytest.raises(DivergenceError, match=message):
        ab.batch_gradient(linear(), objective, x, layout=layout, ids=torch.arange(16, 21))
    with pytest.raises(DivergenceError, match="by place in the batch: 1, 4"):
        ab.batch_gradient(linear(), objective, x, layout=layout)


def test_a_reduction_that_overflows_is_told_from_a_loss_that_does():
    with pytest.raises(DivergenceError, match="Each example's loss is finite: the reduction over"):
        update(reduction=lambda losses: (losses.values * 1e3).exp().sum() * torch.inf)


def mean_over_tokens(model, batch):
    """Each example's own mean, 0 / 0 where every token is masked."""
    x, mask = batch
    each = model(x)[..., 0] * mask
    return ab.ExampleLosses(each.sum(1) / mask.sum(1), mask.sum(1))


def mean_over_counted_tokens(model, batch):
    x, mask = batch
    each = model(x)[..., 0] * mask
    return ab.ExampleLosses(each.sum(1) / mask.sum(1).clamp(min=1), mask.sum(1))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("reduction", [ab.Mean(), ab.Max(), ab.Tilted(1.0)])
def test_nan_where_nothing_counts_is_refused_since_it_would_spoil_the_gradient(reduction, layout):
    model, x = linear(), torch.randn(5, 4, 3, dtype=torch.float64)
    mask = torch.ones(5, 4, dtype=torch.float64)
    mask[3] = 0
    # Plain autograd with the coefficient 0 shows what would become of the gradient.
    (mean_over_tokens(model, (x, mask)).values * torch.tensor([1.0, 1, 1, 0, 1])).sum().backward()
    assert model.weight.grad.isnan().all()
    with pytest.raises(LossError, match=r"1 of 5 examples, by place.*: 3\. .*0 \* nan is nan"):
        update(model, (x, mask), mean_over_tokens, layout, reduction=reduction)
    assert model.weight.grad is None
    update(model, (x, mask), mean_over_counted_tokens, layout, reduction=reduction)
    assert model.weight.grad.isfinite().all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_infinity_below_a_maximum_is_refused(layout):
    x = torch.tensor([[1.0, 2, 3], [0, 0, 0], [2, 2, 2]], dtype=torch.float64)

    def logarithm(model, x):
        return (model.weight.abs() * x).sum(1).log()  # -inf at 0, with an infinite derivative

    with pytest.raises(LossError, match=r"1 of 3 examples, by place in the batch: 1\. "):
        update(x=x, losses=logarithm, layout=layout, reduction=ab.Max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sparse_gradients_are_refused(layout, dtype):
    model = nn.Embedding(4, 2, sparse=True).to(dtype)
    with pytest.raises(ModelError, match=r"gradient of weight is sparse.*sparse=False"):
        update(model, torch.tensor([0, 1, 1, 3]), lambda m, x: m(x).sum(1), layout)
    assert model.weight.grad is None


@pytest.mark.parametrize("model", [nn.ReLU(), linear().requires_grad_(False)])
def test_a_model_without_anything_to_train_is_refused(model):
    with pytest.raises(ModelError, match="The model has no trainable parameters"):
        update(model)


@pytest.mark.parametrize("x", [torch.zeros(0, 3), {"a": torch.zeros(0, 3)}])
def test_an_empty_batch_is_refused(x):
    with pytest.raises(BatchError, match="An update needs at least one example"):
        update(x=x)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        ({"a": torch.ones(3), "b": torch.ones(4)}, r"batch\['a'\] has 3, batch\['b'\] has 4"),
        ((torch.ones(3), torch.tensor(1.0)), r"batch\[1\] is a tensor of shape \(\).* ab.Shared"),
        ((torch.ones(3), "text"), r"batch\[1\] is of type str"),
        ({}, "no tensor and no array"),
    ],
)
def test_a_batch_that_cannot_be_cut_is_refused(x, message):
    with pytest.raises(BatchError, match=message):
        update(x=x)


@pytest.mark.parametrize("ids", [torch.arange(4), torch.arange(5)[:, None], torch.tensor(5)])
def test_ids_that_are_not_one_an_example_are_refused(ids):
    x = torch.randn(5, 3, dtype=torch.float64)
    with pytest.raises(BatchError, match=r"ids have shape .* Pass one id per example"):
        ab.batch_gradient(linear(), ab.Objective(outputs), x, ids=ids)


def test_micro_batches_that_do_not_add_up_are_refused():
    with pytest.raises(LayoutError, match=r"\[2, 2\] hold 4 examples, but the share holds 5"):
        update(layout=ab.Layout((2, 2)))


def detached(model, x):
    return outputs(model, x).detach()


def without_grad(model, x):
    with torch.no_grad():
        return outputs(model, x)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("reduction", [ab.Mean(), ab.Max()])
@pytest.mark.parametrize("losses", [detached, without_grad])
def test_losses_without_a_graph_are_refused(losses, reduction, layout):
    message = r"No loss of the batch depends on a trainable parameter.*torch\.no_grad\(\)"
    with pytest.raises(LossError, match=message):
        update(losses=losses, layout=layout, reduction=reduction)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("reduction", [ab.Mean(), ab.Max()])
def test_a_micro_batch_without_a_graph_is_accepted_beside_others(reduction, layout):
    def masked(model, x):
        counts = (x[:, 0] > 0).double()
        values = outputs(model, x) * counts if counts.any() else torch.zeros(len(x))
        return ab.ExampleLosses(values.double(), counts)

    model, x = linear(), torch.tensor([[0.0, 1, 1], [0, 1, 1], [1, 2, 3]], dtype=torch.float64)
    update(model, x, masked, layout, reduction=reduction)
    assert model.weight.grad.tolist() == [[1, 2, 3]]


def test_a_gradient_of_a_batch_without_errors_is_not_refused():
    loss = update(losses=lambda m, x: F.softplus(m(x)[:, 0])).loss
    assert loss.isfinite()
