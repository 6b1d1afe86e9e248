"""Objects that a loop's body changes, given as `state`: restored in place, type and all.

Oracle: the same loop in one go. Control: the objects differ before they are restored.
"""

import random
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import anybatch as ab
from anybatch.errors import CheckpointError, RunError
from anybatch.runs.digest import digest
from anybatch.runs.packing import pack, unpack


def data():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(12, 4, generator=generator), torch.randint(3, (12,), generator=generator)


def losses(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


class Meter:
    """An object whose state is a dict of what it has seen."""

    def __init__(self, state):
        self.state = state

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


def count_a_dict(thing, t):
    thing["t"] = thing.get("t", 0) + t + 1
    thing.setdefault("by step", {})[t] = float(t)


def grow_a_list(thing, t):
    thing.append(t)


def slide(thing, t):
    thing.append(torch.full((2,), float(t)))


def count(thing, t):
    thing["seen"] += t + 1
    thing[t % 2, "odd"] += 1


def add_to_a_set(thing, t):
    thing.add(f"step {t}")


def scale_a_tensor(thing, t):
    thing.mul_(0.9).add_(t)


def scale_an_array(thing, t):
    thing *= 0.9
    thing += t


def change_inside(thing, t):
    thing["weights"][0].mul_(0.9).add_(t)
    thing["rates"]["a"] = 0.5 * t
    thing["noise"].normal(size=2)


def draw_from_torch(thing, t):
    torch.rand(3, generator=thing)


def draw_from_numpy(thing, t):
    thing.normal(size=3)


def draw_from_a_bit_generator(thing, t):
    np.random.Generator(thing).normal(size=3)


def draw_from_random(thing, t):
    thing.gauss(0, 1)


OBJECTS = {
    "dict": (dict, count_a_dict),
    "ordered dict": (lambda: OrderedDict(a=1), count_a_dict),
    "list": (list, grow_a_list),
    "deque": (lambda: deque(maxlen=3), slide),
    "counter": (Counter, count),
    "defaultdict": (lambda: defaultdict(int), count),
    "set": (set, add_to_a_set),
    "tensor": (lambda: torch.zeros(3), scale_a_tensor),
    "parameter": (lambda: nn.Parameter(torch.zeros(3), requires_grad=False), scale_a_tensor),
    "array": (lambda: np.zeros(3), scale_an_array),
    "nested": (
        lambda: {
            "weights": [torch.zeros(2)],
            "rates": {"a": 1.0, "b": None},
            "noise": np.random.default_rng(3),
        },
        change_inside,
    ),
    "torch.Generator": (lambda: torch.Generator().manual_seed(3), draw_from_torch),
    "numpy Generator": (lambda: np.random.default_rng(3), draw_from_numpy),
    "numpy MT19937": (
        lambda: np.random.Generator(np.random.MT19937(3)),
        draw_from_numpy,
    ),
    "RandomState": (lambda: np.random.RandomState(3), draw_from_numpy),
    "Philox": (lambda: np.random.Philox(3), draw_from_a_bit_generator),
    "random.Random": (lambda: random.Random(3), draw_from_random),
}


def content(thing):
    """Write the content of an object, and its next draws, as text."""
    if isinstance(thing, torch.Generator):
        return repr(torch.rand(4, generator=thing).tolist())
    if isinstance(thing, np.random.BitGenerator):
        return repr(thing.random_raw(4).tolist())
    if isinstance(thing, np.random.Generator | np.random.RandomState):
        return repr(thing.normal(size=4).tolist())
    if isinstance(thing, random.Random):
        return repr([thing.gauss(0, 1) for _ in range(4)])
    if isinstance(thing, set):
        return repr(sorted(thing))
    if isinstance(thing, dict):
        return repr([(key, content(value)) for key, value in thing.items()]) + type(thing).__name__
    return repr(thing)


def train(thing, body, epochs, folder, **options):
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    for step in ab.steps(
        model,
        ab.Objective(losses),
        torch.optim.SGD(model.parameters(), lr=0.1),
        data(),
        order=ab.Order(12, batch_size=4, seed=0),
        epochs=epochs,
        run=folder,
        state={"own": thing},
        **options,
    ):
        body(thing, step.step)
    return thing


@pytest.mark.fast(2)
@pytest.mark.parametrize("bitwise", [False, True])
@pytest.mark.parametrize("name", OBJECTS)
def test_an_object_is_restored_in_place(name, bitwise, tmp_path):
    make, body = OBJECTS[name]
    whole = train(make(), body, 3, tmp_path / "whole", bitwise=bitwise)
    train(make(), body, 2, tmp_path / "resumed", bitwise=bitwise)
    thing = make()
    resumed = train(thing, body, 3, tmp_path / "resumed", bitwise=bitwise)
    assert resumed is thing
    half = train(make(), body, 1, tmp_path / "half", bitwise=bitwise)
    expected = content(whole)
    assert content(half) != expected  # the control
    assert content(resumed) == expected


def test_tensors_inside_a_container_stay_the_same_objects(tmp_path):
    train({"mean": torch.zeros(3)}, lambda thing, t: thing["mean"].add_(1), 1, tmp_path)
    mean = torch.zeros(3)
    train({"mean": mean}, lambda thing, t: None, 1, tmp_path)
    assert mean.tolist() == [3, 3, 3]


@pytest.mark.parametrize(
    "thing", [0.1, 3, "a", True, None, (1, 2), b"", np.float64(1), frozenset()]
)
def test_a_value_that_cannot_change_in_place_is_refused(thing, tmp_path):
    kind = type(thing).__name__
    with pytest.raises(RunError, match=rf"state\['own'\] is a {kind}, which cannot be restored"):
        train(thing, lambda thing, t: None, 1, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("thing", "what"),
    [(object(), "a object"), (Meter, "the class Meter"), (random.SystemRandom(), "a SystemRandom")],
)
def test_an_object_without_a_state_is_refused(thing, what, tmp_path):
    with pytest.raises(RunError, match=rf"state\['own'\] is {what}, which cannot be restored"):
        train(thing, lambda thing, t: None, 1, tmp_path)


Pair = namedtuple("Pair", "left right")
LOST = {
    "object": ({"meter": {"seen": object()}}, r"\['meter'\]\['seen'\] is a object"),
    "class": ({"kind": int}, r"\['kind'\] is a type"),
    "named tuple": ([Pair(1, 2)], r"\[0\] is a Pair"),
    "function": ({"f": (1, len)}, r"\['f'\]\[1\] is a builtin_function_or_method"),
    "array of objects": ({"a": np.array([object()])}, r"\['a'\] is a ndarray of object"),
    "sparse tensor": ({"a": torch.ones(2, 2).to_sparse()}, r"\['a'\] is a Tensor .*sparse"),
    "module": ({"a": deque([nn.Linear(1, 1)])}, r"\['a'\]\[1\]\[0\] is a Linear"),
    "lambda": ({"a": defaultdict(lambda: 3)}, r"\['a'\] is a defaultdict of <function"),
}


@pytest.mark.parametrize("name", LOST)
@pytest.mark.parametrize("wrap", [Meter, lambda thing: thing], ids=["in a state_dict", "as it is"])
def test_what_cannot_be_saved_is_told_by_its_place_before_the_first_update(wrap, name, tmp_path):
    thing, place = LOST[name]
    if wrap is not Meter and name in ("module", "lambda"):
        return  # a module has a state, and a defaultdict keeps its own function
    updates = []
    with pytest.raises(RunError, match=rf"state\['own'\]{place}"):
        train(wrap(thing), lambda thing, t: updates.append(t), 1, tmp_path)
    assert not updates
    assert not (tmp_path / "checkpoints").exists()


def test_a_rate_of_numpy_in_the_optimiser_is_kept(tmp_path):
    model = nn.Linear(4, 3)
    how = {"order": ab.Order(12, batch_size=4, seed=0), "run": tmp_path}
    for epochs in (1, 2):
        optimizer = torch.optim.SGD(model.parameters(), lr=np.float64(0.1))
        assert list(ab.steps(model, ab.Objective(losses), optimizer, data(), epochs=epochs, **how))
        assert type(optimizer.param_groups[0]["lr"]) is np.float64


def test_another_object_than_that_of_the_checkpoint_is_refused(tmp_path):
    train(torch.zeros(3), scale_a_tensor, 1, tmp_path)
    for thing, match in [
        (torch.zeros(4), r"state\['own'\] has the shape \(4,\)"),
        (
            torch.zeros(3).double(),
            r"state\['own'\] has the shape \(3,\) and the type torch.float64",
        ),
        (torch.Generator(), r"state\['own'\] is a Generator, and the checkpoint holds the state"),
        (random.Random(), r"state\['own'\] is a Random, and the checkpoint holds the state"),
        ({}, r"state\['own'\] is a dict, and the checkpoint holds the state of something else"),
    ]:
        with pytest.raises(RunError, match=match):
            train(thing, lambda thing, t: None, 2, tmp_path)


VALUES = [
    *(None, True, 3, -(2**200), 0.1, float("inf"), 1 + 2j, "a", b"\x00\xff", bytearray(b"ab")),
    *([1, [2.0]], (1, (2, "b")), {}, {"a": {1: 2}}, {(1, 2): 3, None: 4, 0.5: True}),
    *(OrderedDict(b=1, a=2), Counter("abca"), deque([1, 2], 3), deque(), range(2, 9, 3)),
    *({3, "a", (1, 2)}, frozenset({1.5}), torch.Size([2, 3]), torch.float16, torch.device("cpu")),
    *(np.float64(0.1), np.int8(3), np.bool_(True), np.complex64(1j), np.datetime64("2020-01-01")),
    *({"packed": "set", "content": [1]}, [{"packed": 1}], defaultdict(list, a=[1])),
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_values_come_back_with_their_types_through_a_safe_file(value, tmp_path):
    torch.save(pack(value), tmp_path / "value.pt")
    result = unpack(torch.load(tmp_path / "value.pt", weights_only=True))
    assert (type(result), result) == (type(value), value)
    assert repr(result) == repr(value) or isinstance(value, set)
    assert getattr(result, "maxlen", None) == getattr(value, "maxlen", None)
    assert getattr(result, "default_factory", None) is getattr(value, "default_factory", None)


@pytest.mark.parametrize("kind", ["?", "i2", ">i4", "f2", "f8", "c8", "M8[s]"])
@pytest.mark.parametrize("shape", [(), (0,), (2, 3)])
def test_arrays_come_back(kind, shape):
    array = np.arange(int(np.prod(shape)), dtype="i8").reshape(shape).astype(kind)
    result = unpack(pack({"a": array}))["a"]
    assert result.shape == array.shape
    assert result.dtype == array.dtype.newbyteorder("=")
    assert np.array_equal(result, array)
    result[...] = array  # may be written to


def test_the_form_of_a_set_does_not_depend_on_its_order():
    names = [f"name {i}" for i in range(50)]
    forms = {digest(pack(set(order))) for order in (names, names[::-1], names[25:] + names[:25])}
    assert len(forms) == 1
    assert digest(pack(names)) != digest(pack(names[::-1]))  # the control: lists have an order


@pytest.mark.parametrize(
    "form",
    [
        {"packed": "Path", "content": []},
        {"packed": "dtype", "content": "torch.nonsense"},
        {"packed": "scalar", "content": ["O", [], "abcdefgh"]},
        {"packed": "deque", "content": 3},
        {"packed": "set"},
    ],
)
def test_a_form_that_is_not_known_is_refused(form):
    with pytest.raises(CheckpointError, match=r"packed value of the type .* cannot be read"):
        unpack([form])


def test_a_value_that_contains_itself_is_refused():
    thing = {}
    thing["own"] = [thing]
    with pytest.raises(RunError, match="nested more than 100 levels deep"):
        pack(thing)
