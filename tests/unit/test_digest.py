"""Digests: equal for equal content, different for anything else, and fixed for good."""

import copy
import hashlib
from collections import OrderedDict, namedtuple

import numpy as np
import pytest
import torch
from hypothesis import given

from anybatch.errors import CheckpointError
from anybatch.runs.digest import count_bytes, digest, refuse_non_finite
from nested_states import same, states
from properties import seeded_examples

DIFFERENT = {
    "numbers of other types": [1, 1.0, 1 + 0j, True, "1", torch.tensor(1), np.int64(1), [1], (1,)],
    "nothings": [None, False, 0, "", "None", [], (), {}, torch.empty(0), np.zeros(0)],
    "nesting": [[1, [2]], [[1], 2], [1, 2], [[1, 2]], [1, [2], []], [[], 1, [2]], [1, (2,)]],
    "cuts of text": [["ab", "c"], ["a", "bc"], ["abc"], ["abc", ""], ["str:1:a"], ["str:1:", "a"]],
    "keys": [{"1": 2}, {1: 2}, {2: 1}, {"1": 2, "2": 1}, {1: {2: 3}}, {1: 2, 3: {}}, [1, 2]],
    "keys and values": [{"a": "b", "c": "d"}, {"a": "d", "c": "b"}, {"a": "c", "b": "d"}],
    "zeros": [0.0, -0.0, torch.tensor(0.0), torch.tensor(-0.0), np.float64(0.0), np.float64(-0.0)],
    "dtypes": [torch.zeros(4, dtype=dtype) for dtype in (torch.float16, torch.bfloat16)]
    + [np.zeros(4, dtype=code) for code in ("f2", "f4", "i4", "u4")],
    "shapes": [torch.zeros(shape) for shape in [(2, 3), (3, 2), (6,), (1, 6), (0, 2), (2, 0)]],
    "0-d arrays": [np.array(1.0), np.float64(1.0), np.ones(1)],
    "one bit": [torch.arange(3), torch.tensor([0, 1, 3]), torch.tensor([1, 1, 2])],
}


@pytest.mark.parametrize("states", DIFFERENT.values(), ids=DIFFERENT.keys())
def test_states_that_differ_have_digests_that_differ(states):
    assert len({digest(state) for state in states}) == len(states)


def test_printing_joining_or_comparing_would_take_some_of_them_for_equal():
    """Control: the easy ways confuse such states, so the cases above can fail."""
    assert repr(torch.tensor([0.1, 1.0])) == repr(torch.tensor([0.1, 1.0 + 1e-6]))
    assert len({"".join(state) for state in DIFFERENT["cuts of text"][:4]}) == 1
    assert [1, 0.0, {1: 2}] == [True, -0.0, {1.0: 2}]


@seeded_examples(150)
@given(states(), states(), states())
def test_digests_are_equal_exactly_where_the_states_are_bit_for_bit(first, second, third):
    assert digest([first, second]) == digest(copy.deepcopy([first, second]))
    for left, right in [(first, second), ([first, second], [first, third])]:
        assert (digest(left) == digest(right)) == same(left, right)


def test_the_oracle_tells_values_apart_that_compare_equal():
    """Control: `==` holds for each of these pairs."""
    pairs = [(1, True), (1, 1.0), (0.0, -0.0), ({1: 0}, {True: 0}), ([0.0], [-0.0])]
    tensors = [(torch.tensor(0.0), torch.tensor(-0.0)), (torch.ones(1), torch.ones(1).double())]
    assert all(left == right and not same(left, right) for left, right in pairs + tensors)
    assert same({"a": [torch.tensor(float("nan"))]}, {"a": [torch.tensor(float("nan"))]})


def test_the_digest_is_the_hash_that_its_definition_spells_out():
    """Digests are stored in manifests, so the definition must never change."""
    state = {"b": [1, True, -2.0], "a": torch.tensor([1.0, -0.0]), 3: None}
    spelled = (
        b"dict:1:3" + b"int:1:3" + b"str:1:a" + b"str:1:b"
        b"NoneType:0:"
        b"tensor:18:torch.float32 (2,)" + bytes.fromhex("0000803f00000080") + b"list:1:3"
        b"int:1:1" + b"bool:1:1" + b"float:8:" + bytes.fromhex("c000000000000000")
    )
    assert digest(state) == hashlib.sha256(spelled).hexdigest()


def test_order_of_keys_and_kind_of_dict_do_not_matter():
    keyed = {"b": 1, 2: 3, "a": 4, 10: 5, "2": 6}
    assert digest(keyed) == digest(OrderedDict(reversed(keyed.items())))


@pytest.mark.parametrize(
    "changed",
    [
        lambda t: t.t().contiguous().t(),
        lambda t: torch.stack([t, -t], dim=-1)[..., 0],
        lambda t: torch.nn.Parameter(t),
        lambda t: (-t).conj().conj().neg(),
        lambda t: torch._neg_view(-t),
        lambda t: torch.cat([t, t])[2:],
    ],
    ids=["transposed storage", "strided", "parameter", "negated", "lazily negated", "offset"],
)
def test_memory_layout_does_not_matter(changed):
    tensor = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    assert digest(changed(tensor)) == digest(tensor)
    assert digest(changed(tensor + 1)) != digest(tensor)


def test_a_lazily_conjugated_tensor_counts_by_its_values():
    tensor = torch.tensor([1 + 2j, 3 - 4j])
    assert digest(tensor.conj()) == digest(torch.tensor([1 - 2j, 3 + 4j])) != digest(tensor)


def test_byte_order_and_strides_of_arrays_do_not_matter():
    array = np.arange(6.0).reshape(2, 3)
    assert digest(array) == digest(array.astype(">f8")) == digest(np.asfortranarray(array))


@pytest.mark.parametrize(
    ("value", "result"),
    [
        (torch.ones(2, 2).to_sparse(), r"Tensor .*sparse"),
        (torch.ones(2, device="meta"), r"Tensor .*device meta"),
        (np.array([object()]), "ndarray"),
        (np.ma.masked_array([1.0]), "MaskedArray"),
        (np.longdouble(1), "longdouble"),
        (namedtuple("Pair", "left right")(1, 2), "Pair"),
        ({1, 2}, "set"),
        (torch.nn.Linear(1, 1), "Linear"),
        ({True: 1}, "key True of type bool"),
        ({None: 1}, "key None of type NoneType"),
    ],
)
def test_what_cannot_be_digested_is_named_by_its_path(value, result):
    with pytest.raises(CheckpointError, match=rf"state\['model'\]\[1\] (is a|has the) {result}"):
        digest({"model": [0, value]})


def test_a_state_that_contains_itself_is_refused():
    cycle = {"a": []}
    cycle["a"].append(cycle)
    with pytest.raises(CheckpointError, match=r"more than 100 levels deep.*contains itself"):
        digest(cycle)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2, torch.cfloat])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_the_first_non_finite_tensor_is_named(dtype, bad):
    state = {"model": {"a": torch.ones(3), "b": torch.tensor([1.0, bad, bad]).to(dtype)}}
    with pytest.raises(CheckpointError, match=r"^state\['model'\]\['b'\] holds 2 .* out of 3"):
        refuse_non_finite(state)


def test_finite_tensors_and_infinite_plain_numbers_pass():
    state = {"model": torch.ones(3), "ids": torch.arange(3), "best": float("inf")}
    refuse_non_finite(state)
    with pytest.raises(CheckpointError, match=r"^state\['best'\] holds 1 .* out of 1"):
        refuse_non_finite(state | {"best": torch.tensor(float("inf"))})


def test_bytes_of_all_tensors_are_counted():
    assert count_bytes({"a": [torch.ones(3), 1], "b": torch.ones(2, dtype=torch.int64)}) == 12 + 16
