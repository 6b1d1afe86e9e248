"""Models of Hugging Face transformers, as they are: random weights, small configurations.

Oracle: `ledger_cases.one_at_a_time`, plain autograd of each example alone. Tolerance:
`ledger_cases.BOUND` in float64; where a model computes in float32 whatever its weights are, 1e-4.
"""

import socket
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ledger_cases import BOUND, observe_figures, one_at_a_time, worst

transformers: Any = pytest.importorskip(
    "transformers", reason="transformers is not installed: pip install 'anybatch[audit]'"
)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_):
        raise OSError("these tests need no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


SMALL: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 12,
}


class Logits(nn.Module):
    """A model's output for ids, or for images."""

    def __init__(self, model: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.model, self.call = model, call

    def forward(self, inputs: Tensor) -> Tensor:
        return self.call(self.model, inputs)


def ids(model: nn.Module, inputs: Tensor) -> Tensor:
    return model(input_ids=inputs, use_cache=False).logits


def masked_ids(model: nn.Module, inputs: Tensor) -> Tensor:
    mask = (torch.arange(inputs.shape[1]) < 2 + inputs[:, :1] % 5).long()
    logits = model(input_ids=inputs, attention_mask=mask).logits
    return logits * mask[:, :, None]


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=12)
    return Logits(transformers.GPT2LMHeadModel(config), ids)


def llama() -> nn.Module:
    config = transformers.LlamaConfig(**SMALL, num_key_value_heads=1)
    return Logits(transformers.LlamaForCausalLM(config), ids)


def bert() -> nn.Module:
    return Logits(transformers.BertForMaskedLM(transformers.BertConfig(**SMALL)), masked_ids)


def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, dropout_rate=0
    )
    model = transformers.T5ForConditionalGeneration(config)
    return Logits(
        model, lambda m, x: m(input_ids=x, decoder_input_ids=x.flip(1), use_cache=False).logits
    )


def vit() -> nn.Module:
    settings = {
        k: v for k, v in SMALL.items() if k not in ("vocab_size", "max_position_embeddings")
    }
    config = transformers.ViTConfig(**settings, image_size=8, patch_size=4, num_labels=5)
    model = transformers.ViTForImageClassification(config)
    return Logits(model, lambda m, x: m(pixel_values=x).logits)


def resnet() -> nn.Module:
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="basic", num_labels=5
    )
    model = transformers.ResNetForImageClassification(config)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.GroupNorm(4, child.num_features))
    return Logits(model, lambda m, x: m(pixel_values=x).logits)


def mamba() -> nn.Module:
    config = transformers.MambaConfig(
        vocab_size=40, hidden_size=16, state_size=4, num_hidden_layers=2, intermediate_size=24
    )
    return Logits(transformers.MambaForCausalLM(config), ids)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "GPT-2": gpt2,
    "Llama": llama,
    "BERT": bert,
    "T5": t5,
    "ViT": vit,
    "ResNet": resnet,
    "Mamba": mamba,
}


IMAGES = {"ViT", "ResNet"}
TOLERANCE = {"Mamba": 1e-4}


def batch_for(name: str, size: int) -> tuple[Tensor]:
    if name in IMAGES:
        return (torch.randn(size, 3, 8, 8, dtype=torch.float64),)
    return (torch.randint(2, 40, (size, 6)),)


@pytest.mark.fast(2)
@pytest.mark.parametrize("name", MODELS)
def test_a_model_as_it_is_has_the_figures_of_each_example_alone(name):
    torch.manual_seed(0)
    model = MODELS[name]().double().eval()
    for size in (3, 6):  # 6 is the length of the sequences too
        batch = batch_for(name, size)
        truth = one_at_a_time(model, batch)
        assert worst(observe_figures(model, batch), truth) < TOLERANCE.get(
            name, BOUND[torch.float64]
        )


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_model_that_runs_its_blocks_again_in_the_backward_pass(reentrant):
    torch.manual_seed(0)
    model = llama().double().train()
    model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    batch = batch_for("Llama", 4)
    truth = one_at_a_time(model, batch)
    assert all(bool((squares > 0).all()) for squares in truth.squares.values())  # every layer
    assert worst(observe_figures(model, batch), truth) < BOUND[torch.float64]


def test_a_tied_head_counts_with_the_embedding_and_not_beside_it():  # the control
    torch.manual_seed(0)
    model, batch = gpt2().double().eval(), batch_for("GPT-2", 4)
    truth = one_at_a_time(model, batch)
    model.model.lm_head.weight = nn.Parameter(model.model.lm_head.weight.detach().clone())
    untied = one_at_a_time(model, batch)
    name = "model.transformer.wte.weight"
    apart = untied.squares[name] + untied.squares["model.lm_head.weight"]
    assert ((apart - truth.squares[name]).norm() / truth.squares[name].norm()) > 1e-2
