"""Losses of single examples for the models of transformers, by the model's kind.

    causal LM                  sum over tokens of -log p(token t+1 | tokens to t), and their number
    masked LM, tokens          sum over labelled tokens, and their number
    seq2seq                    the same over the decoder's tokens
    sequences, images, choice  cross entropy of the example; MSE or binary cross entropies by config
    question answering         mean of the start's and the end's cross entropy

A label of -100 does not count. With label smoothing e over C classes the loss of a token is
(1 - e) (-log p_y) + e / C sum_c (-log p_c), as the Trainer's. The mean of these losses is the loss
that the model itself returns, on a batch that is not cut.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anybatch.errors import ModelError
from anybatch.example_losses import ExampleLosses
from anybatch.extras import import_extra

__all__ = ["example_losses"]

IGNORED = -100

Losses = Callable[[nn.Module, Mapping[str, Any]], ExampleLosses]


def example_losses(model: nn.Module, *, label_smoothing: float = 0.0) -> Losses:
    """Return the example losses for a model of transformers, PEFT models included.

    Args:
        model: decides the kind of loss by its class, and by `config.problem_type`.
        label_smoothing: as `TrainingArguments.label_smoothing_factor`.

    Returns:
        A function of (model, batch), where the batch is a dict of the model's inputs and labels.

    Raises:
        ModelError: the kind of the model is not known.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(
        ...     vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1
        ... )
        >>> model = BertForSequenceClassification(config).eval()
        >>> batch = {"input_ids": torch.ones(3, 4).long(), "labels": torch.ones(3).long()}
        >>> example_losses(model)(model, batch).values.shape
        torch.Size([3])
    """
    kind = _find_kind(model)
    compute = _KINDS[kind]

    def losses(model: nn.Module, batch: Mapping[str, Any]) -> ExampleLosses:
        return compute(model, dict(batch), label_smoothing)

    losses.__name__ = f"example_losses for {kind.replace('_', ' ')}"
    return losses


def _compute_causal(model: nn.Module, batch: dict[str, Any], smoothing: float) -> ExampleLosses:
    labels = batch.pop("labels")
    logits = model(**batch).logits
    return _sum_tokens(logits[:, :-1], labels[:, 1:], smoothing)


def _compute_tokens(model: nn.Module, batch: dict[str, Any], smoothing: float) -> ExampleLosses:
    labels = batch.pop("labels")
    return _sum_tokens(model(**batch).logits, labels, smoothing)


def _compute_seq2seq(model: nn.Module, batch: dict[str, Any], smoothing: float) -> ExampleLosses:
    labels = batch.pop("labels")
    if "decoder_input_ids" not in batch and "decoder_inputs_embeds" not in batch:
        shift: Any = _get_base(model).prepare_decoder_input_ids_from_labels
        batch["decoder_input_ids"] = shift(labels=labels)
    return _sum_tokens(model(**batch).logits, labels, smoothing)


def _compute_classes(model: nn.Module, batch: dict[str, Any], smoothing: float) -> ExampleLosses:
    labels = batch.pop("labels")
    logits, config = _widen(model(**batch).logits), _get_base(model).config
    kind = getattr(config, "problem_type", None) or _guess_problem(logits, labels)
    if kind == "regression":
        difference = logits - labels.reshape(logits.shape).to(logits.dtype)
        return ExampleLosses(difference.square().mean(1))
    if kind == "multi_label_classification":
        values = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
        return ExampleLosses(values.mean(1))
    return _sum_tokens(logits[:, None], labels.reshape(-1, 1), smoothing)


def _guess_problem(logits: Tensor, labels: Tensor) -> str:
    if logits.shape[1] == 1:
        return "regression"
    return "multi_label_classification" if labels.is_floating_point() else "single_label"


def _compute_answers(model: nn.Module, batch: dict[str, Any], smoothing: float) -> ExampleLosses:
    positions = [batch.pop(f"{name}_positions").reshape(-1) for name in ("start", "end")]
    if smoothing:
        raise ModelError(
            "label_smoothing_factor has no effect on question answering in transformers. Set it "
            "to 0."
        )
    outputs = model(**batch)
    terms = []
    for logits, targets in zip((outputs.start_logits, outputs.end_logits), positions, strict=True):
        length = logits.shape[1]  # positions beyond the input do not count
        inside = targets.clamp(0, length)
        losses = F.cross_entropy(_widen(logits), inside, ignore_index=length, reduction="none")
        terms.append(losses)
        if (inside == length).any():
            raise ModelError(
                "An answer lies beyond the input: transformers then divides starts and ends by "
                "different numbers. Leave such examples out, or point them at position 0."
            )
    return ExampleLosses((terms[0] + terms[1]) / 2)


def _sum_tokens(logits: Tensor, labels: Tensor, smoothing: float) -> ExampleLosses:
    """Sum the cross entropies of an example's labelled tokens, in at least float32."""
    losses = F.cross_entropy(
        _widen(logits).transpose(1, 2),
        labels.long(),
        reduction="none",
        ignore_index=IGNORED,
        label_smoothing=smoothing,
    )
    return ExampleLosses(losses.sum(1), counts=(labels != IGNORED).sum(1))


def _widen(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


_KINDS: dict[str, Callable[[nn.Module, dict[str, Any], float], ExampleLosses]] = {
    "seq2seq": _compute_seq2seq,
    "causal_lm": _compute_causal,
    "masked_lm": _compute_tokens,
    "token_classification": _compute_tokens,
    "sequence_classification": _compute_classes,
    "image_classification": _compute_classes,
    "multiple_choice": _compute_classes,
    "question_answering": _compute_answers,
}

_MAPPINGS = {
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "causal_lm": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "masked_lm": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "token_classification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "sequence_classification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "image_classification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "multiple_choice": "MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES",
    "question_answering": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
}


def _find_kind(model: nn.Module) -> str:
    """Find the kind of a model by the tables of transformers' auto classes."""
    auto = import_extra(
        "transformers.models.auto.modeling_auto",
        "anybatch[transformers]",
        "the kinds of models are listed by transformers",
        ModelError,
    )
    name = type(_get_base(model)).__name__
    for kind, table in _MAPPINGS.items():
        classes = getattr(auto, table, {}).values()
        if any(name == c or (isinstance(c, tuple | list) and name in c) for c in classes):
            return kind
    raise ModelError(
        f"{name} is none of the kinds whose losses are known: {', '.join(_KINDS)}. Pass a loss for "
        f"each example: objective=ab.Objective(losses), where losses(model, batch) returns [B]."
    )


def _get_base(model: nn.Module) -> Any:
    """Return the model of transformers inside one of PEFT."""
    base = getattr(model, "get_base_model", None)
    return base() if callable(base) else model
