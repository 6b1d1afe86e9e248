# %% [markdown]
# # 3. Sum or mean of the gradients? Which definition reproduces a paper?
#
# The mean, as a rule: its size does not depend on the batch size. To reproduce a paper, take the
# definition that its rate was chosen for, with its batch size. The best rate for averaged gradients
# is far above that of updates from single examples. This chapter measures why.

# %%
import numpy as np
import torch
from drawing import draw_lines
from torch import nn
from torch.nn import functional as F

import anybatch as ab
from anybatch import reference
from anybatch.data import load_digits

images, classes = load_digits()[:2]
images, classes = images.double().flatten(1)[:1024], classes[:1024]
layers, loss = [reference.Dense(64, 10, bias=False)], reference.SoftmaxCrossEntropy()


def example_losses(model, batch):
    """Return one loss for each example. Nothing is averaged here."""
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def make_model():
    """Make a table of 64 x 10 weights that reads digits, with all weights 0."""
    model = nn.Linear(64, 10, bias=False).double()
    nn.init.zeros_(model.weight)
    return model


# %% [markdown]
# ## Each example twice in the batch
#
# The second copy of an example teaches nothing new. By hand, and with the engine:

# %%
model = make_model()
once = images[:60], classes[:60]
twice = once[0].repeat(2, 1), once[1].repeat(2)
for name, reduction in (("mean", ab.Mean()), ("sum", ab.Sum())):
    by_hand, by_engine = [], []
    for inputs, targets in (once, twice):
        network = reference.Network(layers, [{"weight": model.weight.detach().numpy()}])
        gradient = reference.batch_gradient(
            network, loss, inputs.numpy(), targets.tolist(), reduction=name
        )
        by_hand.append(np.linalg.norm(gradient.gradients[0]["weight"]))
        objective = ab.Objective(example_losses, reduction=reduction)
        ab.batch_gradient(model, objective, (inputs, targets))
        by_engine.append(float(model.weight.grad.norm()))
    print(f"{name:4s}: by hand {by_hand[1] / by_hand[0]:.3f} times as long", end=", ")
    print(f"by the engine {by_engine[1] / by_engine[0]:.3f} times")

# %% [markdown]
# ## The best rate
#
# For each batch size we make 64 updates with each of nine rates, each twice the one before. The
# best rate leads to the lowest loss over all 1,024 digits. The batches are drawn at random.


# %%
def draw_batches(size):
    """Draw the examples of 64 batches of one size."""
    generator = torch.Generator().manual_seed(0)
    epochs = [torch.randperm(1024, generator=generator) for _ in range(size // 16 + 1)]
    return torch.cat(epochs).split(size)[:64]


def train(rate, size):
    """Return the weights after 64 updates by the mean gradient, and the loss of all digits."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    for ids in draw_batches(size):
        ab.batch_gradient(model, ab.Objective(example_losses), (images[ids], classes[ids]))
        optimizer.step()
    with torch.no_grad():
        return model.weight.numpy(), float(example_losses(model, (images, classes)).mean())


sizes, rates = (1, 4, 16, 64, 256), [2.0**power for power in range(-2, 7)]
best = {size: min(rates, key=lambda rate: train(rate, size)[1]) for size in sizes}
for size, rate in best.items():
    print(f"B = {size:3d}: best rate {rate:4.1f} for the mean, {rate / size:6.4f} for the sum")

# %% [markdown]
# The mean of more examples has less noise, so longer steps are safe: from B = 1 to B = 256 the best
# rate of the mean grows 32 times. The sum makes the same steps at the rate / B. The batch grows 256
# times, so the best rate of the sum falls 8 times. A rate without a batch size and a definition
# says nothing.
#
# By hand, one training of the table:

# %%
network = reference.Network(layers, [{"weight": np.zeros((10, 64))}])
batches = [(images[ids].numpy(), classes[ids].tolist()) for ids in draw_batches(16)]
*_, last = reference.train(network, loss, batches, reference.SGD(best[16]))
same = np.allclose(last.network.parameters[0]["weight"], train(best[16], 16)[0])
print("the same weights after 64 updates of 16 examples:", same)

# %%
lines = {"mean": list(best.items()), "sum": [(size, rate / size) for size, rate in best.items()]}
title = "The best rate depends on the batch size, and on mean or sum"
x, y = ("batch size B", sizes), ("best rate", (1 / 16, 1 / 4, 1, 4, 16))
draw_lines(title, lines, x, y, log=True).save("3_rate_and_batch_size.svg")
