"""Networks and data of `trainers.py`, and one epoch by each trainer that runs on PyTorch.

Every function takes a network, training data, validation data (`None`: no evaluation), the batch
size and the number of micro-batches of an update, and returns the loss on the validation data.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import anybatch as ab
from anybatch.zoo import gpt, lenet, mlp
from observed_models import resnet18

__all__ = [
    "CUT",
    "CUT_WAYS",
    "EPOCHS",
    "LR",
    "MOMENTUM",
    "PIECES",
    "RAGGED",
    "STARTS",
    "WAYS",
    "Case",
    "Epoch",
    "Way",
    "compute_loss",
    "evaluate_by_hand",
]

LR, MOMENTUM = 0.01, 0.9
PIECES = 16
Data = tuple[Tensor, Tensor]
Way = Callable[[nn.Module, Data, Data | None, int, int], float | None]


@dataclass(frozen=True)
class Case:
    """Network, data and batch size."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]  # of one input
    batch_size: int
    num_examples: int
    num_validation: int = 0
    vocabulary: int = 0  # of inputs and targets that are tokens
    dtype: torch.dtype = torch.float32

    def make_network(self) -> nn.Module:
        """Make the same network each time."""
        torch.manual_seed(0)
        return self.make().to(self.dtype)

    def make_data(self) -> tuple[Data, Data | None]:
        """Make the same random training and validation data each time."""
        generator = torch.Generator().manual_seed(1)
        size = self.num_examples + self.num_validation
        if self.vocabulary:
            shape = size, self.shape[0] + 1
            tokens = torch.randint(self.vocabulary, shape, generator=generator)
            columns = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        else:
            inputs = torch.rand(size, *self.shape, generator=generator, dtype=self.dtype)
            columns = inputs, torch.randint(10, (size,), generator=generator)
        train, held_out = zip(
            *(each.tensor_split([self.num_examples]) for each in columns), strict=True
        )
        return train, held_out if self.num_validation else None


@dataclass(frozen=True)
class Epoch:
    """Seconds of an epoch with its evaluation, and what is left of it."""

    processor_seconds: float
    wall_seconds: float
    validation_loss: Any = None  # a number, if there are validation data
    train_loss: Any = None  # a number after the first epoch
    change: Any = None  # of the weights, a vector after the first epoch of a module


EPOCHS = {
    "LeNet 28x28, B=64": Case(partial(lenet, 28), (1, 28, 28), 64, 3840, 640),
    "ResNet-18, B=32": Case(resnet18, (3, 32, 32), 32, 128, 32),
    "GPT d=256, T=128, B=16": Case(partial(gpt, 256, 256, 4, 4, 128), (128,), 16, 80, 16, 256),
}
STARTS = {"LeNet 28x28, one update": Case(partial(lenet, 28), (1, 28, 28), 64, 64, 64)}
"""Its time beyond that by hand is what a trainer spends once a run."""
CUT = {
    "784-128-10, B=256": Case(partial(mlp, [784], [128]), (784,), 256, 2**16),
    "LeNet 28x28, B=256": Case(partial(lenet, 28), (1, 28, 28), 256, 6144),
    "GPT d=128, T=64, B=16": Case(partial(gpt, 256, 128, 2, 4, 64), (64,), 16, 640, 0, 256),
}
RAGGED = Case(partial(mlp, [784], [128]), (784,), 256, 2010, dtype=torch.float64)
"""The last update has 218 examples, and its last micro-batch 10."""


class Batches(TensorDataset):
    """Data in memory, from which a loader reads a whole batch at once."""

    def __getitems__(self, ids: list[int]) -> tuple[Tensor, ...]:
        index = torch.tensor(ids)
        return tuple(column.index_select(0, index) for column in self.tensors)


class NamedBatches(Batches):
    """Batches with the names that the Trainer of transformers passes to the network."""

    def __getitems__(self, ids: list[int]) -> dict[str, Tensor]:  # type: ignore[override]
        return dict(zip(("inputs", "labels"), super().__getitems__(ids), strict=True))


def keep_batch(batch: Any) -> Any:
    """Return a batch that `Batches` has read."""
    return batch


def make_loader(data: Data, size: int) -> DataLoader[Any]:
    return DataLoader(Batches(*data), batch_size=size, collate_fn=keep_batch)


def compute_losses(model: nn.Module, batch: Data) -> Tensor:
    """Compute one mean loss for each example [B]."""
    logits, targets = model(batch[0]), batch[1]
    each = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none")
    return each if targets.ndim == 1 else each.view(len(targets), -1).mean(1)


def compute_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Compute the mean loss of a batch."""
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM, fused=True)


@torch.no_grad()
def evaluate_by_hand(model: nn.Module, data: Data, size: int) -> float:
    """Compute the mean loss of data."""
    model.eval()
    total = 0.0
    for x, y in zip(data[0].split(size), data[1].split(size), strict=True):
        total += compute_loss(model(x), y).item() * len(x)
    model.train()
    return total / len(data[0])


def run_by_hand(
    model: nn.Module, train: Data, held_out: Data | None, size: int, pieces: int
) -> float | None:
    """Train and evaluate by the usual PyTorch loop."""
    optimizer = make_optimizer(model)
    for ids in torch.arange(len(train[0])).split(size):
        optimizer.zero_grad()
        for part in ids.split(-(-size // pieces)):
            loss = compute_loss(model(train[0][part]), train[1][part])
            (loss if pieces == 1 else loss * (len(part) / len(ids))).backward()
        optimizer.step()
    return held_out and evaluate_by_hand(model, held_out, size)


def run_steps(
    model: nn.Module, train: Data, held_out: Data | None, size: int, pieces: int
) -> float | None:
    """Train by `ab.steps` with its records, and evaluate by `ab.evaluate`."""
    with tempfile.TemporaryDirectory() as folder:
        run = ab.Run(folder + "/run", checkpoint_every=10**9)
        return run_steps_without_run(model, train, held_out, size, pieces, run)


def run_steps_without_run(
    model: nn.Module,
    train: Data,
    held_out: Data | None,
    size: int,
    pieces: int,
    run: ab.Run | None = None,
) -> float | None:
    """Train by `ab.steps`, and evaluate by `ab.evaluate`."""
    objective, order = (
        ab.Objective(compute_losses),
        ab.Order(len(train[0]), batch_size=size, shuffle=False),
    )
    layout = ab.Layout(micro_batch=-(-size // pieces))
    optimizer, loss = make_optimizer(model), None
    for step in ab.steps(
        model, objective, optimizer, train, order=order, layout=layout, epochs=1, run=run
    ):
        if step.ends_epoch and held_out:
            loss = ab.evaluate(model, objective, held_out, micro_batch=size).loss
    return loss


def run_lightning(
    model: nn.Module, train: Data, held_out: Data | None, size: int, pieces: int
) -> float | None:
    """Train and evaluate by Lightning's Trainer, which logs nothing in this mode."""
    import lightning.pytorch as pl

    losses: list[float] = []

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return compute_loss(self.net(batch[0]), batch[1])

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            losses.append(compute_loss(self.net(batch[0]), batch[1]).item())

        def configure_optimizers(self) -> Any:
            return make_optimizer(self.net)

    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", devices=1, barebones=True, accumulate_grad_batches=pieces
    )
    evaluation = [make_loader(held_out, size)] if held_out else []
    trainer.fit(Module(), make_loader(train, -(-size // pieces)), *evaluation)
    return sum(losses) / len(losses) if held_out else None


def run_accelerate(
    model: nn.Module, train: Data, held_out: Data | None, size: int, pieces: int
) -> None:
    """Train by a loop with Accelerate, which accumulates."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=pieces)
    loader = make_loader(train, -(-size // pieces))
    model, optimizer, loader = accelerator.prepare(model, make_optimizer(model), loader)
    for x, y in loader:
        with accelerator.accumulate(model):
            accelerator.backward(compute_loss(model(x), y))
            optimizer.step()
            optimizer.zero_grad()


class WithLoss(nn.Module):
    """Network with the interface that the Trainer of transformers expects."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": compute_loss(self.net(inputs), labels)}


def run_transformers(
    model: nn.Module, train: Data, held_out: Data | None, size: int, pieces: int
) -> float | None:
    """Train and evaluate by the Trainer of transformers."""
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        args = transformers.TrainingArguments(
            folder, per_device_train_batch_size=size // pieces, report_to=[], use_cpu=True,
            gradient_accumulation_steps=pieces, num_train_epochs=1, disable_tqdm=True,
            per_device_eval_batch_size=size, save_strategy="no", logging_strategy="no",
            eval_strategy="epoch" if held_out else "no", max_grad_norm=0.0,
            lr_scheduler_type="constant", dataloader_pin_memory=False, prediction_loss_only=True,
            train_sampling_strategy="sequential", remove_unused_columns=False,
            logging_nan_inf_filter=False,
        )  # fmt: skip
        whole = WithLoss(model)
        trainer = transformers.Trainer(
            whole, args, data_collator=keep_batch, train_dataset=NamedBatches(*train),
            eval_dataset=NamedBatches(*held_out) if held_out else None,
            optimizers=(make_optimizer(whole), None),
        )  # fmt: skip
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    rows = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    return rows[-1] if held_out else None


def run_skorch(
    model: nn.Module, train: Data, held_out: Data | None, size: int, pieces: int
) -> float | None:
    """Train and evaluate by skorch, which does not accumulate."""
    import skorch
    from skorch.helper import predefined_split

    class Loss(nn.Module):
        def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
            return compute_loss(logits, targets)

    assert held_out is not None, "skorch without evaluation is not compared"
    net = skorch.NeuralNet(
        model, Loss, optimizer=torch.optim.SGD, optimizer__momentum=MOMENTUM,
        optimizer__fused=True, lr=LR, max_epochs=1, batch_size=size, verbose=0,
        iterator_train__collate_fn=keep_batch, iterator_valid__collate_fn=keep_batch,
        train_split=predefined_split(Batches(*held_out)), callbacks__print_log=None,
    )  # fmt: skip
    net.initialize()
    net.partial_fit(Batches(*train))
    return float(net.history[-1, "valid_loss"])


WAYS: dict[str, Way] = {
    "by hand": run_by_hand,
    "`ab.steps`": run_steps,
    "`ab.steps` without a run": run_steps_without_run,
    "Lightning": run_lightning,
    "transformers": run_transformers,
    "skorch": run_skorch,
}
CUT_WAYS: dict[str, Way] = {
    "by hand": run_by_hand,
    "`ab.steps`": run_steps,
    "Lightning": run_lightning,
    "Accelerate": run_accelerate,
}
