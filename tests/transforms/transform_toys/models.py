"""Tiny models of every family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

VOCAB, LENGTH = 61, 12


def llama(**changes: Any) -> nn.Module:
    """A Hugging Face llama with grouped-query attention."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    sizes |= {
        "num_key_value_heads": 2,
        "vocab_size": VOCAB,
        "max_position_embeddings": LENGTH,
        "pad_token_id": 0,
        "initializer_range": 0.2,
    }
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).eval()


def bert(**changes: Any) -> nn.Module:
    """A Hugging Face BERT with its masked-language-model head."""
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    sizes |= {"vocab_size": VOCAB, "max_position_embeddings": LENGTH, "initializer_range": 0.2}
    return BertForMaskedLM(BertConfig(**{**sizes, **changes})).eval()


def titan() -> nn.Module:
    """A torchtitan llama on the meta device."""
    from pipeline_lib.training.titan import device

    device.prepare()  # torchtitan looks for a device when it is imported, and other tests of this process need the CPU
    from torchtitan.models.llama3 import Transformer, TransformerModelArgs

    args = TransformerModelArgs(
        dim=16, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=VOCAB, multiple_of=8, max_seq_len=LENGTH
    )
    with torch.device("meta"):
        return Transformer(args)


def materialise(model: Any) -> nn.Module:
    """Seeded weights for a model of `titan()`, as torchtitan's trainer makes them."""
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        model.init_weights(buffer_device=torch.device("cpu"))
    return model.eval()


MODELS: dict[str, Callable[..., nn.Module]] = {"llama": llama, "bert": bert}


def logits(model: nn.Module, tokens_BT: torch.Tensor, **inputs: Any) -> torch.Tensor:
    """Logits [B, T, vocabulary] of any of the models."""
    output = model(tokens_BT, **inputs)
    return output if isinstance(output, torch.Tensor) else output.logits
