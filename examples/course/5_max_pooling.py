# %% [markdown]
# # 5. How does back-propagation pass a max-pooling layer when a batch goes through?
#
# Max-pooling cuts an image into windows, and keeps the largest number of each window, the *winner*.
# On the way back each example sends its gradient to its own winners. All other inputs get 0. Only
# the gradients of the weights are averaged.

# %%
import numpy as np
import torch
from drawing import Picture, draw_map
from torch import nn
from torch.nn import functional as F

import anybatch as ab
from anybatch import reference
from anybatch.data import load_digits

images, classes = load_digits()[:2]
images, classes = images.double()[:60], classes[:60]
torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(1, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(54, 10)
).double()

# %% [markdown]
# ## By hand, one example after the other
#
# The forward pass of each example stores where its winners are.

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
by_hand = reference.batch_gradient(network, loss, images.numpy(), classes.tolist())
for i, example in enumerate(by_hand.examples[:3]):
    print(f"example {i}: winners {example.stored[2]['winners'][0].ravel()}")

# %% [markdown]
# The inputs of the layer are maps of 6 x 6 numbers, counted row by row from 0 to 35. These are the
# winners of the nine windows of the first map. Each example has its own.
#
# ## The same with the engine, all examples at once


# %%
def example_losses(model, batch):
    """Return one loss for each example. Nothing is averaged here."""
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def measure_distance(wrong, right):
    """Return the length of the difference over the length of the right one."""
    return np.linalg.norm(wrong - right) / np.linalg.norm(right)


ab.batch_gradient(model, ab.Objective(example_losses), (images, classes))
engine = torch.cat([p.grad.flatten() for p in model.parameters()]).numpy()
right = reference.flatten(by_hand.gradients)
print("the same gradient:", measure_distance(engine, right) < 1e-12)

# %% [markdown]
# ## A wrong idea: split the gradient over all winners of the batch
#
# Suppose a window's gradient went in equal parts to all inputs that win in any example. Then an
# input would get a gradient for an output that it did not make.

# %%
wins = np.zeros((6, 36))  # in how many examples each input wins, for each of the six maps
for example in by_hand.examples:
    for number, winners in enumerate(example.stored[2]["winners"]):
        wins[number, winners.ravel()] += 1
window_of = (np.arange(36) // 6 // 2) * 3 + np.arange(36) % 6 // 2  # of each input, from 0 to 8


class SplitOverWinners(reference.MaxPool2d):
    """Max-pooling whose way back splits each gradient over the winners of the batch."""

    def backward(self, stored, error, parameters):
        """Give each winner of the batch the same part of its window's gradient."""
        parts = (wins > 0).astype(float)
        for window in range(9):
            inside = window_of == window
            parts[:, inside] /= parts[:, inside].sum(1, keepdims=True)
        return (error.reshape(6, 9)[:, window_of] * parts).reshape(6, 6, 6), {}


layers[2] = SplitOverWinners(2)
split = reference.batch_gradient(
    reference.Network(layers, weights), loss, images.numpy(), classes.tolist()
)
wrong = reference.flatten(split.gradients)
print(
    f"split: {measure_distance(wrong[:60], right[:60]):.2f} away in the weights before the pooling"
)

# %% [markdown]
# ## Another wrong idea: average the errors, and go back once
#
# An *error* is the derivative of the loss by an output. The gradient of a weight is input times
# error. The mean of products is not the product of means, with or without pooling:

# %%
inputs = np.array([example.stored[4]["x"] for example in by_hand.examples])
outputs = [example.output for example in by_hand.examples]
errors = np.array(list(map(loss.error, outputs, classes.tolist())))
each = np.mean(list(map(np.outer, errors, inputs)), axis=0)
once = np.outer(errors.mean(0), inputs.mean(0))
print("each on its own:", measure_distance(each, by_hand.gradients[4]["weight"]) < 1e-12)
print(f"once for all: {measure_distance(once, each):.2f} away in the last layer")

# %% [markdown]
# ## The picture
#
# Three examples at one map of the pooling layer: the darker, the larger. A dot is the winner of its
# window. To the right, how often each input wins among all 60 examples: over a batch many inputs
# of a window get a gradient, each from other examples.

# %%
number = 0  # of the map
title = "Each example has its own winners, and sends its gradient to them alone"
picture = Picture(720, 250, title)
for place, example in enumerate(by_hand.examples[:3]):
    values = model[:2](images[place : place + 1]).detach().numpy()[0, number]
    name = f"example {place}, a {classes[place]}"
    draw_map(
        picture, 16 + 176 * place, name, values, dots=example.stored[2]["winners"][number].ravel()
    )
counts = wins[number].reshape(6, 6)
draw_map(picture, 16 + 176 * 3, "wins among 60 examples", counts, numbers=True)
picture.save("5_max_pooling.svg")
