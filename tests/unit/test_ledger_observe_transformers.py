"""`ab.observe` of transformers as they come: the loss is the model's own mean.

Oracle: `observed_loops.one_at_a_time`, plain autograd of each example alone, within its bound. For
CLIP, whose loss couples examples, the share of an example is <d_i, its own embeddings>, d_i the
gradient of the loss with respect to those; `logit_scale` meets pairs of examples and is left out.
The control gives each example the embeddings' gradient of another.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import anybatch as ab
from observed_loops import BOUND, assert_exact, distance, normal, one_at_a_time, whole_gradient

transformers = pytest.importorskip("transformers")


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=50,
        n_positions=12,
        n_embd=16,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=1,
    )
    config.bos_token_id, config.eos_token_id = 0, 1
    return transformers.GPT2LMHeadModel(config)


def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2
    )
    config.decoder_start_token_id = 0
    return transformers.T5ForConditionalGeneration(config)


def clip() -> nn.Module:
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    texts = {**size, "num_attention_heads": 2, "vocab_size": 50, "max_position_embeddings": 12}
    images = {**size, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    texts |= {"eos_token_id": 49, "bos_token_id": 48, "pad_token_id": 1}
    config = transformers.CLIPConfig(text_config=texts, vision_config=images, projection_dim=8)
    return transformers.CLIPModel(config)


def words(*shape: int) -> Tensor:
    return torch.randint(2, 48, shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.fast(2)
@pytest.mark.parametrize("sizes", [(6, 7), (6, 6), (3, 6)])
@pytest.mark.parametrize("make", [gpt2, t5])
def test_language_models(make, sizes):
    torch.manual_seed(0)
    model, ids = make().double().eval(), words(*sizes)
    shares = [model(input_ids=row[None], labels=row[None]).loss / len(ids) for row in ids]
    truth = one_at_a_time(model, shares)
    for _ in range(2):
        model.zero_grad()
        with ab.observe(model) as ledger:
            model(input_ids=ids, labels=ids).loss.backward()
        assert_exact(ledger, model, truth)


def contrast(model: nn.Module, images: Tensor, texts: Tensor) -> Tensor:
    logits = texts @ images.T * model.logit_scale.exp()
    labels = torch.arange(len(logits))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


@pytest.mark.fast(1)
@pytest.mark.parametrize("sizes", [(6, 7), (6, 6), (2, 7)])
@pytest.mark.parametrize("how", ["loss", "logits", "features"])
def test_clip_keeps_examples_apart_though_its_loss_does_not(how, sizes):
    torch.manual_seed(0)
    model, ids, pixels = clip().double(), words(*sizes), normal(sizes[0], 3, 16, 16)
    ids[:, -1] = 49
    outputs = model(input_ids=ids, pixel_values=pixels)
    pair = outputs.image_embeds, outputs.text_embeds
    contrast(model, *pair).backward(retain_graph=True)
    plain = whole_gradient(model)
    ends = torch.autograd.grad(contrast(model, *pair), pair, retain_graph=True)
    shares = sum((y * d).sum(1) for y, d in zip(pair, ends, strict=True))
    truth = one_at_a_time(model, shares).norm(dim=1)

    def loss() -> Tensor:
        if how == "features":
            images = model.get_image_features(pixel_values=pixels).pooler_output
            texts = model.get_text_features(input_ids=ids).pooler_output
            return contrast(model, F.normalize(images, dim=1), F.normalize(texts, dim=1))
        outputs = model(input_ids=ids, pixel_values=pixels, return_loss=True)
        return outputs.loss if how == "loss" else contrast(model, *outputs_of(outputs))

    for _ in range(2):
        model.zero_grad()
        with ab.observe(model) as ledger:
            loss().backward()
        norms = [x for name, x in ledger.parameter_norms.items() if name != "logit_scale"]
        assert distance(torch.stack(norms).norm(dim=0), truth) < BOUND
        assert distance(whole_gradient(model), plain) < BOUND
    others = sum((y * d.roll(1, 0)).sum(1) for y, d in zip(pair, ends, strict=True))
    assert distance(one_at_a_time(model, others).norm(dim=1), truth) > 0.05  # the control


def outputs_of(outputs: object) -> tuple[Tensor, Tensor]:
    return outputs.image_embeds, outputs.text_embeds  # type: ignore[attr-defined]
