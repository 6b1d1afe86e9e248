"""Figures of each example of a batch in which a spike was found, from all ranks.

    id, loss, part, norm, height, share      of its gradient and its loss
    content, length, label                   of its inputs and its target, where a batch shows them

    part = c_i v_i,    height = |c_i| n_i |grad m_i|,    share = c_i n_i <grad m_i, G> / |G|^2

`content` is a hash of the inputs without padding: two examples with the same inputs have one hash.
"""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anybatch import distributed
from anybatch.batch import Padded, get_inputs
from anybatch.gradient import Gradient
from anybatch.ledger import Ledger
from anybatch.pytree import MicroBatches, Shared, count_examples, list_leaves, prepare_batch

__all__ = ["Rows", "gather_rows"]

Rows = Mapping[str, list[Any]]
"""One list for each figure that is known, over the whole batch."""

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_LABELS = ("labels", "label")  # entries of a batch that is a dict


def gather_rows(gradient: Gradient, ledger: Ledger | None, share: Any) -> Rows:
    """Gather the figures of all examples of the batch, the same on every rank.

    Args:
        gradient: of this rank's share.
        ledger: of the same update; None: there is none.
    """

    def describe() -> dict[str, list[Any]]:
        return _describe_losses(gradient, ledger) | _describe_contents(share)

    per_rank = distributed.all_gather_object(describe, gradient.group)
    filled = [columns for columns in per_rank if columns["loss"]]
    names = [name for name in filled[0] if all(name in columns for columns in filled)]
    rows = {name: [x for columns in filled for x in columns[name]] for name in names}
    size = len(rows["loss"])
    return {"id": list(range(size))} | rows


def _describe_losses(gradient: Gradient, ledger: Ledger | None) -> dict[str, list[Any]]:
    """Describe what the examples of a share add to the loss and to the gradient."""
    terms, coefficients = gradient.terms, gradient.term_coefficients
    products = [c * terms[name].values.to(c.device).double() for name, c in coefficients.items()]
    parts = torch.stack([rows if rows.ndim == 1 else rows.sum(1) for rows in products]).sum(0)
    (term,) = terms.values() if len(terms) == 1 else (None,)
    is_plain = term is not None and term.values.ndim == 1
    columns: dict[str, Tensor] = {"loss": parts, "part": parts}
    if term is not None and is_plain:
        columns["loss"] = term.means
        if term.counts is not None:
            columns["length"] = term.weights
    if gradient.ids is not None:
        columns["id"] = gradient.ids
    if ledger is not None and ledger.norms is not None:
        factor = torch.ones_like(ledger.norms)
        if term is not None and is_plain:
            weights = next(iter(coefficients.values())) * term.weights
            factor = weights.to(factor).abs()
        columns |= {"norm": ledger.norms, "height": factor * ledger.norms}
    if ledger is not None and ledger.share is not None:
        columns["share"] = ledger.share
    return {name: column.detach().cpu().tolist() for name, column in columns.items()}


def _describe_contents(share: Any) -> dict[str, list[Any]]:
    """Describe inputs and targets; only figures that every piece of the share has."""
    pieces = list(share.batches) if isinstance(share, MicroBatches) else [share]
    pieces = [piece for piece in pieces if count_examples(piece)]
    columns = [_describe_piece(prepare_batch(piece)) for piece in pieces]
    names = [name for name in columns[0] if all(name in c for c in columns)] if columns else []
    return {name: [x for c in columns for x in c[name]] for name in names}


def _describe_piece(batch: Any) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {}
    contents = list(_list_contents(batch))
    if contents:
        columns["content"] = [hashlib.sha256(content).hexdigest() for content in contents]
    lengths, labels = _find_mask(batch), _find_labels(batch)
    if lengths is not None:
        columns["length"] = lengths.sum(1).tolist()
    if labels is not None:
        columns["label"] = labels.tolist()
    return columns


def _list_contents(batch: Any) -> Iterator[bytes]:
    """Yield the inputs of each example as bytes, without padding."""
    mask, inputs = _find_mask(batch), get_inputs(batch)
    if isinstance(inputs, Padded):
        leaves: list[Any] = [inputs.values]
    elif isinstance(inputs, Mapping):
        leaves = list_leaves({k: v for k, v in inputs.items() if k not in _LABELS})
    else:
        leaves = list_leaves(inputs)
    leaves = [leaf for leaf in leaves if not isinstance(leaf, Shared) and leaf is not None]
    if not leaves or not all(isinstance(leaf, Tensor | np.ndarray) for leaf in leaves):
        return
    arrays = [_to_array(leaf) for leaf in leaves]
    for i in range(len(arrays[0])):
        rows = [array[i] for array in arrays]
        if mask is not None:  # rows of padded values lose their padding
            keep = mask[i].numpy()
            rows = [row[keep] if row.shape[:1] == keep.shape else row for row in rows]
        yield b"".join(np.ascontiguousarray(row).tobytes() for row in rows)


def _find_mask(batch: Any) -> Tensor | None:
    """Return the mask [B, T] of the values that are no padding; None: the batch shows none."""
    inputs = get_inputs(batch)
    mask = inputs.mask if isinstance(inputs, Padded) else None
    if isinstance(inputs, Mapping):
        mask = inputs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return None
    return mask.detach().cpu().bool()


def _find_labels(batch: Any) -> Tensor | None:
    """Return the labels [B] of a batch; None: it shows no integers, one for each example."""
    labels: Any = None
    if isinstance(batch, Mapping):
        labels = next((batch[name] for name in _LABELS if name in batch), None)
    elif isinstance(batch, tuple | list) and len(batch) > 1 and not isinstance(batch, Padded):
        labels = batch[1]
    if isinstance(labels, np.ndarray):
        labels = torch.from_numpy(labels)
    if not isinstance(labels, Tensor) or labels.ndim != 1 or labels.dtype not in _INTEGERS:
        return None
    return labels.detach().cpu()


def _to_array(leaf: Tensor | np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    if isinstance(leaf, np.ndarray):
        return leaf
    values = leaf.detach().cpu()
    return (values.float() if values.dtype == torch.bfloat16 else values).numpy()
