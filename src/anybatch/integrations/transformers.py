"""Compute the exact gradient in the `Trainer` of transformers; observe any trainer.

    ExactTrainer(model=..., args=..., train_dataset=...)       in place of Trainer
    class MyTrainer(ExactGradient, SFTTrainer): ...            before any subclass of it
    Trainer(..., callbacks=[ledger := LedgerCallback()])       norms only; the update is unchanged

The Trainer hands over micro-batches one by one. `ExactGradient` keeps those of an update, and with
the last one it leaves the gradient of all in `.grad`. Clipping, optimiser, schedules, logs,
evaluation and checkpoints stay the Trainer's.
"""

from collections.abc import Callable, Mapping
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from anybatch.distributed import get_world
from anybatch.errors import ModelError
from anybatch.extras import import_extra
from anybatch.gradient import Gradient
from anybatch.integrations.accelerate import find_precision, use_bare_forward
from anybatch.integrations.observation import UpdateObserver, compute_and_watch
from anybatch.integrations.transformers_losses import example_losses
from anybatch.ledger import Observe
from anybatch.objective import Objective
from anybatch.precision import autocast
from anybatch.pytree import MicroBatches, count_examples
from anybatch.randomness import Key, preserve_generators, seed_generators
from anybatch.training.evaluation import preserve_buffers
from anybatch.training.spike_finder import SpikeFinder
from anybatch.training.spikes import History, Spike, SpikeWatch

__all__ = ["ExactGradient", "ExactTrainer", "LedgerCallback", "example_losses"]

_transformers = import_extra(
    "transformers", "anybatch[transformers]", "this is a part of transformers", ModelError
)

_Trainer: Any = _transformers.Trainer
_TrainerCallback: Any = _transformers.TrainerCallback
_ExportableState: Any = _transformers.trainer_callback.ExportableState

_SLACK = {"float32": 1e-4, "bfloat16": 0.05, "float16": 0.02}


class ExactGradient:
    """Mix-in before `transformers.Trainer` or a subclass: one exact gradient for each update.

    If the model draws random numbers (dropout), each per-device batch is a grain: it draws from
    (args.seed, step, its place in the batch).

    Args:
        objective: None: `Objective(example_losses(model))`, the mean over tokens or examples. Its
            loss is compared with the trainer's own at the first update.
        observe: which per-example quantities `gradient.ledger` is to hold.
        spikes: an `ab.SpikeWatch()`, which names the examples behind a spike.

    Attributes:
        gradient: of the last update; see `Gradient`.
        spikes: list of each `Spike` so far. The id of an example is its place in the batch of that
            update, over all ranks.

    Raises:
        ModelError: the trainer uses what cannot be combined (DeepSpeed, FSDP, several GPUs in one
            process), or its own loss is another than the objective's.

    Example:
        >>> import transformers
        >>> class Mine(ExactGradient, transformers.Trainer):
        ...     pass
    """

    gradient: Gradient | None = None

    def __init__(
        self,
        *args: Any,
        objective: Objective | None = None,
        observe: Observe | None = None,
        spikes: SpikeWatch | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        trainer: Any = self
        _check_trainer(trainer)
        self._compares = objective is None
        if objective is None:
            smoothing = trainer.args.label_smoothing_factor
            objective = Objective(example_losses(trainer.model, label_smoothing=smoothing))
        self.objective, self.observe = objective, observe
        self.spikes: list[Spike] = []
        self._finder = None if spikes is None else SpikeFinder(spikes)
        self._watched_state: Any = None  # the Trainer's, which is new in each call of `train`
        self._micro_batches: list[Any] = []
        self._step: int | None = None  # update of these micro-batches
        self._last_step: int | None = None  # update of the gradient
        trainer.add_callback(_Guard(self))

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """Keep a micro-batch; with the last one of an update, leave its gradient in `.grad`."""
        trainer: Any = self
        model.train()
        if hasattr(trainer.optimizer, "train") and callable(trainer.optimizer.train):
            trainer.optimizer.train()
        if self._step != trainer.state.global_step:  # an update that was left is not gone on with
            self._micro_batches, self._step = [], trainer.state.global_step
        self._micro_batches.append(dict(trainer._prepare_inputs(inputs)))
        if not trainer.accelerator.sync_gradients:
            return torch.zeros((), device=trainer.args.device)
        share, self._micro_batches = MicroBatches(self._micro_batches), []
        with use_bare_forward(trainer.accelerator.unwrap_model(model)) as bare:
            if self._compares:
                self._compare(bare, share.batches[0])
                self._compares = False
            self.gradient = self._compute(bare, share)
        self._last_step = trainer.state.global_step
        return self.gradient.loss.detach().float()

    def _compute(self, bare: nn.Module, share: MicroBatches) -> Gradient:
        """Compute the gradient of an update, and look for a spike."""
        trainer: Any = self
        if self._finder is not None and self._watched_state is not trainer.state:
            self._watched_state = trainer.state
            _load_history(trainer, self._finder.history)
        step = trainer.state.global_step
        gradient, spike = compute_and_watch(
            self._finder,
            step,
            bare,
            self.objective,
            share,
            observe=self.observe,
            scaler=trainer.accelerator.scaler,
            key=Key(trainer.args.seed, step),
            group=get_world(trainer.args.world_size),
            precision=find_precision(trainer.accelerator),
        )
        self.spikes += [] if spike is None else [spike]
        return gradient

    def _compare(self, bare: nn.Module, batch: Mapping[str, Any]) -> None:
        """Compare the trainer's own loss of a micro-batch with the objective's."""
        trainer: Any = self
        device, precision = trainer.args.device, find_precision(trainer.accelerator)
        ours = self.objective.example_losses
        with preserve_buffers(bare), preserve_generators(device), torch.no_grad():
            seed_generators(0, device)
            with autocast(precision, device):
                losses = self.objective.losses(bare, dict(batch), count_examples(batch))
            expected = sum(float(r.value) for r in self.objective.reduce(losses).values())
            seed_generators(0, device)
            with trainer.compute_loss_context_manager(), autocast(precision, device):
                theirs = float(trainer.compute_loss(bare, dict(batch)))
        if abs(theirs - expected) > _SLACK[precision] * max(abs(theirs), abs(expected), 1e-3):
            raise ModelError(
                f"On the first micro-batch {type(self).__name__}.compute_loss gives {theirs:.6g}, "
                f"and the mean of {getattr(ours, '__name__', 'example_losses')} gives "
                f"{expected:.6g}: this trainer minimises another loss. Pass the one that you mean, "
                f"objective=ab.Objective(losses), where losses(model, batch) returns one loss for "
                f"each example."
            )


class _Guard(_TrainerCallback):  # type: ignore[misc]
    """Refuses an update whose gradient is not the mix-in's."""

    def __init__(self, trainer: ExactGradient) -> None:
        self._trainer = ref(trainer)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check where the gradient of this update comes from."""
        trainer = self._trainer()
        if trainer is not None and trainer._last_step != state.global_step:
            raise ModelError(
                f"{type(trainer).__name__}.training_step takes the place of ExactGradient's, so "
                f"the gradient of this update is not exact. Put ExactGradient before the trainer "
                f"in the list of base classes, and call super().training_step(...)."
            )


class ExactTrainer(ExactGradient, _Trainer):  # type: ignore[misc]
    """`transformers.Trainer` with the exact gradient; see `ExactGradient`.

    Example:
        >>> ExactTrainer.__mro__[1].__name__
        'ExactGradient'
    """


class _HistoryCallback(_TrainerCallback, _ExportableState):  # type: ignore[misc]
    """Puts the history of a watch into the state that the Trainer saves with its checkpoints."""

    def __init__(self, history: History | None = None) -> None:
        self._history = history

    def state(self) -> dict[str, Any]:
        """Return the history as the Trainer saves it."""
        values = {} if self._history is None else self._history.state_dict()
        return {"args": {}, "attributes": {"values": values}}


class LedgerCallback(UpdateObserver, _TrainerCallback):  # type: ignore[misc]
    """Callback for an unchanged `Trainer`: the norm of what each example adds to `.grad`.

    Attributes:
        norms: [B] of the last update, in the order in which this process has read the examples;
            None before the first update.
        ledger: `Ledger` of the last update.

    Example:
        >>> callback = LedgerCallback()
        >>> callback.norms is None
        True
    """

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to observe an update; one that was left is not gone on with."""
        self._stop()
        self._begin(kwargs["model"])

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the observation; the ledger is complete."""
        self._complete()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop watching a model whose update was left."""
        self._stop()


def _load_history(trainer: Any, history: History) -> None:
    """Load the history of a watch from the checkpoint that a training goes on from."""
    name = _HistoryCallback.__name__
    saved = trainer.state.stateful_callbacks.get(name, {}).get("attributes", {}).get("values")
    if saved:
        history.load_state_dict(saved)
    trainer.remove_callback(_HistoryCallback)  # the Trainer may have made one of its own
    callback = _HistoryCallback(history)
    trainer.add_callback(callback)
    trainer.state.stateful_callbacks[name] = callback.state()


def _check_trainer(trainer: Any) -> None:
    """Refuse what shards the model or splits batches in a way that is not known here."""
    reasons: dict[str, Callable[[], bool]] = {
        "DeepSpeed": lambda: trainer.is_deepspeed_enabled,
        "FSDP": lambda: trainer.is_fsdp_enabled,
        "several GPUs in one process (DataParallel)": lambda: trainer.args.n_gpu > 1,
    }
    for name, uses in reasons.items():
        if uses():
            raise ModelError(
                f"The Trainer uses {name}, which ExactGradient does not support. Start one process "
                f"a GPU with torchrun, or use the plain Trainer with LedgerCallback."
            )
