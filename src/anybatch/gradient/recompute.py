"""Compute the gradient of an update a second time, and leave no trace of it.

    before = StateBefore(model, objective, share)      before the update
    gradient = batch_gradient(...)
    with before.rewind():                              before the weights change
        again = batch_gradient(..., observe=...)       the same step, seen example by example

Within the block buffers have their values from before the update. At its end `.grad`, buffers,
attributes, the global generators and what the library knows of the model are as they were before
the block.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

from torch import nn

from anybatch.gradient.attributes import Attributes
from anybatch.gradient.buffers import Buffers
from anybatch.gradient.closures import preserve_contents
from anybatch.gradient.parameter_hooks import ParameterHooks
from anybatch.gradient.survey import Facts, survey_update
from anybatch.objective import Objective
from anybatch.pytree import list_leaves, sum_versions
from anybatch.randomness import preserve_generators

__all__ = ["StateBefore"]


class StateBefore:
    """State before an update that a second computation of its gradient needs.

    Args:
        model, objective, share: as for `batch_gradient`.
    """

    def __init__(self, model: nn.Module, objective: Objective, share: Any) -> None:
        self._model, self._objective, self._share = model, objective, share
        survey, _ = survey_update(model, objective.example_losses)
        self._parameters = [*survey.parameters.values(), *survey.frozen]
        self._buffers = Buffers(survey.buffers)
        self._versions = self._count_versions()

    def find_obstacle(self) -> str | None:
        """Return why the gradient cannot be computed again; None: it can."""
        if self._count_versions() != self._versions:
            return "the forward or backward pass has changed its batch or a parameter"
        return None

    @contextmanager
    def rewind(self) -> Iterator[None]:
        """Return to the state before the update; restore the present state at the end."""
        survey, facts = survey_update(self._model, self._objective.example_losses)
        fields_before, attributes = replace(facts), Attributes(self._model)
        outside = [p for module in facts.list_outside() for p in module.parameters()]
        gradients = [(p, p.grad) for p in [*self._parameters, *outside]]
        buffers, device = Buffers(survey.buffers), self._parameters[0].device
        try:
            with (
                preserve_generators(device),
                preserve_contents([self._objective.example_losses]),
                ParameterHooks(survey.hooked).disable(),
            ):
                self._buffers.restore()
                yield
        finally:
            attributes.restore()
            buffers.restore()
            for p, gradient in gradients:
                p.grad = gradient
            for field in fields(Facts):
                setattr(facts, field.name, getattr(fields_before, field.name))

    def _count_versions(self) -> int:
        return sum_versions([*self._parameters, *list_leaves(self._share)])
