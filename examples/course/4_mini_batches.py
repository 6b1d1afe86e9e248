# %% [markdown]
# # 4. How does the mini-batch method work, step by step?
#
# 1. Cut the data into batches.
# 2. Send each example of a batch forward and back.
# 3. Add up the gradients.
# 4. Divide by B, and update the weights.
# 5. Repeat, until the data are used up or the model is good enough.
#
# One example at a time is the definition. All at once is the same update, and much faster.

# %%
import time
from statistics import median

import numpy as np
import torch
from drawing import draw_lines
from torch import nn
from torch.nn import functional as F

import anybatch as ab
from anybatch import reference
from anybatch.data import load_digits

B, RATE = 60, 0.3
images, classes = load_digits()[:2]
images = images.double()
torch.manual_seed(0)
model = nn.Sequential(  # slide windows over the image, keep what is positive, pool, weigh
    nn.Conv2d(1, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(54, 10)
).double()

# %% [markdown]
# ## By hand, one example after the other

# %%
layers = [
    reference.Conv2d(1, 6, 3),
    reference.ReLU(),
    reference.MaxPool2d(2),
    reference.Flatten(),
    reference.Dense(54, 10),
]
weights = [{n: p.detach().numpy() for n, p in layer.named_parameters()} for layer in model]
network, loss = reference.Network(layers, weights), reference.SoftmaxCrossEntropy()


def update_by_hand(network, inputs, targets):
    """Make one update; return its mean loss and the network after it."""
    losses, total = [], np.zeros(sum(p.numel() for p in model.parameters()))
    for x, target in zip(inputs, targets, strict=True):
        output, stored = network.forward(x)  # 2. forward
        losses.append(loss.value(output, target))
        _, gradient = network.backward(stored, loss.error(output, target))  # 2. back
        total += reference.flatten(gradient)  # 3. add up
    mean = total / len(losses)  # 4. divide by B
    return np.mean(losses), move(network, -RATE * mean)  # 4. update


def move(network, change):
    """Return a network whose weights are changed by one long row of numbers."""
    parameters = []
    for layer in network.parameters:
        parameters.append({})
        for name, array in layer.items():
            step, change = change[: array.size], change[array.size :]
            parameters[-1][name] = array + step.reshape(array.shape)
    return reference.Network(network.layers, parameters)


# %% [markdown]
# ## One epoch, both ways
#
# An *epoch* is one pass through the data. Its 29 full batches make 29 updates.


# %%
def example_losses(model, batch):
    """Return one loss for each example. Nothing is averaged here."""
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


objective, optimizer = ab.Objective(example_losses), torch.optim.SGD(model.parameters(), lr=RATE)
losses, seconds = {"by hand": [], "engine": []}, {"by hand": [], "engine": []}
for first in range(0, 29 * B, B):  # 1. cut; 5. repeat
    batch = images[first : first + B], classes[first : first + B]
    begin = time.perf_counter()
    value, network = update_by_hand(network, batch[0].numpy(), batch[1].tolist())
    losses["by hand"].append(value)
    middle = time.perf_counter()
    losses["engine"].append(float(ab.batch_gradient(model, objective, batch).loss))
    optimizer.step()
    seconds["by hand"].append(middle - begin)
    seconds["engine"].append(time.perf_counter() - middle)
for number in (0, 14, 28):
    by_hand, engine = losses["by hand"][number], losses["engine"][number]
    print(f"update {number:2d}: loss {by_hand:.6f} by hand, {engine:.6f} by the engine")
weights = torch.cat([p.detach().flatten() for p in model.parameters()]).numpy()
print("the same weights:", np.allclose(weights, reference.flatten(network.parameters)))
print("more than 5 times as fast:", median(seconds["by hand"]) > 5 * median(seconds["engine"]))

# %% [markdown]
# ## Stop at a target
#
# `ab.steps` cuts the data into batches in a random order, and makes the updates. Here it stops once
# 90 of 100 digits are read rightly. A real training looks at digits that it did not learn from.

# %%
order = ab.Order(len(images), batch_size=B, seed=0)
for step in ab.steps(model, objective, optimizer, (images, classes), order=order, epochs=50):
    losses["engine"].append(step.loss)
    if step.ends_epoch:
        with torch.no_grad():
            share = float((model(images).argmax(1) == classes).double().mean())
        if share >= 0.9:
            break
print(f"after {step.epoch + 1} more epochs {share:.0%} are right")

# %% [markdown]
# Each batch has other examples, so the loss jumps up and down while it falls. In the first epoch
# the dots, which are computed by hand, lie on the line of the engine.

# %%
lines = {"engine": list(enumerate(losses["engine"])), "by hand": list(enumerate(losses["by hand"]))}
title = "One loss for each batch: by hand, and all examples at once"
x = ("updates", range(0, len(losses["engine"]) + 30, 30))
y = ("mean loss of the batch", (0, 0.5, 1, 1.5, 2, 2.5))
draw_lines(title, lines, x, y, dots=["by hand"]).save("4_mini_batches.svg")
