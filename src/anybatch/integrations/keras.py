"""Compute the exact gradient in a model of Keras 3 with the torch backend.

    model = ExactModel(inputs, outputs, objective=ab.Objective(losses), layout=ab.Layout(32))
    model.compile(optimizer="adam");  model.fit(x, y, batch_size=256)

Batches of `fit` are cut by `layout`, and the update stays that of the whole batch. Optimisers,
callbacks and metrics stay those of Keras.
"""

import os
from typing import Any

import torch

from anybatch.errors import ModelError
from anybatch.example_losses import list_outputs
from anybatch.extras import import_extra
from anybatch.gradient import batch_gradient
from anybatch.layout import Layout
from anybatch.ledger import Observe
from anybatch.objective import Objective
from anybatch.randomness import Key

__all__ = ["ExactModel"]

os.environ.setdefault("KERAS_BACKEND", "torch")
_keras = import_extra("keras", "anybatch[keras]", "this is a part of keras", ModelError)
if _keras.backend.backend() != "torch":
    raise ModelError(
        f"Keras runs on {_keras.backend.backend()!r}. ExactModel needs torch: set the environment "
        f"variable KERAS_BACKEND=torch before keras is imported."
    )
_Model: Any = _keras.Model


class ExactModel(_Model):  # type: ignore[misc]
    """`keras.Model` whose updates are those of an objective, however a batch is cut.

    Args:
        args, kwargs: as for `keras.Model`.
        objective: example losses `losses(model, (x, y))`, reduction and penalty. With the output
            "predictions" of `ab.ExampleLosses` the metrics of `compile` are computed.
        layout: how a batch is cut into micro-batches; None: not at all.
        observe: which per-example quantities `gradient.ledger` is to hold.
        seed: of the model's random numbers that torch draws.

    Attributes:
        gradient: `Gradient` of the last update.

    Raises:
        ModelError: Keras runs on another backend, or there is no objective.

    Example:
        >>> import keras
        >>> def losses(model, batch):
        ...     return (model(batch[0])[:, 0] - batch[1]) ** 2
        >>> inputs = keras.Input((2,))
        >>> model = ExactModel(inputs, keras.layers.Dense(1)(inputs), objective=Objective(losses))
        >>> model.compile(optimizer="sgd")
        >>> _ = model.fit(torch.ones(8, 2), torch.ones(8), batch_size=4, verbose=0)
        >>> model.gradient.num_examples
        4
    """

    def __init__(
        self,
        *args: Any,
        objective: Objective | None = None,
        layout: Layout | None = None,
        observe: Observe | None = None,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.objective: Any = objective
        self.layout, self.observe, self.seed = layout, observe, seed
        self.gradient: Any = None
        self._num_updates, self._trains = 0, False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model; within an update with training=True, so that dropout is active."""
        if self._trains:
            kwargs.setdefault("training", True)
        return super().__call__(*args, **kwargs)

    def train_step(self, data: Any) -> dict[str, Any]:
        """Make one update from a batch of `fit`."""
        x, y = self._unpack(data)
        self._trains = True
        try:
            self.gradient = batch_gradient(
                self,
                self.objective,
                (x, y),
                key=Key(self.seed, self._num_updates),
                layout=self.layout,
                observe=self.observe,
            )
        finally:
            self._trains = False
        self._num_updates += 1
        variables = list(self.trainable_weights)
        with torch.no_grad():
            self.optimizer.apply([v.value.grad for v in variables], variables)
        return self._report(x, y, self.gradient.loss.detach(), self.gradient.outputs)

    def test_step(self, data: Any) -> dict[str, Any]:
        """Compute the objective's data loss of a batch, and the metrics."""
        x, y = self._unpack(data)
        with torch.no_grad():
            losses = self.objective.losses(self, (x, y), len(x))
            reduced = self.objective.reduce(losses)
        loss = torch.stack([result.value for result in reduced.values()]).sum()
        return self._report(x, y, loss, list_outputs(losses))

    def _unpack(self, data: Any) -> Any:
        if self.objective is None:
            raise ModelError(
                "ExactModel has no objective. Pass objective=ab.Objective(losses), where "
                "losses(model, (x, y)) returns one loss for each example."
            )
        x, y, sample_weight = _keras.utils.unpack_x_y_sample_weight(data)
        if sample_weight is not None:
            raise ModelError(
                "fit got sample_weight, which the objective does not see. Put the weights into y, "
                "and return ab.ExampleLosses(values, counts=weights)."
            )
        return x, y

    def _report(self, x: Any, y: Any, loss: Any, outputs: Any) -> dict[str, Any]:
        """Return the running loss, and the metrics if the losses have the output "predictions"."""
        with torch.no_grad():
            self._loss_tracker.update_state(loss, sample_weight=len(x))
            if "predictions" in outputs:
                report: dict[str, Any] = self.compute_metrics(x, y, outputs["predictions"])
                return report
            return {"loss": self._loss_tracker.result()}
