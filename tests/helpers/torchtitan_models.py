"""A model of torchtitan on the CPU, and its gradients; see test_integrations_torchtitan.py."""

import torch
import torch.nn.functional as F
from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.models.llama3 import model_registry

import anybatch as ab
from anybatch import distributed

IGNORED = -100
CUTS = (None, 1, 2, 3)


def build():
    """Build two layers of the debug model. Its own attention trains on a GPU alone."""
    torch.manual_seed(0)
    config = model_registry("debugmodel").model
    config.layers = config.layers[:2]
    for layer in config.layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    model = config.build()
    model.init_states()
    return model.double()


def make_batch():
    """Make 7 sequences of 16 to 4 tokens."""
    tokens = torch.randint(2048, (7, 17), generator=torch.Generator().manual_seed(1))
    labels = tokens[:, 1:].clone()
    for i in range(7):
        labels[i, 16 - 2 * i :] = IGNORED
    return tokens[:, :-1], labels


def losses(model, batch):
    tokens, labels = batch
    logits = model(tokens).flatten(0, 1)
    values = F.cross_entropy(logits, labels.flatten(), reduction="none").view_as(labels)
    return ab.ExampleLosses(values.sum(1), counts=(labels != IGNORED).sum(1))


def flatten(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def compute(cut, group=None):
    """Compute the gradient of the batch, and the norms of this rank's examples."""
    rank, num_ranks = distributed.get_rank(group), distributed.get_num_ranks(group)
    start, stop = 7 * rank // num_ranks, 7 * (rank + 1) // num_ranks
    share = tuple(part[start:stop] for part in make_batch())
    model, how = build(), {"observe": ab.Observe(norms=True), "group": group}
    objective, layout = ab.Objective(losses), ab.Layout(cut)
    gradient = ab.batch_gradient(model, objective, share, layout=layout, **how)
    return flatten(model).numpy(), gradient.ledger.norms.numpy()


def compute_all(group=None):
    """Compute them for each cut."""
    return {cut: compute(cut, group) for cut in CUTS}
