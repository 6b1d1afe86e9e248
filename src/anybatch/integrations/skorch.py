"""Compute the exact gradient in a `NeuralNet` of skorch.

    net = ExactNet(Module, objective=ab.Objective(losses), layout=ab.Layout(32), max_epochs=10)
    net.fit(X, y)

Batches of `batch_size` examples are cut by `layout`, and the update stays that of the whole batch.
Callbacks, optimisers, validation and `fit` stay skorch's.
"""

from typing import Any

import torch
from torch import Tensor

from anybatch.errors import ModelError
from anybatch.extras import import_extra
from anybatch.gradient import batch_gradient
from anybatch.layout import Layout
from anybatch.ledger import Observe
from anybatch.objective import Objective
from anybatch.pytree import take_examples
from anybatch.randomness import Key

__all__ = ["ExactNet"]

_skorch = import_extra("skorch", "anybatch[skorch]", "this is a part of skorch", ModelError)
_NeuralNet: Any = _skorch.NeuralNet


class _MeanOfLosses(torch.nn.Module):
    """Criterion of the validation loss: the objective computes the training loss."""

    def forward(self, predictions: Tensor, targets: Tensor) -> Tensor:
        raise NotImplementedError("ExactNet computes losses by its objective.")


class ExactNet(_NeuralNet):  # type: ignore[misc]
    """`skorch.NeuralNet` whose updates are those of an objective, however a batch is cut.

    Args:
        module: class or instance of a torch module, as for `NeuralNet`.
        objective: example losses `losses(module, (X, y))`, reduction and penalty. The validation
            loss is its mean over the batches of skorch.
        layout: how a batch is cut into micro-batches; None: not at all.
        observe: which per-example quantities `gradient_.ledger` is to hold.
        seed: of the module's random numbers.
        kwargs: as for `NeuralNet`.

    Attributes:
        gradient_: `Gradient` of the last update.

    Example:
        >>> import numpy as np
        >>> def losses(module, batch):
        ...     return (module(batch[0])[:, 0] - batch[1]) ** 2
        >>> net = ExactNet(
        ...     torch.nn.Linear(2, 1), objective=Objective(losses), max_epochs=1, verbose=0
        ... )
        >>> net = net.fit(np.ones((8, 2), np.float32), np.ones(8, np.float32))
        >>> net.gradient_.num_examples
        6
    """

    def __init__(
        self,
        module: Any,
        *args: Any,
        objective: Objective | None = None,
        layout: Layout | None = None,
        observe: Observe | None = None,
        seed: int = 0,
        criterion: Any = _MeanOfLosses,
        **kwargs: Any,
    ) -> None:
        super().__init__(module, criterion, *args, **kwargs)
        self.objective, self.layout, self.observe, self.seed = objective, layout, observe, seed

    def initialize(self) -> "ExactNet":
        """Initialise as skorch does, and count updates from 0."""
        if self.objective is None:
            raise ModelError(
                "ExactNet has no objective. Pass objective=ab.Objective(losses), where "
                "losses(module, (X, y)) returns one loss for each example."
            )
        super().initialize()
        self.num_updates_ = 0
        return self

    objective: Any
    num_updates_: int

    def train_step(self, batch: Any, **fit_params: Any) -> Any:
        """Make one update; all its evaluations draw the same random numbers."""
        result = super().train_step(batch, **fit_params)
        self.num_updates_ += 1
        return result

    def train_step_single(self, batch: Any, **fit_params: Any) -> dict[str, Any]:
        """Leave the gradient of a batch in `.grad`."""
        self._set_training(True)
        examples = self._to_device(batch)
        self.gradient_ = batch_gradient(
            self.module_,
            self.objective,
            examples,
            key=Key(self.seed, self.num_updates_),
            layout=self.layout,
            observe=self.observe,
        )
        predictions = self.gradient_.outputs.get("predictions")
        if predictions is None:  # callbacks that score the training data ask for them
            with torch.no_grad():
                predictions = self.infer(examples[0], **fit_params)
        return {"loss": self.gradient_.loss.detach(), "y_pred": predictions}

    def validation_step(self, batch: Any, **fit_params: Any) -> dict[str, Any]:
        """Compute the objective's data loss of a batch."""
        self._set_training(False)
        examples = self._to_device(batch)
        with torch.no_grad():
            losses = self.objective.losses(self.module_, examples, len(examples[1]))
            reduced = self.objective.reduce(losses)
            predictions = self.infer(examples[0], **fit_params)
        loss = torch.stack([result.value for result in reduced.values()]).sum()
        return {"loss": loss, "y_pred": predictions}

    def _to_device(self, batch: Any) -> Any:
        utils: Any = _skorch.utils
        inputs, targets = utils.to_tensor(batch, self.device)
        return take_examples((inputs, targets), 0, len(targets))
