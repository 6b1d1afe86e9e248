"""Finds, in an unchanged model, every operation in which the batch meets a parameter.

Each such call of torch runs with its parameters as constants, so that autograd leaves no gradient
in them, and with a tap that gets what their gradients are made of (`contractions`). Whatever then
still arrives in a parameter's `.grad` has gone past the ledger.

| the call takes | what is done |
|---|---|
| parameters alone, or what was made of them | it runs as it is, and its result counts as one |
| an operation that is better written as others, such as a recurrent layer | those (`rewritten`) |
| an elementwise operation, an assignment | the parameter becomes a copy for each example |
| parameters repeated or joined over the batch | they are such copies already (`layouts`) |
| an einsum | by its letters, of which example i is one (`contractions.summed`) |
| an operation with a rule | the rule |
| a composite in Python, such as attention | its body runs under the same eyes |
| anything else | it is mapped over the examples, each with a copy of its own (`mapped`) |

A use whose examples are nowhere to be found, such as position embeddings that are looked up once
for all, counts as made of parameters alone: the batch is met further on.

Rows of examples that have been moved are taken as they come: gradients show whose they are (`rows`,
`scales`). What is left goes one example after the other (`one_by_one`).
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from anybatch._torch import tree_leaves, tree_map
from anybatch.kernels.operations import FASTER
from anybatch.ledger.calls import (
    Call,
    as_factor,
    broadcast_size,
    make_summed,
    refuse_parameter_gradient,
)
from anybatch.ledger.composites import WAYS_BACK, body, is_composite
from anybatch.ledger.contractions import CASTS, ELEMENTWISE, EXPANSIONS, JOINS, RULES
from anybatch.ledger.contractions.base import Contraction
from anybatch.ledger.contractions.summed import Letters, letters_of, split
from anybatch.ledger.copies import Copies
from anybatch.ledger.layouts import places_of_copies, sources
from anybatch.ledger.mapped import carriers, mapped
from anybatch.ledger.met import Met
from anybatch.ledger.placement import Meeting, Placement, Plan, placements
from anybatch.ledger.recurrent import TWICE_DIFFERENTIABLE
from anybatch.ledger.rewritten import REWRITTEN
from anybatch.ledger.taps import SecondDerivative, tapped
from anybatch.ledger.transforms import check_transforms, outside_transforms
from anybatch.ledger.watcher import Watcher

__all__ = ["Intercept", "Meeting", "Plan", "Receive"]

Receive = Callable[[Meeting, Placement, Callable[[Placement], Contraction], Tensor], None]


class Intercept(TorchFunctionMode):
    """While it is entered, calls that meet tracked parameters deliver to `receive`.

    Args:
        parameters: those to watch, by name.
        num_examples: B of what passes through.
        plan: where examples lie.
        receive: called in the backward pass with the meeting, its placement, what makes the
            contraction, and the gradient of the output or of the copies.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        num_examples: int,
        plan: Plan,
        receive: Receive,
    ) -> None:
        super().__init__()
        self._parameters = parameters
        self._receive = receive
        self.watcher: Watcher | None = None
        """Sees the calls of a loop of one's own; None: the passes are made by the library."""
        self.is_paused = False  # calls run as they are
        self.constants: dict[str, Tensor] | None = None
        """Leaves that take the place of parameters and collect plain autograd's own gradients, in
        a pass that is checked; None: constants do, which collect none."""
        self.begin(num_examples, plan)

    def begin(self, num_examples: int, plan: Plan) -> None:
        """Forget what was seen: what follows is a forward pass of so many examples."""
        self.names = {id(p): name for name, p in self._parameters.items()}
        self.uses: dict[str, int] = {}  # of each parameter, and of what was made of parameters
        self.derived: dict[str, Tensor] = {}  # kept, so that no id is used twice
        self.roots = {name: {name} for name in self._parameters}
        self.made_into: set[str] = set()  # parameters that others were made of
        self.is_forward = True  # what checkpointing runs again in the backward pass is no new use
        self.may_mix = False  # rows of examples may have changed places
        self._labels = {name: name for name in self._parameters}
        self._num_examples, self._plan = num_examples, plan
        self._copies = Copies(self._receive, self._count, self._const, num_examples)

    def turn_to(
        self, num_examples: int, plan: Plan, receive: Receive, uses: dict[str, int]
    ) -> None:
        """Go on with other examples, 0 if there are none in what follows.

        Each micro-batch has a receiver and counts of its own.
        """
        self._num_examples, self._plan = num_examples, plan
        self._receive, self.uses = receive, uses
        self._copies = Copies(receive, self._count, self._const, num_examples)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if self.is_paused:
            return func(*args, **(kwargs or {}))
        if self.watcher is not None and self.watcher.is_watched(func):
            return self.watcher.called(func, args, kwargs or {})
        if not self._meets(args) and not (kwargs and self._meets(kwargs.values())):
            return self._unmet(func, args, kwargs or {})
        kwargs = kwargs or {}
        if func is torch.autograd.grad:
            refuse_parameter_gradient(self.names, tree_leaves((args, kwargs)))
        rewritten = REWRITTEN.get(func)
        if self._plan.by_copies and func in TWICE_DIFFERENTIABLE:
            rewritten = TWICE_DIFFERENTIABLE[func]
        if rewritten is not None:
            with self:
                return rewritten(*args, **kwargs)
        operands = (*args, *kwargs.values())
        if any(isinstance(x, list | tuple | dict) for x in operands):
            operands = tuple(tree_leaves(operands))
        tensors = [x for x in operands if isinstance(x, Tensor)]
        if func in CASTS or func in EXPANSIONS:
            tensors = tensors[:1]
        data = [t for t in tensors if id(t) not in self.names]
        met = [t for t in tensors if id(t) in self.names]
        if not met:
            return func(*args, **kwargs)
        if not data and func not in EXPANSIONS and func not in JOINS:
            with outside_transforms():
                result = func(*args, **kwargs)
            return self._made(func, result, met)
        ndim = max((t.ndim for t in data), default=0)
        label = self._labels[self.names[id(met[0])]]
        meetings = {id(t): Meeting(self.names[id(t)], label, func.__name__, ndim) for t in met}
        return self._met(Call(func, args, kwargs, data, met, meetings))

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        if isinstance(error[1], SecondDerivative):
            self._plan.by_copies = True  # from the next forward pass on

    def _unmet(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A call that meets no parameter."""
        if func in WAYS_BACK:
            with self:  # in a backward pass: checkpointing runs forward again in here
                return body(func)(*args, **kwargs)
        if func is torch.autograd.grad:
            return self._differentiated(args, kwargs)
        if self.is_forward and not self.may_mix and self._num_examples:
            self.may_mix = self._plan.moves.may_move(func, args, kwargs, self._num_examples)
        faster = FASTER.get(func)
        found = None if faster is None else faster(*args, **kwargs)
        return func(*args, **kwargs) if found is None else found

    def _differentiated(self, args: Any, kwargs: Any) -> Any:
        """`torch.autograd.grad` in the loss, in which checkpointing runs forward again."""
        was_forward, self.is_forward = self.is_forward, False
        try:
            with self:
                return body(torch.autograd.grad)(*args, **kwargs)
        finally:
            self.is_forward = was_forward

    def _meets(self, values: Any) -> bool:
        for value in values:
            if id(value) in self.names:
                return True
            if isinstance(value, list | tuple) and self._meets(value):
                return True
        return False

    def _met(self, call: Call) -> Any:
        if self.watcher is None:
            return self._taken_apart(call)
        return self.watcher.met(call.data, partial(self._taken_apart, call))

    def _taken_apart(self, call: Call) -> Any:
        func, args, kwargs = call.func, call.args, call.kwargs
        if self._num_examples == 0:
            return self._shared(call)
        check_transforms(call.first, call.data, by_copies=self._plan.by_copies)
        if not torch.is_grad_enabled() and not is_composite(func):
            for meeting in call.meetings.values():  # checkpointed: the gradient is yet to come
                self._count(meeting)
            return call.run()
        if func in EXPANSIONS:
            return self._expanded(call)
        if func in JOINS and not call.data:
            return self._rearranged(call)
        if func in ELEMENTWISE:
            return self._elementwise(call)
        if func is torch.Tensor.__setitem__ and call.met[0] is args[2]:
            return self._assigned(call)
        if not self._plan.by_copies:
            if func is torch.einsum and (letters := letters_of(*args)) is not None:
                return self._summed(call, letters)
            rule = RULES.get(func)
            found = None if rule is None else rule(self._const, *args, **kwargs)
            if found is not None and {id(p) for p, _ in found.uses} >= call.meetings.keys():
                return self._contracted(call, found)
        if is_composite(func):
            with self:
                return body(func)(*args, **kwargs)
        return self._mapped(call)

    def _const(self, tensor: Tensor) -> Tensor:
        name = self.names.get(id(tensor))
        if name is None:
            return tensor
        if self.constants is None:
            return tensor.detach()
        if name not in self.constants:
            self.constants[name] = tensor.detach().requires_grad_()
        return self.constants[name]

    def _made(self, func: Any, result: Any, met: list[Tensor]) -> Any:
        """What was made of parameters alone counts as one."""
        names = [self.names[id(t)] for t in met]
        roots = set().union(*(self.roots[name] for name in names))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and id(leaf) not in self.names:
                self.made_into |= roots
                if leaf.requires_grad:
                    label = f"{func.__name__}({self._labels[names[0]]})"
                    name = f"{label}#{len(self.derived)}"
                    self.names[id(leaf)], self._labels[name], self.roots[name] = name, label, roots
                    self.derived[name] = leaf
        return result

    def _shared(self, call: Call) -> Any:
        """A call in which no examples are to be found."""
        if self._num_examples == 1 and not call.is_in_place:
            return self._alone(call)
        result = call.run()
        leaves = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if any(t.requires_grad for t in leaves) and any(t.requires_grad for t in call.data):
            call.refuse_shared(self._num_examples)
        return self._made(call.func, result, call.met)

    def _placement(
        self, call: Call, shape: tuple[int, ...], leading: int, *, by_rows: bool = False
    ) -> Placement | None:
        possible = placements(shape, self._num_examples, leading)
        if by_rows and leading:
            possible.append(Placement("rows", leading))
        return self._plan.placement(call.first, possible, self._num_examples)

    def _free(
        self, call: Call, shape: tuple[int, ...], *, by_rows: bool = False
    ) -> Placement | None:
        """Where the examples are in what parameters are broadcast to: they must not have them."""
        possible = call.free_places(shape, self._num_examples, by_rows=by_rows)
        return self._plan.placement(call.first, possible, self._num_examples)

    def _expanded(self, call: Call) -> Any:
        """A parameter repeated for each example is its copies."""
        (p,), result = call.met, call.run()
        shape = tuple(result.shape)
        own = [broadcast_size(p, k, len(shape)) for k in range(len(shape))]
        stretched = {size for size, n in zip(own, shape, strict=True) if size != n}
        if not stretched <= {1} or len(shape) < p.ndim:
            return self._rearranged(call)
        placement = self._free(call, shape)
        if placement is None:
            return self._made(call.func, result, [p])
        return self._copies.lay(p, call.first, placement, shape).expand(shape)

    def _rearranged(self, call: Call) -> Any:
        """Parameters whose elements an operation lays out for each example are their copies."""
        if self._plan.chosen.get(call.first, ...) is None:
            return self._made(call.func, call.run(), call.met)
        size, parameters = self._num_examples, list({id(t): t for t in call.met}.values())
        elements = sources(call.func, call.args, call.kwargs, parameters)
        possible = places_of_copies(elements, size)
        placement = self._plan.placement(call.first, possible, size)
        if placement is None:
            return self._made(call.func, call.run(), call.met)
        copies = [self._copies.of_examples(p, call.meetings[id(p)], placement) for p in parameters]
        copies = [own.flatten(1) for own in copies]
        return placement.back(torch.cat(copies, 1)[:, placement.first(elements, size)[0]])

    def _elementwise(self, call: Call) -> Any:
        shapes = [t.shape for t in (*call.data, *call.met)]
        shape = torch.broadcast_shapes(*shapes)  # type: ignore[no-untyped-call]
        placement = None if call.is_in_place else self._free(call, shape, by_rows=True)
        if placement is None:
            return self._shared(call)

        def laid(leaf: Any) -> Any:
            if id(leaf) not in call.meetings:
                return leaf
            return self._copies.lay(leaf, call.meetings[id(leaf)], placement, shape)

        return call.func(*tree_map(laid, call.args), **tree_map(laid, call.kwargs))

    def _assigned(self, call: Call) -> Any:
        """`x[index] = p`."""
        x, index, p = call.args
        is_mask = isinstance(index, Tensor) and index.dtype == torch.bool
        shape = tuple(x.shape if is_mask else x[index].shape)
        placement = self._free(call, shape)
        if placement is None:
            if self._num_examples == 1:
                return self._alone(call)
            call.run()
            return self._made(call.func, x, [p])
        laid = self._copies.lay(p, call.first, placement, shape)
        return call.func(x, index, laid.expand(shape)[index] if is_mask else laid)

    def _contracted(self, call: Call, found: Met) -> Any:
        shape = tuple(found.output.shape)
        placement = self._placement(call, shape, found.leading, by_rows=True)
        if placement is None:
            return self._shared(call)
        uses = [(call.meetings[id(p)], make) for p, make in found.uses if id(p) in call.meetings]
        for meeting, _ in uses:
            self._count(meeting)
        receive, size = self._receive, self._num_examples

        def arrive(d: Tensor, *saved: Tensor) -> None:
            def laid(make: Callable[..., Contraction], place: Placement) -> Contraction:
                others = (place.first(as_factor(x, d), size) for x in saved)
                return make(place.first(d, size), *others)

            for meeting, make in uses:
                receive(meeting, placement, partial(laid, make), d)

        return tapped(found.output, arrive, *found.saved)

    def _summed(self, call: Call, letters: Letters) -> Any:
        """An einsum: example i is a letter of the output that no parameter has."""
        output = torch.einsum(call.args[0], *map(self._const, letters.operands))
        spelt = list(zip(letters.operands, letters.inputs, strict=True))
        taken = "".join(own for x, own in spelt if id(x) in call.meetings)
        shape = tuple(
            0 if x in taken else n for x, n in zip(letters.output, output.shape, strict=True)
        )
        placement = self._placement(call, shape, output.ndim)
        if placement is None:
            return self._shared(call)
        parts = [(x, own) for x, own in spelt if id(x) not in call.meetings]
        uses = [(x, own, call.meetings[id(x)]) for x, own in spelt if id(x) in call.meetings]
        for _, _, meeting in uses:
            self._count(meeting)
        receive, size, example = self._receive, self._num_examples, letters.output[placement.dim]

        def arrive(d: Tensor, *saved: Tensor) -> None:
            others = [(as_factor(x, d), own) for x, (_, own) in zip(saved, parts, strict=True)]
            parts_of = ((d, letters.output), *others)
            laid = [split(*part, example + letters.spare, placement, size) for part in parts_of]
            for p, own, meeting in uses:
                make = partial(make_summed, p.shape, own, example, laid)
                receive(meeting, placement, make, d)

        return tapped(output, arrive, *(x for x, _ in parts))

    def _mapped(self, call: Call) -> Any:
        size, largest = self._num_examples, max(call.data, key=lambda t: t.ndim)
        if size == 1:
            return self._alone(call)
        while True:
            placement = self._placement(call, tuple(largest.shape), largest.ndim)
            if placement is None:
                return self._shared(call)
            known = carriers(call.data, placement, largest.shape[placement.dim])
            flags = self._plan.carriers.setdefault(call.first, known)
            carried = {id(t): t for t, flag in zip(call.data, flags, strict=True) if flag}
            copies = {
                id(t): self._copies.of_examples(t, call.meetings[id(t)], placement)
                for t in call.met
            }
            try:
                return mapped(call[:3], copies, carried, placement, size)
            except (RuntimeError, ValueError, IndexError, TypeError):
                self._plan.reject(call.first, placement)

    def _alone(self, call: Call) -> Any:
        """Of a single example, to which whatever there is belongs."""
        only = {id(t): self._copies.of_examples(t, call.meetings[id(t)])[0] for t in call.met}
        args, kwargs = tree_map(lambda leaf: only.get(id(leaf), leaf), (call.args, call.kwargs))
        return call.func(*args, **kwargs)

    def _count(self, meeting: Meeting) -> None:
        if self.is_forward:
            self.uses[meeting.parameter] = self.uses.get(meeting.parameter, 0) + 1
