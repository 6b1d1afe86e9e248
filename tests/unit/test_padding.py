"""Models that read the padding of ragged sequences are refused.

Oracle of the padding: Python loops over lists. Of the check: models that read padding by
construction, next to the same ones mended, whose losses are those of each example alone.
"""

import copy
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import anybatch as ab
from anybatch import pytree
from anybatch.batch import Pad, Padded
from anybatch.errors import BatchError, LossError, ModelError
from anybatch.training.data_checks import check_padding
from anybatch.zoo import cross_entropy
from properties import seeded_examples

RAGGED = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=6), min_size=1, max_size=5)


@given(RAGGED, st.integers(-3, 3))
@seeded_examples(60)
def test_sequences_are_padded_to_the_longest_of_them(rows: list[list[int]], fill: int) -> None:
    (values, mask), targets = Pad(fill=fill)([(row, len(row)) for row in rows])
    longest = max(map(len, rows))
    assert values.tolist() == [row + [fill] * (longest - len(row)) for row in rows]
    assert mask.tolist() == [[True] * len(row) + [False] * (longest - len(row)) for row in rows]
    assert mask.dtype == torch.bool
    assert targets.tolist() == [len(row) for row in rows]


@given(RAGGED)
@seeded_examples(60)
def test_targets_that_are_sequences_are_padded_too(rows: list[list[int]]) -> None:
    examples = [(row, [2 * x for x in row], 0.5) for row in rows]
    (_, mask), targets, weights = Pad(targets=-7)(examples)
    longest = max(map(len, rows))
    wanted = [[2 * x for x in row] + [-7] * (longest - len(row)) for row in rows]
    assert targets.tolist() == wanted
    assert targets[mask].tolist() == [2 * x for row in rows for x in row]
    assert weights.tolist() == [0.5] * len(rows)


def test_vectors_keep_their_width_and_targets_of_one_shape_are_stacked() -> None:
    examples = [(np.ones((n, 2), np.float32) * n, torch.tensor([n, 7.0, 8.0])) for n in (1, 4)]
    (values, mask), targets = Pad()(examples)
    assert values[:, :, 1].tolist() == [[1, 0, 0, 0], [4, 4, 4, 4]]
    assert mask.sum(1).tolist() == [1, 4]
    assert targets.tolist() == [[1, 7, 8], [4, 7, 8]]
    three = [(torch.ones(3), torch.arange(3)), (torch.zeros(3), torch.arange(3))]
    assert Pad()(three)[1].tolist() == [[0, 1, 2], [0, 1, 2]]  # either rule gives the same


def test_it_is_a_batch_whose_examples_can_be_taken() -> None:
    batch = Pad()([([1, 2, 3], 0), ([4], 1)])
    assert pytree.count_examples(batch) == 2
    (values, mask), targets = pytree.take_examples(batch, 1, 2)
    assert values.tolist() == [[4, 0, 0]]
    assert mask.tolist() == [[True, False, False]]
    assert targets.tolist() == [1]
    assert repr(Pad()) == "Pad(fill=0, targets=-100)"  # what a run compares on resume


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([([1, 2], 0), ([], 1)], "Example 1 of a micro-batch is an empty sequence"),
        ([([1, 2], 0), ([1], 1, 2.0)], "ab.Pad expects examples .* argument 2 is longer"),
        ([torch.ones(2, 3)] * 2, "ab.Pad expects .* an example is a Tensor"),
        ([{"text": [1], "label": 0}], "an example is a dict"),
        ([(1, 2), (3, 4)], "ab.Pad expects"),
        ([([1.0], "noun")], "ab.Pad expects .*'str'"),
        ([(torch.ones(3, 2), 1), (torch.ones(2, 3), 1)], "differ in the length .* must match"),
        ([(torch.ones(3), [1, 2]), (torch.ones(2), [1, 2, 3])], "stack expects"),
    ],
)
def test_what_cannot_be_padded_is_refused(examples: list[Any], message: str) -> None:
    with pytest.raises(BatchError, match=message):
        Pad()(examples)


class Classifier(nn.Module):
    """Embedding, a body from (vectors [B, T, 6], mask) to a vector an example, linear head."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 6)
        self.body = body
        self.head = nn.Linear(6, 3)

    def forward(self, padded: Padded) -> Tensor:
        return self.head(self.body(self.embedding(padded.values), padded.mask))


class Body(nn.Module):
    """Base of bodies; `reads` says whether to read the padding."""

    def __init__(self, reads: bool) -> None:
        super().__init__()
        self.reads = reads

    def mean(self, x: Tensor, mask: Tensor) -> Tensor:
        return (x * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)


class Mean(Body):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return x.mean(1) if self.reads else self.mean(x, mask)


class LastState(Body):
    def __init__(self, reads: bool) -> None:
        super().__init__(reads)
        self.gru = nn.GRU(6, 6, batch_first=True)
        self.norm = nn.LayerNorm(6)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        states = self.gru(x)[0]
        last = mask.sum(1) - 1
        at = states[:, -1] if self.reads else states[torch.arange(len(x)), last]
        return self.norm(at)


class Packed(Body):
    def __init__(self, reads: bool) -> None:
        super().__init__(reads)
        self.gru = nn.GRU(6, 3, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        if not self.reads:
            x = nn.utils.rnn.pack_padded_sequence(x, mask.sum(1), True, enforce_sorted=False)
        return self.gru(x)[1].transpose(0, 1).flatten(1)


class Attention(Body):
    def __init__(self, reads: bool) -> None:
        super().__init__(reads)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        out = self.attention(x, x, x, key_padding_mask=None if self.reads else ~mask)[0]
        return self.mean(out, mask)


class Convolution(Body):
    def __init__(self, reads: bool) -> None:
        super().__init__(reads)
        self.convolution = nn.Conv1d(6, 6, 3, padding=1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x if self.reads else x * mask[:, :, None]  # else the last place sees what is after it
        return self.mean(self.convolution(x.transpose(1, 2)).transpose(1, 2), mask)


class Normed(Body):
    """Normalise; in evaluation mode the statistics are fixed, unless it has none."""

    def __init__(self, reads: bool) -> None:
        super().__init__(reads)
        self.norm = nn.BatchNorm1d(6, track_running_stats=not reads)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.mean(self.norm(x.transpose(1, 2)).transpose(1, 2), mask)


class Stepwise(Body):
    """A loop over the places, which calls its cell as often as the padding is long."""

    def __init__(self, reads: bool) -> None:
        super().__init__(reads)
        self.cell = nn.GRUCell(6, 6)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        state = torch.zeros_like(x[:, 0])
        for t in range(x.shape[1]):
            step = self.cell(x[:, t], state)
            state = step if self.reads else torch.where(mask[:, t, None], step, state)
        return state


BODIES = {  # what the error names
    Mean: r"'body' \(Mean\) reads padding",
    LastState: r"'body' \(LastState\) reads .* the input of 'body.norm' \(LayerNorm\) is the first",
    Packed: r"'body.gru' \(GRU\) reads .* the output of 'body.gru' \(GRU\) is the first",
    Attention: r"'body.attention' \(MultiheadAttention\) reads padding",
    Convolution: r"'body.convolution' \(Conv1d\) reads padding",
    Normed: r"'body.norm' \(BatchNorm1d\) reads padding",
    Stepwise: r"'body' \(Stepwise\) reads padding",
}
OBJECTIVE = ab.Objective(cross_entropy)


def make_ragged(lengths: list[int]) -> list[tuple[Tensor, int]]:
    """Sequences of tokens of these lengths, with classes."""
    noise_generator = torch.Generator().manual_seed(1)
    return [(torch.randint(1, 9, (n,), generator=noise_generator), n % 3) for n in lengths]


def classifier(body: type[Body], *, reads: bool, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return Classifier(body(reads)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("body", BODIES)
def test_a_model_that_reads_padding_is_refused_by_name(
    body: type[Body], dtype: torch.dtype
) -> None:
    examples = make_ragged([5, 3, 40, 7, 4, 6])
    with pytest.raises(ModelError, match=BODIES[body]) as e:
        check_padding(classifier(body, reads=True, dtype=dtype), OBJECTIVE, examples, Pad())
    assert "Use the mask" in str(e.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("body", BODIES)
def test_the_same_model_mended_passes(body: type[Body], dtype: torch.dtype) -> None:
    examples = make_ragged([5, 3, 40, 7, 4, 6])
    assert check_padding(classifier(body, reads=False, dtype=dtype), OBJECTIVE, examples, Pad())


@pytest.mark.parametrize("body", BODIES)
def test_what_passes_has_the_losses_of_each_example_alone(body: type[Body]) -> None:
    """Compute the oracle: one example at a time, without padding; only rounding differs."""
    examples = make_ragged([5, 3, 40, 7])
    for reads in (False, True):
        model = classifier(body, reads=reads, dtype=torch.float64).eval()
        together = cross_entropy(model, Pad()(examples)).values
        alone = torch.cat([cross_entropy(model, Pad()([one])).values for one in examples])
        assert torch.allclose(together, alone, rtol=1e-12) == (not reads)


def test_a_loss_that_counts_padding_is_refused() -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(9, 4)

        def forward(self, padded: Padded) -> Tensor:
            return self.embedding(padded.values)

    def losses_of(masked: tuple[bool, bool]) -> ab.Objective:
        def losses(model: nn.Module, batch: Any) -> ab.ExampleLosses:
            padded, targets = batch
            each = F.cross_entropy(model(padded).transpose(1, 2), targets % 4, reduction="none")
            values, counts = (padded.mask if m else torch.ones_like(padded.mask) for m in masked)
            return ab.ExampleLosses((each * values).sum(1), counts.sum(1))

        return ab.Objective(losses)

    examples = [(x, x) for x, _ in make_ragged([3, 5, 8])]
    for masked in ((False, True), (True, False)):
        with pytest.raises(LossError, match=": example_losses reads padding"):
            check_padding(Tagger(), losses_of(masked), examples, Pad())
    assert check_padding(Tagger(), losses_of((True, True)), examples, Pad())  # the control


def test_a_loss_that_calls_parts_of_a_model_is_named_where_it_reads_padding() -> None:
    def losses(model: nn.Module, batch: Any) -> Tensor:
        (values, _), targets = batch
        logits = model.head(model.embedding(values).mean(1))
        return F.cross_entropy(logits, targets, reduction="none")

    model = classifier(Mean, reads=False, dtype=torch.float32)
    with pytest.raises(LossError, match=r"example_losses reads .* the input of 'head'"):
        check_padding(model, ab.Objective(losses), make_ragged([3, 5, 8]), Pad())


def test_examples_of_one_length_leave_it_open() -> None:
    model = classifier(Mean, reads=True, dtype=torch.float32)
    assert not check_padding(model, OBJECTIVE, make_ragged([4, 4, 4]), Pad())
    assert not check_padding(model, OBJECTIVE, make_ragged([4]), Pad())


def test_examples_that_cannot_be_padded_are_refused_as_by_pad() -> None:
    model = classifier(Mean, reads=False, dtype=torch.float32)
    for examples in ([{"text": [1]}], [torch.ones(2, 3)], [(1, 2)]):
        with pytest.raises(BatchError, match=r"ab.Pad expects examples \(sequence, target\)"):
            check_padding(model, OBJECTIVE, examples, Pad())


@pytest.mark.parametrize("reads", [False, True])
def test_the_model_is_left_as_it_was(reads: bool) -> None:
    model = classifier(Normed, reads=reads, dtype=torch.float32).train()
    model.body.register_buffer("seen", torch.zeros(()))

    def count(body: nn.Module, *_: Any) -> None:
        body.seen.add_(1)

    model.body.register_forward_hook(count)
    state, generator = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with pytest.raises(ModelError, match="the first that differs") if reads else nullcontext():
        check_padding(model, OBJECTIVE, make_ragged([2, 3, 9]), Pad())
    assert model.training
    assert model.body.training
    assert [len(m._forward_hooks) for m in model.modules()] == [0, 0, 1, 0, 0]  # its own
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(p.grad is None for p in model.parameters())


def test_it_is_made_in_full_precision() -> None:
    all_lengths = []

    def losses(model: nn.Module, batch: Any) -> Tensor:
        all_lengths.append(torch.is_autocast_enabled("cpu"))
        return cross_entropy(model, batch).values

    with torch.autocast("cpu", torch.bfloat16):
        model = classifier(LastState, reads=False, dtype=torch.float32)
        assert check_padding(model, ab.Objective(losses), make_ragged([3, 5, 8]), Pad())
        assert torch.is_autocast_enabled("cpu")
    assert all_lengths == [False, False]


def test_a_model_that_draws_in_evaluation_too_cannot_be_compared() -> None:
    class Noisy(Body):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.mean(F.dropout(x, 0.5), mask)

    model = classifier(Noisy, reads=False, dtype=torch.float32)
    assert check_padding(model, OBJECTIVE, make_ragged([3, 5, 8]), Pad())
