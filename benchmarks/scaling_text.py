"""docs/scaling.md, from the raw results of benchmarks/scaling.py."""

from collections.abc import Mapping
from textwrap import fill
from typing import Any

from scaling_tables import plots, said, tables

__all__ = ["plots", "text_from"]

WIDTH = 100


def text_from(result: Mapping[str, Any]) -> str:
    """The document of a result file."""
    blocks = TEXT.format(**said(result), **tables(result)).split("\n\n")
    return "\n\n".join(map(_filled, blocks))


def _filled(block: str) -> str:
    """The lines of prose and of lists broken anew; others as they are."""
    if block.startswith(("|", "#", "!", "```")):
        return block
    items = block.removeprefix("- ").split("\n- ") if block.startswith("- ") else [block]
    mark = "- " if block.startswith("- ") else ""
    texts = [" ".join(item.split()).replace(" - ", "\0-\0") for item in items]
    ends = "\n" if block.endswith("\n") else ""
    filled = [fill(mark + text, WIDTH, subsequent_indent=" " * len(mark)) for text in texts]
    return "\n".join(filled).replace("\0", " ") + ends


TEXT = """# How it scales

Written by `make scaling`, which runs `benchmarks/scaling.py --write`, from the
[raw results](../benchmarks/results/scaling.json); {seconds} seconds on {cores} cores
({processor}). What is *measured* was measured there, over gloo. What is *simulated* plays every
message of every rank at stated costs, by `benchmarks/scaling_model.py`. What is *not built* is not
in anybatch.

The question: an update that is the same bits on every number of ranks needs a sum in a fixed order.
What does that cost beside an all-reduce in any order, up to {ranks} ranks; where does it end; and
what do a keyed order and a row for each example cost at 10^12 examples?

In short:

- The exact all-reduce sends as many messages and bytes as a ring, where each rank holds one node of
  the tree: a power of two of grains on each. Measured, it takes {over_two} times the plain one's
  time at 2 ranks and {over_more} at 4 and 8. With other numbers of grains it sends up to
  {worst_bytes} times the bytes (section 2).
- It is bound by messages on many ranks. The {bucket} that travel at once are too few above
  {bucket_ranks} ranks on the assumed network: a gradient of 10^9 parameters takes {in_buckets}
  over {ranks} ranks, in one piece {in_one}, and by a tree of messages {halving_time}, which can
  have the same bits (not built).
- Weights, gradients and AdamW's state of {whole_fits} billion parameters fill {device} with 8
  grains a rank; with the state in parts it is {state_fits} billion. Above that the model must lie
  in shards (section 5).
- An index of the order takes {index} ns among 10^12, {index_over} of what it takes among 10^3, in
  constant memory. The ledger takes {row_bytes} TB an epoch of 10^12.

## 1. Messages and bytes

W ranks, n bytes of gradient, alpha seconds a message, beta seconds a byte sent, gamma seconds a
byte added; k nodes of the tree on each rank:

| all-reduce | seconds |
|---|---|
| ring | 2 (W-1) alpha + 2 n (W-1)/W beta + n (W-1)/W gamma |
| halving | 2 log2(W) alpha + 2 n (W-1)/W beta + n (W-1)/W gamma |
| exact | 2 (W-1) alpha + (k+1) n (W-1)/W beta + n (kW-1)/W gamma |

*Halving*, also called a tree, exchanges and adds n/2, n/4, ... bytes and tells the sums backwards;
the line is that of a power of two, and others take 2 alpha + 2 n beta + n gamma more than the power
below. *Exact* is `sum_over_ranks` of `anybatch.gradient.pairwise_sum`: all_to_all brings each rank
one slice of every node, it adds them up in the order of the tree, and every rank gets the sums.
A rank, with k = 1:

{counted}

The W-1 messages of an all_to_all against the log2 W of a tree are its price on many ranks. A
simulator that plays the messages, with one port a rank, comes to the same seconds to 12 digits
(`tests/test_scaling_document.py`, which also sees that what is played is an all-reduce).

## 2. Grains that make no whole subtree

A rank sends one node if its run of grains is one aligned subtree. With G grains in the batch that
holds for every rank where G / W is a power of two, whatever W is; elsewhere a
run of g falls into up to 2 log2 g nodes. Bytes of the busiest port over those of a ring:

{aligned}

So: make the batch W times a power of two of grains, at the largest W that it is to run on and at
its divisors by powers of two. The bits are the same either way.

## 3. Measured at 2, 4 and 8 ranks

Processes of this machine over gloo, one thread each. *Plain* is `distributed.all_sum`, gloo's ring;
both are given the same sums of a rank's grains, and the time is that of the slowest rank, from a
barrier on, in turn (A B A B); medians, and medians of the ratios round by round. *Exact* holds 8
grains, one node a rank; *10 grains* up to three.

{measured}

Different bits of the sum over 2, 4 and 8 ranks, at any size: {bits}.
The command fails if exact has not 1, or if plain, the control, has.

**Against the model.** alpha and beta are fitted to the seconds of 2 ranks, with gamma measured
({gamma} ns a byte): plain {plain_alpha} µs and {plain_beta} ns a byte, exact {exact_alpha} µs and
{exact_beta} ns a byte, which has the copies in it. At 2 ranks measured over model is {residual}.
4 and 8 ranks are predicted from that, in two ways: as if each rank had a core of its own, and as if
all work were shared by {cores} cores (seconds times W / {cores}). *From 4*: 8 ranks predicted from
a fit to 4, with shared cores. Measured over predicted:

{modelled}

With a core each the model is too fast, by {exact_own} for exact and {plain_own} for plain: more
ranks than cores take turns. With shared cores the ratios are {exact_shared} and {plain_shared}.
Of exact's, {between} have the measured time between the two. Likely reasons: a fit to 2 ranks takes
for work what is waiting, which cores need not share, and counts copies, which grow with n, as if
they grew with n (W-1)/W; and each step of a ring waits for the one before it and for a rank that
has a core just then, while the messages of an all_to_all wait for nothing. Where cores are short at
both ends, from 4 to 8, exact is {exact_from_four} of what is predicted, plain {plain_from_four}. So
counts and shape are checked within these factors; the alpha of a network is not.

## 4. Simulated up to {ranks} ranks

Machines of 8 ranks. **Assumed**: {near} within a machine, {far} between machines, {added} of sums.
The microseconds are those that NCCL's own model has for a ring over NVLink and over a network
(NVIDIA/nccl, src/graph/tuning.cc at 01afd20, `hwLat`, Simple); the GB/s are what is advertised of
machines of 8 H100: 900 GB/s both ways within, 400 Gb/s a GPU between, 3.35 TB/s of memory, of which
a sum takes three bytes for one. No GPU was measured. Nothing else is on the network, and compute is
left out. Float32 gradients, seconds of one all-reduce over {ranks} ranks:

{simulated}

![Over parameters](scaling/parameters.svg)

A gradient of 10^9 parameters:

{by_ranks}

![Over ranks](scaling/ranks.svg)

- **Beside plain.** Exact takes the seconds of one ring, which uses one port of a machine's eight.
  On many ranks a plain all-reduce is a tree, or many rings over all ports: compare with halving.
- **Messages.** One between machines costs as much as {half}, and a rank sends {messages}. Here
  alpha keeps the port busy; as far as it is mere delay, the messages of an all_to_all overlap, and
  those of a ring do not: the seconds of exact are an upper bound.
- **Bytes between machines.** An all_to_all over all ranks sends nearly all of its bytes there; of
  what is added up within a machine first, an eighth is left.
- **Buckets** are on their way while the last backward pass still runs (`gradient/buckets.py`,
  `benchmarks/overlap.py`): an eighth of the gradient each where that is enough for all ranks, and
  `tree.BUCKET_BYTES`, {bucket}, at most. Each pays all messages again: beyond {bucket_ranks} ranks
  they cost more than its bytes. W alpha/beta, {bucket_wanted} at {ranks}
  ranks, would make them even; 10^9 parameters in one piece take 1/{bucket_factor} of the time. Bits
  do not depend on buckets.
- **Two levels** (not built): exact over the ranks of a machine, then slice by slice over machines.
  The ranks of a machine hold a subtree, so the bits are the same; {levels_time} for 10^9
  parameters, {levels_factor} times faster.
- **Halving** (not built): at distances 1, 2, 4, ... rank r adds what r xor distance has, which is
  the neighbouring subtree: the canonical tree itself, with most bytes within a machine.
  {halving_time}, {halving_factor} times faster, and {small_halving} instead of {small} at 10^6
  parameters. It wants a power of two of ranks with one node each.
- **Ragged grains** cost {ragged_bytes} times a ring's bytes at 100,000 grains on {ranks} ranks.

## 5. Where sharding must take over

Float32 weights 4, AdamW's state 8, gradients 4 (log2 g + 1) bytes a parameter: a tree that is
streamed over a rank's g grains holds log2 g + 1 of them (16 bytes in all with one grain). Bytes a
parameter at {ranks} ranks, and how many billions fill {device}, without activations, the largest
layer and what is in flight:

{sharded}

- **Memory** asks for it first. With 8 grains a rank all of it fits up to {whole_fits} billion
  parameters, with the state in parts up to {state_fits} billion: the last two rows of the first
  table in section 4 fit no such device otherwise than in shards.
- **State in parts** keeps the bits: an optimiser that goes element by element makes the same of a
  slice. It costs one all_gather of the weights more, {gathered} for 10^9 parameters between
  machines, since `.grad` stays whole. The slice of the exact sum that a rank has before its own
  all_gather is all that its part of the state needs: without whole gradients it were 2 again.
- **In shards** the weights are gathered layer by layer, twice a grain, and gradients scattered
  after each: one grain a rank is what it is made for, and then memory falls as 1/W. Of more grains
  the owner of a slice keeps the nodes of W runs, as many bytes as a whole gradient has for each;
  without `bitwise` a running sum of its slice, 16/W in all.
- **Dealt out round by round**, the j-th grain of rank r being j W + r, each round of W is a subtree
  where W is a power of two, and slices of log2 g + 1 nodes suffice.

## 6. The order at 10^12 examples

Measured, one thread. A position becomes an example by a keyed permutation; blocks of 16,384 are
made at once. In a row, steps of 256; *anywhere*, one step at random; *kept*: `torch.randperm`,
which holds 8 bytes an example on each rank.

{orders}

An epoch of 10^12 is {order_hours} core hours of indices. A rank makes those of the whole batch and
keeps its share: with batches of {batch} examples that is {order_update} ms an update on every
rank. Asking the order for a rank's share alone would divide it by W (not built: an order is asked
for `indices(step)`).

## 7. The ledger at 10^12 examples

Measured on {rows} rows of a linear model with ids among 10^12, in Parquet, on one thread; TB of one
epoch of 10^12 examples follow from that:

{ledger}

- **Disk.** {row_bytes} bytes a row, since random ids, losses and norms do not compress.
- **Writing** is the first rank's alone: {ledger_hours} core hours an epoch. It keeps the rows of
  all ranks in memory from one checkpoint to the next.
- **Travel.** The rows of an update go to every rank, pickled, {told_bytes} bytes each: with batches
  of {batch} examples {told_update} MB arrive at each rank. Only the first needs them.
- **Every k-th update** divides all three by k, and what observing costs in time, too
  ([measured](../benchmarks/results/observed_step.json)). Each update is a random sample of the
  epoch, so that means and quantiles over examples lose nothing but size; the history of one example
  is lost. `steps` observes every update or none: a loop of one's own passes `observe=` to
  `batch_gradient` when it wants to look.

## Run it again

`make scaling` runs `python benchmarks/scaling.py --write`. `--write` replaces this page and its
figures. With `--seconds 1` the command takes less time.

`tests/test_scaling_document.py` makes this text from the raw results again, and holds the closed
forms against the simulator and the simulator's messages against what an all-reduce is.
"""
