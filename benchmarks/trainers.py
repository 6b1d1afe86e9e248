"""Compare an epoch of `ab.steps` with an epoch of other trainers, and of a loop by hand.

    epoch        train on all examples once, then evaluate the validation part
    cut in 16    the same without evaluation, each update cut into 16 micro-batches

Every trainer gets the same network, data, batch sizes and SGD with momentum, in memory, without
progress bars, logs and checkpoints; `ab.steps` writes its records. Examples are in the same order,
so all must end with the same weights. Each round times all of them in turns, after one round to
warm up. Figures are medians of the ratio to the loop by hand, in seconds of the processor.

    python benchmarks/trainers.py [--write] [--rounds 6] [--only LeNet]
"""

import argparse
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "torch")

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, TensorDataset

import anybatch as ab
from anybatch.zoo import gpt, lenet, mlp
from machine import write
from observed_models import resnet18
from tables import format_seconds, format_table

LR, MOMENTUM = 0.01, 0.9
Data = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Case:
    """Network, data and batch size."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]  # of one input
    batch_size: int
    num_examples: int
    num_validation: int = 0
    vocabulary: int = 0

    def make_data(self, size: int) -> Data:
        """Make random inputs and targets."""
        if self.vocabulary:
            tokens = torch.randint(self.vocabulary, (size, self.shape[0] + 1))
            return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        return torch.rand(size, *self.shape), torch.randint(10, (size,))


EPOCHS = {
    "LeNet 28x28, B=64": Case(partial(lenet, 28), (1, 28, 28), 64, 1920, 640),
    "ResNet-18, B=32": Case(resnet18, (3, 32, 32), 32, 256, 64),
    "GPT d=256, T=128, B=16": Case(partial(gpt, 256, 256, 4, 4, 128), (128,), 16, 160, 32, 256),
}
CUT = {
    "784-128-10, B=256": Case(partial(mlp, [784], [128]), (784,), 256, 2**16),
    "LeNet 28x28, B=256": Case(partial(lenet, 28), (1, 28, 28), 256, 8192),
    "GPT d=128, T=64, B=16": Case(partial(gpt, 256, 128, 2, 4, 64), (64,), 16, 1600, 0, 256),
}
PIECES = 16


def compute_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Compute one mean loss for each example [B]."""
    each = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none")
    return each.view(len(targets), -1).mean(1)


def compute_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Compute the mean loss of a batch."""
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)


def make_loader(data: Data, size: int) -> DataLoader[Any]:
    """Make a loader that indexes a whole batch at once."""
    dataset = TensorDataset(*data)
    sampler = BatchSampler(SequentialSampler(dataset), size, drop_last=False)
    return DataLoader(dataset, sampler=sampler, batch_size=None)


def run_by_hand(model: nn.Module, train: Data, held_out: Data, size: int, pieces: int) -> None:
    """Train and evaluate by the usual PyTorch loop."""
    optimizer = make_optimizer(model)
    for ids in torch.arange(len(train[0])).split(size):
        optimizer.zero_grad()
        for part in ids.chunk(pieces):
            loss = compute_loss(model(train[0][part]), train[1][part])
            (loss * (len(part) / len(ids))).backward()
        optimizer.step()
    with torch.no_grad():
        for x, y in zip(held_out[0].split(size), held_out[1].split(size), strict=True):
            compute_loss(model(x), y).item()


def run_steps(model: nn.Module, train: Data, held_out: Data, size: int, pieces: int) -> None:
    """Train by `ab.steps` with its records, and evaluate by `ab.evaluate`."""
    objective = ab.Objective(lambda model, batch: compute_losses(model(batch[0]), batch[1]))
    order, layout = (
        ab.Order(len(train[0]), batch_size=size, shuffle=False),
        ab.Layout(size // pieces),
    )
    with tempfile.TemporaryDirectory() as folder:
        run = ab.Run(folder + "/run", checkpoint_every=10**9)
        options: dict[str, Any] = {"order": order, "layout": layout, "epochs": 1, "run": run}
        for _ in ab.steps(model, objective, make_optimizer(model), train, **options):
            pass
    if len(held_out[0]):
        ab.evaluate(model, objective, held_out, micro_batch=size)


def run_lightning(model: nn.Module, train: Data, held_out: Data, size: int, pieces: int) -> None:
    """Train and evaluate by Lightning's Trainer."""
    import lightning.pytorch as pl

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return compute_loss(self.net(batch[0]), batch[1])

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            compute_loss(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return make_optimizer(self.net)

    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, num_sanity_val_steps=0,
        accumulate_grad_batches=pieces, default_root_dir=tempfile.gettempdir(),
    )  # fmt: skip
    loaders = [make_loader(train, size // pieces)]
    if len(held_out[0]):
        loaders.append(make_loader(held_out, size))
    trainer.fit(Module(), *loaders)


def run_accelerate(model: nn.Module, train: Data, held_out: Data, size: int, pieces: int) -> None:
    """Train by a loop with Accelerate, which accumulates."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=pieces)
    loader = DataLoader(TensorDataset(*train), batch_size=size // pieces)
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

    def forward(self, inputs: Tensor, labels: Tensor, **others: Any) -> dict[str, Tensor]:
        return {"loss": compute_loss(self.net(inputs), labels)}


def run_transformers(model: nn.Module, train: Data, held_out: Data, size: int, pieces: int) -> None:
    """Train and evaluate by the Trainer of transformers."""
    import transformers

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *args: Any) -> Any:
            return SequentialSampler(self.train_dataset)

    def list_rows(data: Data) -> list[dict[str, Tensor]]:
        return [{"inputs": x, "labels": y} for x, y in zip(*data, strict=True)]

    args = transformers.TrainingArguments(
        tempfile.mkdtemp(), per_device_train_batch_size=size // pieces, report_to=[],
        gradient_accumulation_steps=pieces, num_train_epochs=1, disable_tqdm=True, use_cpu=True,
        per_device_eval_batch_size=size, save_strategy="no", logging_strategy="no",
        eval_strategy="epoch" if len(held_out[0]) else "no", max_grad_norm=0.0,
        lr_scheduler_type="constant", dataloader_pin_memory=False, prediction_loss_only=True,
    )  # fmt: skip
    whole = WithLoss(model)
    trainer = InOrder(
        whole, args, train_dataset=list_rows(train), eval_dataset=list_rows(held_out),
        optimizers=(make_optimizer(whole), None),
    )  # fmt: skip
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()


def run_skorch(model: nn.Module, train: Data, held_out: Data, size: int, pieces: int) -> None:
    """Train and evaluate by skorch, which does not accumulate."""
    import skorch
    from skorch.helper import predefined_split

    class Loss(nn.Module):
        def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
            return compute_loss(logits, targets)

    net = skorch.NeuralNet(
        model, Loss, optimizer=torch.optim.SGD, optimizer__momentum=MOMENTUM, lr=LR, max_epochs=1,
        batch_size=size, verbose=0, train_split=predefined_split(TensorDataset(*held_out)),
    )  # fmt: skip
    net.initialize()
    net.partial_fit(TensorDataset(*train))


def run_keras(model: nn.Module, train: Data, held_out: Data, size: int, pieces: int) -> None:
    """Train and evaluate by Keras, with the network as a layer."""
    import keras

    class Model(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.net = keras.layers.TorchModuleWrapper(model)

        def call(self, inputs: Tensor, training: bool | None = None) -> Tensor:
            return self.net(inputs)

    whole = Model()
    optimizer = keras.optimizers.SGD(LR, momentum=MOMENTUM)
    whole.compile(optimizer, loss=lambda y, logits: compute_loss(logits, y.long()))
    arrays = [tensor.numpy() for tensor in (*train, *held_out)]
    validation = {"validation_data": tuple(arrays[2:]), "validation_batch_size": size}
    whole.fit(*arrays[:2], batch_size=size, epochs=1, verbose=0, shuffle=False, **validation)


Way = Callable[[nn.Module, Data, Data, int, int], None]
WAYS: dict[str, Way] = {
    "by hand": run_by_hand,
    "ab.steps": run_steps,
    "Lightning": run_lightning,
    "Trainer": run_transformers,
    "skorch": run_skorch,
    "Keras (torch)": run_keras,
    "Accelerate": run_accelerate,
}
EPOCH_WAYS = [name for name in WAYS if name != "Accelerate"]
CUT_WAYS = ["by hand", "ab.steps", "Lightning", "Accelerate"]


def time_epoch(way: Way, case: Case, data: list[Data], pieces: int) -> tuple[float, float, Tensor]:
    """Return processor and wall seconds of an epoch, and the movement of the weights."""
    torch.manual_seed(0)
    model = case.make()
    before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    wall, start = time.perf_counter(), time.process_time()
    way(model, data[0], data[1], case.batch_size, pieces)
    seconds = time.process_time() - start, time.perf_counter() - wall
    return *seconds, nn.utils.parameters_to_vector(model.parameters()).detach() - before


def compare(case: Case, names: list[str], pieces: int, rounds: int) -> dict[str, Any]:
    """Time all ways in turns.

    Raises:
        RuntimeError: a way ends with other weights.
    """
    torch.manual_seed(1)
    data = [case.make_data(case.num_examples), case.make_data(case.num_validation)]
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    distances, by_hand = {}, torch.zeros(0)
    for number in range(rounds + 1):
        start = number % len(names)  # each comes first, second, ... once
        for name in names[start:] + names[:start]:
            processor, wall, moved = time_epoch(WAYS[name], case, data, pieces)
            if number:
                times[name].append((processor, wall))
                continue
            by_hand = moved if name == "by hand" else by_hand
            distances[name] = float((moved - by_hand).norm() / by_hand.norm())
            if not distances[name] < 1e-2:  # rounding, which ResNet-18 amplifies
                raise RuntimeError(f"{name} is {distances[name]} of the way off the loop by hand.")
    base = [row[0] for row in times["by hand"]]
    return {
        "distance": distances,
        "seconds": {name: median(row[0] for row in rows) for name, rows in times.items()},
        "over_by_hand": {
            name: median(row[0] / other for row, other in zip(rows, base, strict=True))
            for name, rows in times.items()
        },
        "processor_and_wall_seconds": times,
    }


def make_tables(results: dict[str, Any]) -> dict[str, str]:
    """Make the tables of the document."""

    def make(part: str, names: list[str]) -> str:
        rows = [
            [
                case,
                format_seconds(result["seconds"]["by hand"]),
                *(f"{result['over_by_hand'][name]:.2f}" for name in names[1:]),
            ]
            for case, result in results[part].items()
        ]
        return format_table(["network", *names], rows)

    return {"trainers": make("epochs", EPOCH_WAYS), "trainers-cut": make("cut", CUT_WAYS)}


def iterate_cases(only: str) -> Iterator[tuple[str, str, Case, list[str], int]]:
    """Yield every case with its part of the result, its ways and its micro-batches."""
    for part, cases, names, pieces in (
        ("epochs", EPOCHS, EPOCH_WAYS, 1),
        ("cut", CUT, CUT_WAYS, PIECES),
    ):
        for name, case in cases.items():
            if only in name:
                yield part, name, case, names, pieces


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the raw result")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--only", default="", help="networks whose names contain this")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    for part in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "accelerate"):
        logging.getLogger(part).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    results: dict[str, Any] = {"epochs": {}, "cut": {}}
    for part, name, case, names, pieces in iterate_cases(args.only):
        results[part][name] = compare(case, names, pieces, args.rounds)
        ratios = results[part][name]["over_by_hand"]
        print(
            f"{part:7}{name:24}" + ", ".join(f"{n} {r:.2f}" for n, r in ratios.items()), flush=True
        )
    if args.write:
        print(write("trainers", results))


if __name__ == "__main__":
    main()
