"""Make updates by compiled functions, where they can be and where they are faster.

    compile=True      the shape of a batch that comes twice in a row is compiled
    compile="auto"    so, if the updates left are worth it; then compiled and plain updates take
                      turns, and the faster kind goes on

All others are plain: the first update, a short last batch, one whose numbers are not finite. The
1st, 10th, 100th, ... compiled update is compared with a plain one, see `compile_check`.
"""

import hashlib
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import is_
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor

from anybatch.errors import ModelError
from anybatch.gradient import ClipNorm, Gradient
from anybatch.gradient.self_check import CHECKED
from anybatch.gradient.survey import Survey, survey_model
from anybatch.layout import Layout
from anybatch.objective import Objective
from anybatch.optim.rates import follow_schedule
from anybatch.pytree import list_leaves, list_sizes, prepare_batch
from anybatch.runs.run import Run
from anybatch.runs.state import TrainingState
from anybatch.training.batches import Batch
from anybatch.training.compile_check import make_checked_update
from anybatch.training.compile_choice import Choice, hash_settings, read_choice, store_choice
from anybatch.training.compile_obstacles import find_model_obstacle, find_obstacle
from anybatch.training.whole_update import CompileError, NewGraphError, WholeUpdate

__all__ = ["Compile", "CompiledUpdates", "prepare_compiled"]

Compile = Literal["auto"] | bool
Compute = Callable[[], Gradient]  # the plain one of the batch
Shape = tuple[Any, ...]

_MAX_SHAPES = 4  # that one training compiles
_MAX_WAITS = 100  # updates in a row whose shape is new
_NUM_TIMED = 10  # updates of each kind that "auto" times
_RATIO, _COMPILING = 0.6, 15.0  # compiled over plain, and seconds of compiling, if not yet measured
_CPU = torch.device("cpu")

_log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class CompiledUpdates:
    """Compiled updates of one training, and the decision whether to make them.

    Args:
        set_rate: sets the learning rate of a step.
        settings: hash of everything besides shapes that the speed depends on.
        total: number of updates of the training.
        has_checks: whether updates after the first are compared too.
        reason: why all updates are plain; None: they need not be, as far as is known.
    """

    training: TrainingState
    objective: Objective
    clip: ClipNorm | None
    mode: Compile
    set_rate: Callable[[int], None]
    settings: str
    total: int
    run: Run | None
    has_checks: bool
    reason: str | None = None

    has_stepped: bool = False
    """Whether the last update has moved the weights already."""

    _functions: dict[Shape, WholeUpdate] = field(default_factory=dict)
    _survey: Survey | None = None  # of the model, as it was compiled
    _last: Shape | None = None  # of the last batch
    _num_shapes: int = 0  # compiled so far
    _num_compiled: int = 0  # updates so far
    _num_waits: int = 0  # updates in a row whose shape was new
    _is_decided: bool = False  # whether "auto" has measured
    _last_said: str = ""
    _stored: str = ""  # what an earlier training measured
    _seconds: float = 0.0  # of compiling
    _plain: deque[float] = field(default_factory=lambda: deque(maxlen=_NUM_TIMED))  # seconds
    _compiled: list[float] = field(default_factory=list)  # seconds

    def __post_init__(self) -> None:
        self._is_decided = self.mode is True

    def compute(self, batch: Batch, compute_plain: Compute) -> Gradient:
        """Compute the gradient of an update, and move the weights too if it is compiled.

        Raises:
            ModelError: with compile=True, an update that cannot be compiled; or a compiled update
                that differs from the plain one.
        """
        self.has_stepped = False
        if self.reason is not None:
            self._say(batch.step, "plain", self.reason)
            return compute_plain()
        try:
            return self._try_compiled(batch, compute_plain)
        except CompileError as error:
            self.give_up(error)
            self._say(batch.step, "plain", str(error))
            return compute_plain()

    def _try_compiled(self, batch: Batch, compute_plain: Compute) -> Gradient:
        """Make a compiled update if there is a function for it, or if it is time to compile one.

        Raises:
            CompileError: no further update is to be compiled; nothing has changed.
        """
        survey = survey_model(self.training.model)
        if self._survey is None or not _is_same(survey, self._survey):
            self._functions.clear()
            self._survey, self._last = survey, None
        for p in survey.frozen:
            p.grad = None  # as a plain update leaves it: the optimiser may hold it
        examples, shape = _prepare(batch)
        shape += _list_settings(self.training.optimizer)
        is_again, self._last = shape == self._last, shape
        function = self._functions.get(shape)
        if function is None:
            self._count_waits(is_again=is_again)
            if is_again and self._is_worth(batch.step):
                return self._compile(batch, examples, compute_plain)
            return self._make_plain(batch, compute_plain)
        if self._is_turn_of_plain():
            return self._make_plain(batch, compute_plain)
        return self._make_compiled(function, batch, examples, compute_plain)

    def _make_plain(self, batch: Batch, compute_plain: Compute) -> Gradient:
        """Make a plain update; before "auto" has decided with the optimiser's step, and timed."""
        if self.mode is True or self._is_decided:
            return compute_plain()
        self.set_rate(batch.step)
        start = time.perf_counter()
        gradient = compute_plain()
        if gradient.is_finite and bool(gradient.loss.isfinite()):
            self.training.optimizer.step()
            self.has_stepped = True
        if not self._functions or self._last in self._functions:
            self._plain.append(time.perf_counter() - start)
        return gradient

    def _make_compiled(
        self, function: WholeUpdate, batch: Batch, examples: Any, compute_plain: Compute
    ) -> Gradient:
        self.set_rate(batch.step)
        start = time.perf_counter()
        try:
            if self.has_checks and self._num_compiled + 1 in CHECKED:
                return self._check(function, batch, examples, compute_plain)
            gradient = function(examples, batch.ids)
        except NewGraphError:  # it is compiled again once a shape comes twice
            self._functions.clear()
            self._last = None
            return compute_plain()
        except CompileError as error:
            raise ModelError(
                f"At update {batch.step} {error}. The updates since the last check may be wrong. "
                f"Train without compile, and report this model to anybatch."
            ) from error
        if gradient is None:  # its numbers are not valid: the plain update says why
            return compute_plain()
        self.has_stepped = True
        self._num_compiled += 1
        if not self._is_decided:
            self._compiled.append(time.perf_counter() - start)
            if len(self._compiled) == _NUM_TIMED:
                self._decide(batch.step)
        return gradient

    def _compile(self, batch: Batch, examples: Any, compute_plain: Compute) -> Gradient:
        """Compile the update for the last shape, make it, and check it."""
        assert self._survey is not None
        assert self._last is not None
        model, start = self.training.model, time.perf_counter()
        if obstacle := find_model_obstacle(model, self.objective):
            raise CompileError(obstacle)
        self._num_shapes += 1
        if self._num_shapes > _MAX_SHAPES:
            raise CompileError(
                f"{_MAX_SHAPES} shapes of batches or states of the model are compiled already, and "
                f"another one came"
            )
        parameters, size = self._survey.parameters, len(batch.ids)
        function = WholeUpdate(self.training, self.objective, self.clip, parameters, size)
        self.set_rate(batch.step)
        gradient = self._check(function, batch, examples, compute_plain)
        if self.has_stepped:
            self._functions[self._last] = function
        self._seconds += time.perf_counter() - start
        self._plain.clear()  # the two kinds take turns from here on
        if self._is_decided and self.has_stepped:
            self._say(batch.step, "compiled", self._stored, compiling=self._seconds)
        return gradient

    def _check(
        self, function: WholeUpdate, batch: Batch, examples: Any, compute_plain: Compute
    ) -> Gradient:
        """Make a compiled update that is compared with a plain one; see `make_checked_update`."""
        training, objective = self.training, self.objective
        plain, self.has_stepped = make_checked_update(
            function, training, objective, batch.ids, examples, compute_plain
        )
        self._num_compiled += self.has_stepped
        return plain

    def _count_waits(self, *, is_again: bool) -> None:
        """Give up if no shape comes twice in a row."""
        self._num_waits = 0 if is_again or self._functions else self._num_waits + 1
        if self._num_waits > _MAX_WAITS:
            raise CompileError(
                f"in {_MAX_WAITS} updates no two batches in a row had the same shape, or a setting "
                f"of the optimiser besides the learning rate changes at each"
            )

    def _is_worth(self, step: int) -> bool:
        """Decide whether to compile now."""
        if self.mode is True or self._is_decided:
            return True
        stored = read_choice(self._make_key())
        if stored is None and len(self._plain) < _NUM_TIMED:
            return False
        if stored is None:
            plain = median(self._plain)
            stored = Choice(plain, _RATIO * plain, _COMPILING)
        elif not stored.is_faster:
            raise CompileError(f"an earlier training measured {stored}")
        else:
            self._stored = f"an earlier training measured {stored}"
        if (self.total - step) * (stored.plain - stored.compiled) < stored.compiling:
            raise CompileError(
                f"compiling takes longer than it would save in {self.total - step} updates of "
                f"{stored.plain * 1e3:.3g} ms"
            )
        self._is_decided = bool(self._stored)
        return True

    def _is_turn_of_plain(self) -> bool:
        return (
            self.mode == "auto"
            and not self._is_decided
            and (len(self._plain) <= len(self._compiled))
        )

    def _decide(self, step: int) -> None:
        """Keep the faster kind of update, and store the choice."""
        choice = Choice(median(self._plain), median(self._compiled), self._seconds)
        self._is_decided = True
        store_choice(self._make_key(), choice)
        if not choice.is_faster:
            self.reason = str(choice)
            self._functions.clear()
        kind = "compiled" if choice.is_faster else "plain"
        self._say(step, kind, str(choice), **choice._asdict())

    def _make_key(self) -> str:
        content = repr((self.settings, self._last, torch.get_num_threads()))
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def give_up(self, error: CompileError) -> None:
        """Make only plain updates from here on; with compile=True raise the reason."""
        if self.mode is True:
            raise ModelError(
                f"compile=True cannot compile this training: {error}. Leave compile out, or use "
                f'"auto", which then makes plain updates.'
            ) from error
        self.reason = str(error)
        self._functions.clear()

    def _say(self, step: int, kind: str, why: str, **seconds: float) -> None:
        """Say and record once which kind of update goes on, and why."""
        if self._last_said == kind:
            return
        self._last_said = kind
        row = {"kind": "compile", "step": step, "updates": kind, "why": why, "seconds": seconds}
        if self.run is not None:
            self.run.record({name: value for name, value in row.items() if value not in ("", {})})
        if self.mode == "auto":
            _log.warning('compile="auto" goes on with %s updates: %s.', kind, why)


def prepare_compiled(
    mode: Compile, loop: Any, settings: dict[str, Any], layout: Layout | None
) -> CompiledUpdates:
    """Prepare compiled updates for a loop, and add the choice to its settings.

    Args:
        loop: that of `steps`.
        settings: of the run, which a resume compares.

    Raises:
        ModelError: no such choice; or with `bitwise`, or with compile=True a training that cannot
            be compiled.
    """
    if not (mode is True or mode == "auto"):
        raise ModelError(f'compile is {mode!r}. It must be True, False or "auto".')
    if loop.how["bitwise"]:
        raise ModelError(
            "compile with bitwise=True. Compiled kernels round in another order, so the bits would "
            "differ. Leave one of them out."
        )
    training, optimizer = loop.training, loop.training.optimizer
    settings["compile"] = mode

    def set_rate(step: int) -> None:
        follow_schedule(optimizer, loop.schedule, loop.order.examples_before(step))

    updates = CompiledUpdates(
        training=training,
        objective=loop.objective,
        clip=loop.how["clip"],
        mode=mode,
        set_rate=set_rate,
        settings=hash_settings(settings, training.model),
        total=loop.total,
        run=loop.run,
        has_checks=bool(loop.how["self_check"]),
    )
    options = loop.how | {"layout": layout, "group": loop.group, "spikes": loop.finder}
    if obstacle := find_obstacle(training.model, loop.objective, optimizer, options):
        updates.give_up(CompileError(obstacle))
    return updates


def _prepare(batch: Batch) -> tuple[Any, Shape]:
    """Return the batch as the loss takes it, and its shape."""
    if list_sizes(batch.examples) is not None:
        raise CompileError("the batch comes cut, as MicroBatches")
    examples = prepare_batch(batch.examples, _CPU)
    shape: Shape = (type(examples),)
    for leaf in list_leaves(examples):
        if not isinstance(leaf, Tensor) or leaf.requires_grad or leaf.layout != torch.strided:
            raise CompileError(f"the batch holds a {type(leaf).__name__}, not only plain tensors")
        shape += (leaf.shape, leaf.dtype)
    return examples, shape


def _list_settings(optimizer: Any) -> Shape:
    """List the settings of an optimiser that a compiled step depends on."""
    return tuple(
        (name, value)
        for group in optimizer.param_groups
        for name, value in group.items()
        if name not in ("lr", "initial_lr") and isinstance(value, bool | int | float | tuple)
    )


def _is_same(survey: Survey, before: Survey) -> bool:
    """Return whether a model has the same trainable parameters and modes as before."""
    if survey.mode != before.mode or survey.parameters.keys() != before.parameters.keys():
        return False
    if survey.hooked or survey.layer is not None:
        return False
    return all(map(is_, survey.parameters.values(), before.parameters.values()))
