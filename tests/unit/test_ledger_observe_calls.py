"""`ab.observe` where a model is called as a whole, in parts, or several times for one loss.

Oracle: `observed_loops.one_at_a_time`, plain autograd of each example alone, within its bound. The
control is the gradient of the batch in the place of the examples' own.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import anybatch as ab
from anybatch.errors import LedgerError
from observed_loops import (
    assert_exact,
    distance,
    normal,
    one_at_a_time,
    whole_gradient,
)

B = 6
X = normal(B, 4)
Y = torch.arange(B) % 3


def parts() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({"body": nn.Linear(4, 5), "head": nn.Linear(5, 3)}).double()


class Translator(nn.Module):
    """An encoder and a decoder, with methods that call them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.GRU(4, 5, batch_first=True)
        self.words, self.places = nn.Embedding(7, 4), nn.Embedding(9, 4)
        self.decoder = nn.GRU(4, 5, batch_first=True)
        self.output = nn.Linear(5, 7)
        self.double()

    def forward(self, x: Tensor, words: Tensor) -> Tensor:
        _, state = self.encoder(x)
        embeddings = self.words(words) + self.places(torch.arange(words.shape[1]))
        return self.output(self.decoder(embeddings, state)[0])

    def training_step(self, x: Tensor, words: Tensor) -> Tensor:
        return F.cross_entropy(self(x, words).transpose(1, 2), words, reduction="none").mean(1)

    def losses(self, x: Tensor, words: Tensor) -> Tensor:
        logits = self.forward(x, words)
        return F.cross_entropy(logits.transpose(1, 2), words, reduction="none").mean(1)


@pytest.mark.parametrize("method", ["training_step", "losses"])
@pytest.mark.parametrize(("size", "length"), [(6, 5), (4, 8), (1, 3)])
def test_methods_that_call_the_model_or_its_parts(method, size, length):
    model, x = Translator(), normal(size, 3, 4)
    words = torch.arange(size * length).view(size, length) % 7
    truth = one_at_a_time(model, getattr(model, method)(x, words) / size)
    for _ in range(2):
        model.zero_grad()
        with ab.observe(model) as ledger:
            getattr(model, method)(x, words).mean().backward()
        assert_exact(ledger, model, truth)


def test_parts_that_are_called_one_by_one_go_on_with_the_same_examples():
    model = parts()

    def losses(x: Tensor) -> Tensor:
        logits = model["head"](model["body"](x).tanh())
        return F.cross_entropy(logits, Y, reduction="none") / B

    truth = one_at_a_time(model, losses(X))
    with ab.observe(model) as ledger:
        losses(X).sum().backward()
    assert_exact(ledger, model, truth)
    assert distance(ledger.norms, truth.sum(0).norm().expand(B)) > 0.1  # the control


def test_a_module_that_is_called_as_often_as_there_are_examples():
    model = parts()
    shares = [model["head"](model["body"](x[None]).tanh()).square().sum() for x in X]
    truth = one_at_a_time(model, shares)
    with ab.observe(model) as ledger:
        states = [model["body"](x[None]) for x in X]
        model["head"](torch.cat(states).tanh()).square().sum().backward()
    assert_exact(ledger, model, truth)
    model.zero_grad()
    with ab.observe(model) as ledger:
        sum(model["head"](model["body"](x[None]).tanh()).square().sum() for x in X).backward()
    assert_exact(ledger, model, truth)


def test_outputs_stacked_in_another_order_are_refused_at_a_later_step():
    model = parts()

    def step(order: list[int]) -> None:
        with ab.observe(model):
            states = [model["body"](x[None])[0] for x in X]
            model["head"](torch.stack([states[i] for i in order])).sum().backward()

    step([0, 1, 2, 3, 4, 5])
    with pytest.raises(LedgerError, match="reach rows of others"):
        step([3, 1, 2, 0, 5, 4])


def test_a_cell_that_is_called_at_each_time_step():
    torch.manual_seed(0)
    model = nn.ModuleDict({"cell": nn.GRUCell(4, 5), "head": nn.Linear(5, 1)}).double()
    x = normal(7, B, 4)

    def losses() -> Tensor:
        state = torch.zeros(B, 5, dtype=torch.float64)
        for x_t in x:
            state = model["cell"](x_t, state)
        return model["head"](state)[:, 0].square()

    truth = one_at_a_time(model, losses())
    with ab.observe(model) as ledger:
        losses().sum().backward()
    assert_exact(ledger, model, truth)


def test_a_tower_that_is_called_twice_for_pairs_that_a_head_compares():
    model, other = parts(), normal(B, 4, seed=1)

    def losses() -> Tensor:
        apart = model["body"](X).tanh() - model["body"](other).tanh()
        return model["head"](apart.abs()).square().sum(1)

    truth = one_at_a_time(model, losses())
    with ab.observe(model) as ledger:
        losses().sum().backward()
    assert_exact(ledger, model, truth)


def test_two_towers_under_a_loss_that_couples_examples():
    torch.manual_seed(0)
    model = nn.ModuleDict({"images": nn.Linear(4, 5), "texts": nn.Linear(3, 5)}).double()
    texts = normal(B, 3, seed=1)

    def contrast(images: Tensor, texts: Tensor) -> Tensor:
        logits = 5 * F.normalize(images, dim=1) @ F.normalize(texts, dim=1).T
        return F.cross_entropy(logits, torch.arange(B))

    outputs = model["images"](X), model["texts"](texts)
    ends = torch.autograd.grad(contrast(*outputs), outputs, retain_graph=True)
    shares = sum((y * d).sum(1) for y, d in zip(outputs, ends, strict=True))
    truth = one_at_a_time(model, shares)
    with ab.observe(model) as ledger:
        contrast(model["images"](X), model["texts"](texts)).backward()
    assert_exact(ledger, model, truth)


def test_parameters_that_are_used_outside_of_any_module():
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.b = nn.Parameter(normal(4, 5)), nn.Parameter(normal(5))
            self.v = nn.Parameter(normal(5, 3))

    model = Bare()

    def losses() -> Tensor:
        return (torch.tanh(X @ model.w + model.b) @ model.v).square().sum(1)

    truth = one_at_a_time(model, losses())
    with ab.observe(model) as ledger:
        losses().sum().backward()
    assert_exact(ledger, model, truth)


def test_inputs_by_keyword_in_a_dict_and_of_integers():
    class Inputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.layer = nn.EmbeddingBag(9, 4), nn.Linear(4, 3)

        def forward(self, *, batch: dict[str, Tensor]) -> dict[str, Tensor]:
            return {"logits": self.layer(self.words(batch["ids"]))}

    torch.manual_seed(0)
    model, batch = Inputs().double(), {"ids": torch.arange(B * 3).view(B, 3) % 9}
    truth = one_at_a_time(model, model(batch=batch)["logits"].square().sum(1))
    with ab.observe(model) as ledger:
        model(batch=batch)["logits"].square().sum().backward()
    assert_exact(ledger, model, truth)


def test_two_models_observed_together_train_as_they_do_unobserved():
    torch.manual_seed(0)
    makers = nn.Linear(2, 4).double(), nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))
    z = normal(5, 2)

    def train(generator: nn.Module, critic: nn.Module) -> None:
        steps = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (generator, critic)]
        for _ in range(3):
            fake = generator(z)
            steps[1].zero_grad()
            (F.softplus(-critic(X)).mean() + F.softplus(critic(fake.detach())).mean()).backward()
            steps[1].step()
            steps[0].zero_grad()
            F.softplus(-critic(fake)).mean().backward()
            steps[0].step()

    plain = [copy.deepcopy(m).double() for m in makers]
    train(*plain)
    generator, critic = (m.double() for m in makers)
    with ab.observe(generator) as of_generator, ab.observe(critic) as of_critic:
        train(generator, critic)
    assert of_generator.norms.shape == (5,)
    assert of_critic.norms.shape == (5,)  # of the generator's loss: the last since a step
    for model, other in zip((generator, critic), plain, strict=True):
        pairs = zip(model.parameters(), other.parameters(), strict=True)
        assert max(distance(p.detach(), q.detach()) for p, q in pairs) < 1e-12  # rounding


def test_two_models_in_one_backward_pass():
    torch.manual_seed(0)
    generator, z = nn.Linear(2, 4).double(), normal(5, 2)
    critic = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).double()

    def losses() -> list[Tensor]:
        return [F.softplus(critic(X))[:, 0], F.softplus(-critic(generator(z)))[:, 0]]

    of_critic = one_at_a_time(critic, torch.cat(losses()))
    of_generator = one_at_a_time(generator, losses()[1])
    for contexts in ([generator, critic], [critic, generator]):
        for model in contexts:
            model.zero_grad()
        with ab.observe(contexts[0]) as outer, ab.observe(contexts[1]) as inner:
            torch.cat(losses()).sum().backward()
        ledgers = dict(zip(contexts, (outer, inner), strict=True))
        assert_exact(ledgers[critic], critic, of_critic)
        assert_exact(ledgers[generator], generator, of_generator)


def test_passes_without_gradients_and_without_a_backward_pass_leave_no_examples():
    model = nn.Linear(4, 3).double()
    truth = one_at_a_time(model, model(X).square().sum(1))
    with ab.observe(model) as ledger:
        with torch.no_grad():
            model(normal(9, 4))  # a target network
        model(normal(8, 4)).sum()  # a loss that nobody uses
        model(X).square().sum().backward()
        model.eval()
        model(normal(7, 4))
    assert_exact(ledger, model, truth)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_within_the_model(reentrant):
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.second, self.first(x).tanh(), use_reentrant=reentrant)

    torch.manual_seed(0)
    model = Checkpointed().double()
    plain = F.linear(F.linear(X, *model.first.parameters()).tanh(), *model.second.parameters())
    truth = one_at_a_time(model, plain.square().sum(1))
    with ab.observe(model) as ledger:
        model(X).square().sum().backward()
    assert_exact(ledger, model, truth)
    model.zero_grad()
    if not reentrant:
        with ab.observe(model) as ledger:
            sum(model(x[None]).square().sum() for x in X).backward()
        assert_exact(ledger, model, truth)
        return
    with ab.observe(model), pytest.raises(LedgerError, match="use_reentrant=False"):
        sum(model(x[None]).square().sum() for x in X).backward()


def test_a_model_that_is_checkpointed_as_a_whole():
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    truth = one_at_a_time(model, model(X).square().sum(1))
    with ab.observe(model) as ledger:
        checkpoint(model, X, use_reentrant=False).square().sum().backward()
    assert_exact(ledger, model, truth)
    x = X.clone().requires_grad_()
    with ab.observe(model), pytest.raises(LedgerError, match="in the backward pass alone"):
        checkpoint(model, x, use_reentrant=True).square().sum().backward()


def test_coupling_between_parts_is_seen_at_the_step_where_it_begins():
    model, norm = parts(), nn.BatchNorm1d(5).double()
    with ab.observe(model):
        model["head"](model["body"](X)).square().sum().backward()
    with ab.observe(model), pytest.raises(LedgerError, match="reach rows of others"):
        model["head"](norm(model["body"](X))).square().sum().backward()


def test_rows_that_are_sorted_between_parts_or_within_the_model_are_refused_at_a_later_step():
    model = parts()
    in_order, other = torch.arange(B), torch.tensor([3, 1, 2, 0, 5, 4])

    def step(order: Tensor) -> None:
        with ab.observe(model):
            model["head"](model["body"](X)[order]).square().sum().backward()

    step(in_order)
    with pytest.raises(LedgerError, match="reach rows of others"):
        step(other)


def test_a_compiled_model_is_observed_as_the_model_that_it_was_compiled_from():
    model = nn.Linear(4, 3).double()
    compiled = torch.compile(model, backend="eager")
    truth = one_at_a_time(model, model(X).square().sum(1))
    for observed in (model, compiled):
        model.zero_grad()
        with ab.observe(observed) as ledger:
            compiled(X).square().sum().backward()
        assert_exact(ledger, model, truth)


def test_an_error_of_the_model_is_the_users_own_and_leaves_nothing_behind():
    model = nn.Linear(4, 3).double()
    truth = one_at_a_time(model, model(X).square().sum(1))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), ab.observe(model):
        model(X[:, :2])
    assert not model._forward_pre_hooks
    assert not model._forward_hooks
    with ab.observe(model) as ledger:
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            model(X[:, :2])
        model(X).square().sum().backward()
    assert_exact(ledger, model, truth)
    assert distance(whole_gradient(model), truth.sum(0)) < distance(truth[0], truth[1])
