"""Tiny models of transformers in float64, ragged data for them, and trainers over both."""

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
LABEL = -100


def bert(kind: str, dropout: float = 0.0, **config: Any) -> nn.Module:
    torch.manual_seed(0)
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    model = getattr(transformers, f"BertFor{kind}")
    return model(transformers.BertConfig(**{**SIZES, **rates, **config})).double()


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0,
        eos_token_id=1, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).double()


def t5() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, dropout_rate=0.0,
        decoder_start_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config).double()


class Sentences(torch.utils.data.Dataset[dict[str, Any]]):
    """Sentences of different lengths with a label, or with a label for each token."""

    def __init__(self, number: int, labels: str) -> None:
        generator = torch.Generator().manual_seed(1)
        lengths = torch.randint(2, 9, (number,), generator=generator).tolist()
        self.rows = [torch.randint(2, 40, (n,), generator=generator) for n in lengths]
        self.classes = torch.randint(3, (number,), generator=generator).tolist()
        self.labels = labels

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        row = self.rows[i]
        if self.labels == "class":
            return {"input_ids": row, "labels": self.classes[i]}
        labels = row.clone()
        if self.labels == "some tokens":
            labels[::3] = LABEL
        return {"input_ids": row, "labels": labels}


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Pad to the longest sentence of these."""

    def pad(name: str, value: int) -> Tensor:
        columns = [row[name] for row in rows]
        return nn.utils.rnn.pad_sequence(columns, batch_first=True, padding_value=value)

    ids = pad("input_ids", 0)
    batch = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    if isinstance(rows[0]["labels"], int):
        return {**batch, "labels": torch.tensor([row["labels"] for row in rows])}
    return {**batch, "labels": pad("labels", LABEL)}


def arguments(folder: Path, size: int, accumulation: int, **more: Any) -> Any:
    defaults = {
        "report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no",
        "max_grad_norm": 0.0, "dataloader_pin_memory": False, "num_train_epochs": 2,
        "learning_rate": 0.1, "lr_scheduler_type": "constant", "optim": "sgd",
        "logging_strategy": "no",
    }  # fmt: skip
    return transformers.TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulation, **{**defaults, **more},
    )  # fmt: skip


class InOrder:
    """Mix-in of a trainer: the examples in the order of the data, so that a loop can follow."""

    def _get_train_sampler(self, *args: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)  # type: ignore[attr-defined]


def flatten(model: nn.Module, *, gradient: bool = False) -> Tensor:
    values = [p.grad if gradient else p.detach() for p in model.parameters() if p.requires_grad]
    return torch.cat([v.flatten() for v in values])


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())
