# %% [markdown]
# # 2. Is it usual to minimise the mean loss over a batch, or the sum? Does it matter?
#
# Yes, the mean is usual. For a batch of B examples the sum is B times the mean, and so is its
# gradient. An update takes *rate* times the gradient off the weights, so the rate can take up the
# factor: rate / B. But a *penalty*, which keeps the weights small, must be multiplied by B.
#
# We train a table of 64 x 10 weights to read digits of 8 x 8 pixels, four times.

# %%
import torch
from drawing import draw_lines
from torch import nn
from torch.nn import functional as F

import anybatch as ab
from anybatch import reference
from anybatch.data import load_digits

B, RATE, PENALTY, UPDATES = 60, 0.3, 0.1, 29
images, classes = load_digits()[:2]
images = images.double().flatten(1)
batches = [(images[i : i + B], classes[i : i + B]) for i in range(0, B * UPDATES, B)]
zeros = torch.zeros(10, 64, dtype=torch.float64)  # one row of weights for each digit

# %% [markdown]
# ## By hand, one example after the other
#
# The loss of a digit is minus the logarithm of the probability that the model gives to the right
# answer (`SoftmaxCrossEntropy`). All weights start at 0.


# %%
def train_by_hand(reduction, rate, penalty):
    """Return the weights after one update for each batch."""
    network = reference.Network([reference.Dense(64, 10, bias=False)], [{"weight": zeros.numpy()}])
    pairs = [(inputs.numpy(), targets.tolist()) for inputs, targets in batches]
    loss, sgd, squares = reference.SoftmaxCrossEntropy(), reference.SGD(rate), reference.L2(penalty)
    steps = reference.train(network, loss, pairs, sgd, reduction=reduction, penalty=squares)
    *_, last = steps
    return torch.from_numpy(last.network.parameters[0]["weight"])


# %% [markdown]
# ## The same with the engine, all examples at once
#
# We keep the length of the weights (the root of the sum of their squares) after each update.


# %%
def example_losses(model, batch):
    """Return one loss for each example. Nothing is averaged here."""
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def train(reduction, rate, penalty):
    """Return the weights after one update for each batch, and their length after each."""
    model = nn.Linear(64, 10, bias=False).double()
    model.weight.data = zeros.clone()
    objective = ab.Objective(example_losses, reduction=reduction, penalty=ab.L2(penalty))
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    lengths = [0.0]
    for batch in batches:
        ab.batch_gradient(model, objective, batch)
        optimizer.step()
        lengths.append(float(model.weight.detach().norm()))
    return model.weight.detach(), lengths


# %% [markdown]
# ## Four trainings

# %%
trainings = {
    "mean": (ab.Mean(), RATE, PENALTY),
    "sum, rate / B, penalty * B": (ab.Sum(), RATE / B, PENALTY * B),
    "sum, rate / B, same penalty": (ab.Sum(), RATE / B, PENALTY),
    "sum, same rate and penalty": (ab.Sum(), RATE, PENALTY),
}
results = {name: train(*settings) for name, settings in trainings.items()}
right = results["mean"][0]
for name, (reduction, rate, penalty) in trainings.items():
    weights = results[name][0]
    by_hand = train_by_hand(type(reduction).__name__.lower(), rate, penalty)
    away, same = (weights - right).norm() / right.norm(), torch.allclose(weights, by_hand)
    print(f"{name:28s} {away:7.2f} away from the mean, as by hand: {same}")

# %% [markdown]
# With both factors the sum makes the same updates as the mean: its dashed line covers the other.
# Without the factor of the penalty the weights grow: the penalty is 60 times too weak. With the
# rate of the mean each step is 60 times too long, and the line leaves the picture.

# %%
lines = {name: list(enumerate(lengths)) for name, (_, lengths) in results.items()}
title = "The sum, with the right factors, is the mean"
x, y = ("updates", (0, 5, 10, 15, 20, 25, 30)), ("length of the weights", (0, 1, 2, 3, 4))
draw_lines(title, lines, x, y).save("2_mean_or_sum.svg")
