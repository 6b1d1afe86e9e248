"""Compare trainers with their drop-ins: distance to the exact update, and seconds of an epoch.

Each trainer trains the same network in float64 on the same 2,010 examples in the same order, by
updates of 32 that are cut in four ways; the last update of an epoch has 26. The reference is a loop
by hand over whole batches. `distance` is |weights - reference| / |change of the reference|.
The times are of the cut 8 x 4, in turns (A B A B), as medians of the ratio to the trainer's own.
skorch does not accumulate, so its times are of whole batches.

    python benchmarks/integrations.py [--write] [--rounds 7]     # also the table of the page
"""

import argparse
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from statistics import median
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "torch")

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import anybatch as ab
from performance import write_result
from tables import format_ratio, format_table

N, BATCH, LR = 2010, 32, 0.1
CUTS = ((32, 1), (16, 2), (8, 4), (2, 16))
torch.manual_seed(0)
X, Y = torch.randn(N, 64).double(), torch.randint(10, (N,))
Train = Callable[[int, int], Tensor]


def make_network() -> nn.Module:
    """Make the same network each time."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 10)).double()


def flatten(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def losses(model: nn.Module, batch: Any) -> Tensor:
    """Return one loss for each example."""
    return F.cross_entropy(getattr(model, "net", model)(batch[0]), batch[1], reduction="none")


def predicting_losses(model: nn.Module, batch: Any) -> ab.ExampleLosses:
    """Return the predictions too, which skorch's callbacks read."""
    logits = model(batch[0])
    values = F.cross_entropy(logits, batch[1], reduction="none")
    return ab.ExampleLosses(values, outputs={"predictions": logits})


def train_by_hand(size: int = BATCH, accumulation: int = 1) -> Tensor:
    """Train on whole batches."""
    model = make_network()
    for start in range(0, N, BATCH):
        model.zero_grad()
        F.cross_entropy(model(X[start : start + BATCH]), Y[start : start + BATCH]).backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= LR * p.grad
    return flatten(model)


class Classifier(nn.Module):
    """Network with the interface that the Trainer of transformers expects."""

    def __init__(self) -> None:
        super().__init__()
        self.net = make_network()

    def forward(self, inputs: Tensor, labels: Tensor, **kwargs: Any) -> dict[str, Tensor]:
        return {"loss": F.cross_entropy(self.net(inputs), labels)}


def dict_losses(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model.net(batch["inputs"]), batch["labels"], reduction="none")


def build_transformers(*, exact: bool) -> Train:
    """Build the training by transformers."""
    import transformers

    from anybatch.integrations.transformers import ExactTrainer

    data = [{"inputs": x, "labels": y} for x, y in zip(X, Y, strict=True)]

    def train(size: int, accumulation: int) -> Tensor:
        kind = ExactTrainer if exact else transformers.Trainer

        class InOrder(kind):  # type: ignore[misc, valid-type]
            def _get_train_sampler(self, *args: Any) -> Any:
                return torch.utils.data.SequentialSampler(self.train_dataset)

        args = transformers.TrainingArguments(
            tempfile.mkdtemp(), per_device_train_batch_size=size, report_to=[], use_cpu=True,
            gradient_accumulation_steps=accumulation, num_train_epochs=1, disable_tqdm=True,
            save_strategy="no", logging_strategy="no", optim="sgd", learning_rate=LR,
            lr_scheduler_type="constant", max_grad_norm=0.0, dataloader_pin_memory=False,
        )  # fmt: skip
        more = {"objective": ab.Objective(dict_losses)} if exact else {}
        trainer = InOrder(model=Classifier(), args=args, train_dataset=data, **more)
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        return flatten(trainer.model.net)

    return train


def build_lightning(*, exact: bool) -> Train:
    """Build the training by Lightning."""
    import lightning.pytorch as pl

    from anybatch.integrations.lightning import ExactModule

    class Base(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = make_network()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=LR)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return losses(self, batch).mean()

    class Exact(ExactModule, Base):
        objective = ab.Objective(losses)

    def train(size: int, accumulation: int) -> Tensor:
        module = Exact() if exact else Base()
        trainer = pl.Trainer(
            max_epochs=1, accumulate_grad_batches=accumulation, accelerator="cpu",
            precision="64-true", logger=False, enable_progress_bar=False, devices=1,
            enable_model_summary=False, enable_checkpointing=False,
        )  # fmt: skip
        trainer.fit(module, DataLoader(TensorDataset(X, Y), batch_size=size))
        return flatten(module.net)

    return train


def build_accelerate(*, exact: bool) -> Train:
    """Build a loop with Accelerate."""
    from accelerate import Accelerator

    from anybatch.integrations.accelerate import backward

    def train(size: int, accumulation: int) -> Tensor:
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
        model = make_network()
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        loader = DataLoader(TensorDataset(X, Y), batch_size=size)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        batches: list[Any] = []
        for batch in loader:
            if not exact:
                with accelerator.accumulate(model):
                    accelerator.backward(losses(model, batch).mean())
                    optimizer.step()
                    optimizer.zero_grad()
                continue
            batches.append(batch)
            if len(batches) == accumulation or accelerator.gradient_state.end_of_dataloader:
                backward(accelerator, model, ab.Objective(losses), batches)
                optimizer.step()
                optimizer.zero_grad()
                batches = []
        return flatten(model)

    return train


def build_skorch(*, exact: bool) -> Train:
    """Build the training by skorch, which does not accumulate: its own is the whole batch."""
    import skorch

    from anybatch.integrations.skorch import ExactNet

    def train(size: int, accumulation: int) -> Tensor:
        how: dict[str, Any] = {"lr": LR, "verbose": 0, "train_split": None, "max_epochs": 1}
        if exact:
            how |= {"objective": ab.Objective(predicting_losses), "layout": ab.Layout(size)}
            net = ExactNet(make_network(), batch_size=BATCH, **how)
        else:
            net = skorch.NeuralNet(make_network(), nn.CrossEntropyLoss, batch_size=BATCH, **how)
        net.fit(X, Y)
        return flatten(net.module_)

    return train


TRAINERS: dict[str, Callable[..., Train]] = {
    "transformers": build_transformers,
    "Lightning": build_lightning,
    "Accelerate": build_accelerate,
    "skorch": build_skorch,
}


def compare(name: str, rounds: int) -> dict[str, Any]:
    """Measure a trainer and its drop-in."""
    build, reference = TRAINERS[name], train_by_hand()
    scale = (reference - flatten(make_network())).norm()
    ways = {"own": build(exact=False), "exact": build(exact=True)}
    distances = {
        way: {f"{s} x {a}": float((train(s, a) - reference).norm() / scale) for s, a in CUTS}
        for way, train in ways.items()
    }
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, train in ways.items():
            start = time.perf_counter()
            train(*(CUTS[0] if name == "skorch" else (8, 4)))
            times[way].append(time.perf_counter() - start)
    ratio = median(b / a for a, b in zip(times["own"], times["exact"], strict=True))
    return {"distances": distances, "exact_over_own": ratio, "seconds": times}


def format_tables(integrations: dict[str, Any]) -> dict[str, str]:
    """Format the table of docs/performance.md."""
    rows = []
    for name, result in integrations["cases"].items():
        trainer, exact = (result["distances"][way].values() for way in ("own", "exact"))
        cells = [*(f"{distance:.0e}" for distance in trainer), f"at most {max(exact):.0e}"]
        rows.append([name, *cells, format_ratio(result["exact_over_own"])])
    cuts = [f"{size} x {accumulation}" for size, accumulation in CUTS]
    head = ("trainer", *cuts, "with the drop-in, any cut", "time")
    return {"integrations": format_table(head, rows)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the raw result and the table")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    for part in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(part).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    results = {}
    for name in TRAINERS:
        results[name] = compare(name, args.rounds)
        for way, distances in results[name]["distances"].items():
            figures = ", ".join(f"{cut}: {value:.0e}" for cut, value in distances.items())
            print(f"{name:13} {way:6} {figures}", flush=True)
        print(f"{name:13} exact over own: {results[name]['exact_over_own']:.2f} of the time")
    if args.write:
        print(write_result("integrations", {"cases": results}))


if __name__ == "__main__":
    main()
