"""Classes of Hugging Face with tiny configurations and random weights; imported where transformers is installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers
from torch import Tensor, nn

from tests.cases import integers
from tests.estimators.architectures import CLASSES, DATA, LABELS, MASK, NEXT, TOKENS, VOCABULARY, Case

QUIET: dict[str, Any] = {
    "attn_implementation": "sdpa",
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PADDED = {"input_ids": TOKENS * MASK, "attention_mask": MASK}


def logits(out: Any) -> Tensor:
    return out.logits


def token_logits(out: Any) -> Tensor:
    return out.logits.mT


def bert(**options: Any) -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=4,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=5,
        max_position_embeddings=5,
        num_labels=CLASSES,
        **{**QUIET, **options},
    )
    return transformers.BertForSequenceClassification(config)


def distilbert() -> nn.Module:
    config = transformers.DistilBertConfig(
        vocab_size=VOCABULARY, dim=4, n_layers=1, n_heads=2, hidden_dim=5, max_position_embeddings=5,
        num_labels=CLASSES, **QUIET,
    )  # fmt: skip
    return transformers.DistilBertForSequenceClassification(config)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=4, n_layer=2, n_head=2, n_inner=5, n_positions=5, **QUIET
    )
    return transformers.GPT2LMHeadModel(config)


def llama(tied: bool) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=8,
        intermediate_size=5,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8,
        tie_word_embeddings=tied,
        **QUIET,
    )
    return transformers.LlamaForCausalLM(config)


def gemma() -> nn.Module:
    """Gains are kept as their distances from one."""
    config = transformers.GemmaConfig(
        vocab_size=VOCABULARY,
        hidden_size=8,
        intermediate_size=5,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        max_position_embeddings=8,
        **QUIET,
    )
    return transformers.GemmaForCausalLM(config)


def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=4, d_kv=2, d_ff=5, num_layers=1, num_decoder_layers=1, num_heads=2,
        feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=2, decoder_start_token_id=0,
        attn_implementation="eager",
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def build(
    make: Callable[[], nn.Module], targets: Tensor, output: Any, digits: int = 8, **inputs: Any
) -> Case:
    return Case(make, {**PADDED, **inputs}, targets, output, digits=digits)


HUGGINGFACE: dict[str, Case] = {
    "BERT": build(bert, LABELS, logits),
    "BERT, eager attention": build(lambda: bert(attn_implementation="eager"), LABELS, logits),
    "DistilBERT": build(distilbert, LABELS, logits),
    "GPT-2": build(gpt2, NEXT, token_logits, use_cache=False),
    "Llama, tied": build(
        lambda: llama(True), NEXT, token_logits, digits=5, use_cache=False
    ),  # norms in float32
    "Llama, untied": build(lambda: llama(False), NEXT, token_logits, digits=5),
    "Gemma": build(gemma, NEXT, token_logits, digits=4),
    "T5": build(
        t5,
        integers(VOCABULARY, DATA, 2, seed=3),
        token_logits,
        digits=5,
        decoder_input_ids=integers(VOCABULARY, DATA, 2, seed=4),
    ),
}
