"""Hugging Face classes with random weights."""

from __future__ import annotations

import pytest
import torch

from tests.symmetry.models import Net, tokens
from tests.symmetry.test_infer import P, R, S, heads, infer, words

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(params=["sdpa", "eager"])
def attention(request):
    return request.param


def bert(**kwargs):
    return transformers.BertConfig(
        vocab_size=11,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=8,
        num_labels=3,
        **kwargs,
    )


def bert_groups(prefix):
    expected = {f"{prefix}.embeddings.word_embeddings": P, f"{prefix}.pooler.dense": S}
    for i in range(2):
        place = f"{prefix}.encoder.layer.{i}"
        tie = f"{place}.attention.heads"
        expected |= {f"{place}.attention.qk": heads(tie=tie), f"{place}.attention.vo": heads(tie=tie)}
        expected |= {f"{place}.intermediate.dense": P}
    return expected


def test_bert_model(attention):
    config = bert(attn_implementation=attention)
    model = Net(
        lambda s, ids: s.head(s.bert(ids).pooler_output),
        bert=transformers.BertModel(config),
        head=torch.nn.Linear(8, 2),
    )
    assert infer(model, tokens(3, 5)).groups == bert_groups("bert")


def test_bert_for_sequence_classification(attention):
    model = Net(
        lambda s, ids, mask: s.model(ids, attention_mask=mask).logits,
        model=transformers.BertForSequenceClassification(bert(attn_implementation=attention)),
    )
    mask = torch.ones(3, 5, dtype=torch.long)
    mask[0, 3:] = 0
    symmetry = infer(model, {"ids": tokens(3, 5), "mask": mask})
    assert symmetry.groups == bert_groups("model.bert")
    assert words(symmetry)["model.classifier.weight"] == ". model.bert.pooler.dense"


def test_gpt2(attention):
    config = transformers.GPT2Config(
        vocab_size=11, n_embd=8, n_layer=2, n_head=2, n_positions=8, attn_implementation=attention
    )
    model = Net(lambda s, ids: s.gpt(ids, use_cache=False).logits, gpt=transformers.GPT2LMHeadModel(config))
    symmetry = infer(model, tokens(3, 5))
    expected = {"gpt.transformer.wte": P}
    for i in range(2):
        place = f"gpt.transformer.h.{i}"
        tie = f"{place}.attn.heads"
        expected |= {
            f"{place}.attn.qk": heads(tie=tie),
            f"{place}.attn.vo": heads(tie=tie),
            f"{place}.mlp.c_fc": P,
        }
    assert symmetry.groups == expected
    assert (
        words(symmetry)["gpt.transformer.h.1.attn.c_attn.weight[0:8, 8:16]"]
        == "gpt.transformer.wte gpt.transformer.h.1.attn.qk"
    )


def test_llama():
    config = transformers.LlamaConfig(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8,
    )
    model = Net(
        lambda s, ids: s.model(ids, use_cache=False).logits, model=transformers.LlamaForCausalLM(config)
    )
    symmetry = infer(model, tokens(3, 5), tol=1e-6)  # it normalises in float32
    place = "model.model.layers.0"
    assert symmetry.groups[f"{place}.self_attn.vo"] == R
    assert (
        words(symmetry)[f"{place}.self_attn.k_proj.weight"]
        == f"({place}.self_attn.heads .) model.model.embed_tokens"
    )
