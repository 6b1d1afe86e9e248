"""Compute the exact gradient in Lightning's automatic optimisation; observe any module.

    class Mine(ExactModule, LightningModule):          example losses in place of training_step
        objective = ab.Objective(losses)               losses(module, batch) -> [B]

    Trainer(callbacks=[ledger := LedgerCallback()])    norms only; the module stays as it is

The Trainer hands over micro-batches one by one. `ExactModule` keeps those of an update
(`accumulate_grad_batches`), and with the last one it leaves the gradient of all in `.grad`.
Clipping, optimisers, schedules, logs and checkpoints stay the Trainer's.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from anybatch.distributed import get_world
from anybatch.errors import ModelError
from anybatch.extras import import_extra
from anybatch.gradient import Gradient
from anybatch.integrations.observation import UpdateObserver, compute_and_watch
from anybatch.layout import Layout
from anybatch.ledger import Observe
from anybatch.objective import Objective
from anybatch.precision import Precision
from anybatch.pytree import MicroBatches
from anybatch.randomness import Key
from anybatch.training.spike_finder import SpikeFinder
from anybatch.training.spikes import Spike, SpikeWatch

__all__ = ["ExactModule", "LedgerCallback"]

_lightning = import_extra(
    "lightning.pytorch", "anybatch[lightning]", "this is a part of lightning", ModelError
)
_Callback: Any = _lightning.Callback

_PRECISIONS: dict[str, Precision] = {
    "bf16-mixed": "bfloat16",
    "16-mixed": "float16",
    **dict.fromkeys(("32-true", "64-true", "bf16-true", "16-true"), "float32"),  # no autocast
}


class ExactModule:
    """Mix-in before `LightningModule`: one exact gradient for each update.

    Each batch of the loader is a micro-batch. If the module draws random numbers, it is a grain: it
    draws from (seed, global_step, its place in the update).

    Attributes:
        objective: example losses `losses(module, batch)`, reduction and penalty; set it.
        layout: a further cut of each batch; None: as the loader gives them.
        observe: which per-example quantities `gradient.ledger` is to hold.
        seed: of the module's random numbers.
        spikes: in the class, an `ab.SpikeWatch()`, which names the examples behind a spike; on the
            module, once training has begun, the list of each `Spike` so far. The id of an example
            is its place in the batch of that update, over all ranks.
        gradient: `Gradient` of the last update.

    Raises:
        ModelError: no objective, manual optimisation, or a strategy that shards the model.

    Example:
        >>> import lightning.pytorch as pl
        >>> class Mine(ExactModule, pl.LightningModule):
        ...     objective = Objective(lambda module, batch: module(batch)[:, 0] ** 2)
        >>> Mine.observe is None
        True
    """

    objective: ClassVar[Objective | None] = None
    layout: Layout | None = None
    observe: Observe | None = None
    seed: int = 0
    spikes: SpikeWatch | list[Spike] | None = None
    gradient: Gradient | None = None

    _finder: SpikeFinder | None = None

    _micro_batches: tuple[Any, ...] = ()

    def on_train_start(self) -> None:
        """Check the trainer, and leave the gradients of the ranks to the update."""
        module: Any = self
        if self.objective is None:
            raise ModelError(
                f"{type(self).__name__} has no objective. Write objective = ab.Objective(losses) "
                f"in the class, where losses(module, batch) returns one loss for each example."
            )
        if not module.automatic_optimization:
            raise ModelError(
                "automatic_optimization is False. In manual optimisation call ab.batch_gradient in "
                "training_step, in place of manual_backward, and leave ExactModule out."
            )
        wrapped = module.trainer.model
        if isinstance(wrapped, DistributedDataParallel):
            wrapped.require_backward_grad_sync = False  # the update adds up the ranks' gradients
        elif wrapped is not self:
            raise ModelError(
                f"The strategy wraps the module in {type(wrapped).__name__}. ExactModule works on "
                f"one device and with 'ddp'."
            )
        if module.trainer.precision not in _PRECISIONS:
            raise ModelError(
                f"The Trainer's precision is {module.trainer.precision!r}, whose forward pass "
                f"ExactModule does not know. It must be one of {', '.join(_PRECISIONS)}."
            )
        self._find_spikes()
        super().on_train_start()  # type: ignore[misc]

    def _find_spikes(self) -> SpikeFinder | None:
        """Return the finder of spikes, made at the first call; None: the class has no watch."""
        if self._finder is None and isinstance(self.spikes, SpikeWatch):
            self._finder, self.spikes = SpikeFinder(self.spikes), []
        return self._finder

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the history of the watch to a checkpoint."""
        if self._finder is not None:
            checkpoint["anybatch_spikes"] = self._finder.history.state_dict()
        super().on_save_checkpoint(checkpoint)  # type: ignore[misc]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Load the history of the watch from a checkpoint."""
        finder = self._find_spikes()
        if finder is not None and "anybatch_spikes" in checkpoint:
            finder.history.load_state_dict(checkpoint["anybatch_spikes"])
        super().on_load_checkpoint(checkpoint)  # type: ignore[misc]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Keep a micro-batch."""
        module: Any = self
        self._micro_batches = (*self._micro_batches, batch)
        return torch.zeros((), device=module.device, requires_grad=True)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Leave the gradient of an update in `.grad`, with its last micro-batch."""
        module: Any = self
        trainer = module.trainer
        if not self._micro_batches:
            raise ModelError(
                f"{type(self).__name__}.training_step takes the place of ExactModule's, which "
                f"keeps the batches. Leave it out: the objective computes the losses. Put logs "
                f"into log_gradient."
            )
        if trainer.fit_loop.epoch_loop.batch_idx % trainer.accumulate_grad_batches == 0:
            self._micro_batches = self._micro_batches[-1:]  # an update that was left is dropped
        size = len(self._micro_batches)
        if size < trainer.accumulate_grad_batches and not trainer.is_last_batch:
            return
        share, self._micro_batches = MicroBatches(list(self._micro_batches)), ()
        self.gradient = self._compute(share)
        self.log_gradient(self.gradient)

    def _compute(self, share: MicroBatches) -> Gradient:
        """Compute the gradient of an update, and look for a spike."""
        module: Any = self
        assert self.objective is not None
        trainer, step = module.trainer, module.trainer.global_step
        gradient, spike = compute_and_watch(
            self._finder,
            step,
            module,
            self.objective,
            share,
            observe=self.observe,
            scaler=getattr(trainer.precision_plugin, "scaler", None),
            key=Key(self.seed, step),
            layout=self.layout,
            group=get_world(trainer.world_size),
            precision=_PRECISIONS[trainer.precision],
        )
        if spike is not None and isinstance(self.spikes, list):
            self.spikes.append(spike)
        return gradient

    def log_gradient(self, gradient: Gradient) -> None:
        """Log the loss of an update as "train_loss"; override it to log more."""
        module: Any = self
        module.log("train_loss", gradient.loss.detach(), batch_size=gradient.num_examples)


class LedgerCallback(UpdateObserver, _Callback):  # type: ignore[misc]
    """Callback for an unchanged module: the norm of what each example adds to `.grad`.

    Attributes:
        norms: [B] of the last update, in the order in which this process has read the examples;
            None before the first update.
        ledger: `Ledger` of the last update.

    Example:
        >>> callback = LedgerCallback()
        >>> callback.norms is None
        True
    """

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        """Begin to observe, at the first micro-batch of an update."""
        self._begin(module)

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        """End the observation; the ledger is complete."""
        self._complete()

    def on_train_end(self, trainer: Any, module: Any) -> None:
        """Stop watching a module whose update was left."""
        self._stop()

    def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:
        """Stop watching a module whose update has failed."""
        self._stop(exception)
