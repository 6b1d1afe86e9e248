"""Mixtures of experts and relative positions of Hugging Face transformers, as they come.

Oracle: `ledger_cases.one_at_a_time`, plain autograd of each example alone. Tolerance:
`ledger_cases.BOUND`; these models compute norms and gates in float32 whatever their weights are, so
that it is that of float32 throughout. A wrong owner of a row is off by more than 1e-2, as the
control shows.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from anybatch.ledger.contractions import placement
from ledger_cases import ALL, BOUND, LEAN, observe_figures, one_at_a_time, worst
from test_ledger_transformers import SMALL, Logits, ids, no_network, transformers

__all__ = ["no_network"]  # a fixture of these tests too

EXPERTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Mixtral": ("MixtralConfig", "MixtralForCausalLM", {"num_local_experts": 4}),
    "Qwen3-MoE": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {"num_experts": 4, "moe_intermediate_size": 8, "head_dim": 8},
    ),
    "OLMoE": ("OlmoeConfig", "OlmoeForCausalLM", {"num_experts": 4, "eos_token_id": None}),
    "GPT-OSS": (
        "GptOssConfig",
        "GptOssForCausalLM",
        {"num_local_experts": 4, "head_dim": 8, "rope_parameters": {"rope_type": "default"}},
    ),
    "DeepSeek-V3": (
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        {
            "n_routed_experts": 4,
            "moe_intermediate_size": 8,
            "n_group": 2,
            "topk_group": 1,
            "kv_lora_rank": 8,
            "q_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
            "first_k_dense_replace": 1,
        },
    ),
}


def mixture(name: str, way: str) -> nn.Module:
    config_name, model_name, settings = EXPERTS[name]
    settings = {**SMALL, "num_experts_per_tok": 2, "num_key_value_heads": 2, **settings}
    config = getattr(transformers, config_name)(**settings)
    config._experts_implementation = way
    return Logits(getattr(transformers, model_name)(config), ids)


def switch() -> nn.Module:
    config = transformers.SwitchTransformersConfig(
        vocab_size=40,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_decoder_layers=2,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
        num_heads=2,
        num_experts=4,
        dropout_rate=0,
        decoder_start_token_id=0,
    )
    model = transformers.SwitchTransformersForConditionalGeneration(config)
    return Logits(
        model, lambda m, x: m(input_ids=x, decoder_input_ids=x.flip(1), use_cache=False).logits
    )


def deberta(**settings: Any) -> nn.Module:
    config = transformers.DebertaV2Config(
        **SMALL,
        relative_attention=True,
        position_buckets=4,
        pos_att_type=["p2c", "c2p"],
        **settings,
    )
    return Logits(transformers.DebertaV2ForMaskedLM(config), lambda m, x: m(input_ids=x).logits)


def deberta_1() -> nn.Module:
    config = transformers.DebertaConfig(**SMALL, relative_attention=True, pos_att_type=["p2c"])
    return Logits(transformers.DebertaForMaskedLM(config), lambda m, x: m(input_ids=x).logits)


MODELS: dict[str, Callable[[], nn.Module]] = {
    **{
        f"{name}, {way}": lambda name=name, way=way: mixture(name, way)
        for name in EXPERTS
        for way in ("eager", "grouped_mm")
    },
    "Mixtral, batched_mm": lambda: mixture("Mixtral", "batched_mm"),
    "Switch": switch,
    "DeBERTa-v2": deberta,
    "DeBERTa-v2 with a convolution": lambda: deberta(conv_kernel_size=3, share_att_key=True),
    "DeBERTa": deberta_1,
}


def batch_of(size: int) -> tuple[Tensor]:
    generator = torch.Generator().manual_seed(size)
    return (torch.randint(2, 40, (size, 6), generator=generator),)


@pytest.mark.fast(2)
@pytest.mark.parametrize("name", MODELS)
def test_a_model_as_it_is_has_the_figures_of_each_example_alone(name, caplog):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    model = model if "grouped" in name else model.double()  # torch has that kernel in float32
    for size in (1, 4, 6):  # 6 is the length of the sequences too, 4 the number of experts
        batch = batch_of(size)
        truth = one_at_a_time(model, batch)
        for observe in (ALL, LEAN):
            figures = observe_figures(model, batch, observe=observe)
            assert worst(figures, truth) < BOUND[torch.float32]
    assert caplog.messages == []  # none of them went through its examples one after the other


def test_rows_of_the_wrong_owner_would_show(monkeypatch):  # the control
    def next_example(gradients: Tensor, owners: Tensor, size: int) -> Tensor:
        return group_rows(gradients, torch.where(owners < 0, owners, (owners + 1) % size), size)

    group_rows = placement.group_rows
    torch.manual_seed(0)
    model, batch = mixture("Mixtral", "eager").double().eval(), batch_of(6)
    observe_figures(model, batch)
    monkeypatch.setattr("anybatch.ledger.contractions.placement.group_rows", next_example)
    assert worst(observe_figures(model, batch), one_at_a_time(model, batch)) > 1e-2
