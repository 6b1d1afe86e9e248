"""Trainers on two ranks, started by torchrun: weights of each, for test_integrations_ranks.py.

torchrun --nproc-per-node 2 trainers_on_ranks.py NAME FOLDER
"""

import os
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import anybatch as ab

N = 22
X = torch.linspace(-2, 2, 3 * N).reshape(N, 3).double().sin()
Y = torch.arange(N) % 4


def network(dropout=0.0):
    torch.manual_seed(0)
    layers = nn.Linear(3, 5), nn.Tanh(), nn.Dropout(dropout), nn.Linear(5, 4)
    return nn.Sequential(*layers).double()


def losses(model, batch):
    return F.cross_entropy(getattr(model, "net", model)(batch[0]), batch[1], reduction="none")


def flatten(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def pieces(sizes, dropout, folder):
    """`MicroBatches` of several sizes on each rank; a model that draws runs piece by piece."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    start = sum(map(sum, sizes[:rank]))
    batches = []
    for size in sizes[rank]:
        batches.append((X[start : start + size], Y[start : start + size]))
        start += size
    model = network(dropout)
    ab.batch_gradient(
        model,
        ab.Objective(losses),
        ab.MicroBatches(batches),
        key=ab.Key(1, 0),
        group=dist.group.WORLD,
    )
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def accelerate(folder):
    """Micro-batches of 3 and 2 on rank 0, of 4 on rank 1."""
    from accelerate import Accelerator

    from anybatch.integrations.accelerate import backward

    accelerator = Accelerator(cpu=True)
    model = network()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    cuts = [[(0, 3), (3, 5)], [(5, 9)]][accelerator.process_index]
    for _ in range(2):
        backward(accelerator, model, ab.Objective(losses), [(X[a:b], Y[a:b]) for a, b in cuts])
        optimizer.step()
        optimizer.zero_grad()
    return flatten(model)


def lightning(plain, folder, parcels=None):
    """Two ranks, two micro-batches of 2 an update, and a short last one.

    Args:
        sent: gets an entry for each bucket of gradients that DDP sends itself.
    """
    import lightning.pytorch as pl

    from anybatch.integrations.lightning import ExactModule
    from lightning_trainers import make_trainer

    class Base(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = network()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

        def on_train_start(self):
            if parcels is not None:
                self.trainer.model.register_comm_hook(parcels, count_bucket)

    class Exact(ExactModule, Base):
        objective = ab.Objective(losses)

    class Plain(Base):
        def training_step(self, batch, batch_idx):
            return losses(self, batch).mean()

    module = Plain() if plain else Exact()
    how = {"accumulate_grad_batches": 2, "devices": 2, "use_distributed_sampler": False}
    trainer = make_trainer(folder, strategy="ddp", **how)
    data = TensorDataset(X, Y)
    rank = int(os.environ["RANK"])
    sampler = DistributedSampler(data, num_replicas=2, rank=rank, shuffle=False)
    trainer.fit(module, DataLoader(data, batch_size=2, sampler=sampler))
    return flatten(module.net)


def count_bucket(parcels, bucket):
    """Count a bucket of gradients, and send it as DDP does."""
    parcels.append(None)
    future = dist.all_reduce(bucket.buffer().div_(2), async_op=True).get_future()
    return future.then(lambda done: done.value()[0])


def count_sent(plain, folder):
    """Count the buckets of gradients that DDP sends in a training by Lightning."""
    parcels = []
    lightning(plain, folder, parcels)
    return torch.tensor(len(parcels))


def transformers(plain, folder):
    """Two ranks, two micro-batches of 2 an update."""
    from transformers import Trainer

    from anybatch.integrations.transformers import ExactTrainer
    from tiny_transformers import InOrder, Sentences, arguments, bert, collate

    kind = type("Ours", (InOrder, Trainer if plain else ExactTrainer), {})
    args = arguments(Path(folder), 2, 2, num_train_epochs=1, ddp_backend="gloo")
    trainer = kind(
        model=bert("SequenceClassification", num_labels=3),
        args=args,
        train_dataset=Sentences(20, "class"),
        data_collator=collate,
    )
    trainer.train()
    model = trainer.accelerator.unwrap_model(trainer.model)
    return flatten(model)


JOBS = {
    "pieces": lambda folder: pieces([[3, 2], [4, 1, 6]], 0.0, folder),
    "grains": lambda folder: pieces([[4, 2], [4, 2]], 0.5, folder),
    "a lone example": lambda folder: pieces([[4, 4], [4, 1]], 0.5, folder),
    "no example": lambda folder: pieces([[], [4, 5]], 0.5, folder),
    "accelerate": accelerate,
    "lightning": lambda folder: lightning(False, folder),
    "lightning itself": lambda folder: lightning(True, folder),
    "sent": lambda folder: count_sent(False, folder),
    "sent by lightning itself": lambda folder: count_sent(True, folder),
    "transformers": lambda folder: transformers(False, folder),
    "transformers itself": lambda folder: transformers(True, folder),
}

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    name, target = sys.argv[1], Path(sys.argv[2])
    result = JOBS[name](str(target))
    torch.save(result, target / f"{name}-{dist.get_rank()}.pt")
    if dist.is_initialized():
        dist.destroy_process_group()
