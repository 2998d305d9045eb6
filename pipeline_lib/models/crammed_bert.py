"""The crammed BERT: an encoder that is cheap to train, as a Hugging Face model.

Geiping and Goldstein, 2022, Cramming: training a language model on a single GPU in one day (arXiv 2212.14034, section
4.2), in the form `bert-c5` that Kaddour et al., 2023 (arXiv 2307.06440) train: norms before each sublayer, gated
feed-forward blocks, no biases in linear layers, sinusoidal positions times a learned number, a bias-free linear head
before the tied decoder, which is computed for masked tokens alone. Unlike the published code, attention heeds its mask.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

MODEL_TYPE = "crammed_bert"


class CrammedBertConfig(PreTrainedConfig):
    """Sizes; `intermediate_size` is that of the gated block's first product, half of it value and half gate."""

    model_type = MODEL_TYPE

    def __init__(
        self,
        vocab_size: int = 32768,
        hidden_size: int = 768,
        num_hidden_layers: int = 16,
        num_attention_heads: int = 12,
        intermediate_size: int = 3072,
        max_position_embeddings: int = 128,
        layer_norm_eps: float = 1e-12,
        initializer_range: float = 0.02,
        hidden_dropout_prob: float = 0.1,
        tie_word_embeddings: bool = True,
        **kwargs: Any,
    ) -> None:
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers
        self.num_attention_heads, self.intermediate_size = num_attention_heads, intermediate_size
        self.max_position_embeddings, self.layer_norm_eps = max_position_embeddings, layer_norm_eps
        self.initializer_range, self.hidden_dropout_prob = initializer_range, hidden_dropout_prob
        self.tie_word_embeddings = tie_word_embeddings
        super().__init__(**kwargs)


class Embeddings(nn.Module):
    """Word embedding plus scaled sinusoids (Vaswani et al., 2017, arXiv 1706.03762, section 3.5), then a norm."""

    def __init__(self, config: CrammedBertConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_scale = nn.Parameter(torch.full((1,), config.hidden_size**-0.5))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids: Tensor) -> Tensor:
        """hidden_BTD of tokens [B, T]."""
        words_BTD = self.word_embeddings(input_ids)
        positions_TD = sinusoids(words_BTD.shape[1], words_BTD.shape[2], words_BTD.device).to(words_BTD.dtype)
        return self.dropout(self.norm(words_BTD + self.position_scale * positions_TD))


def sinusoids(length: int, dim: int, device: torch.device) -> Tensor:
    """sin and cos of positions, by turns; fp32 [length, dim]."""
    at_T1 = torch.arange(length, device=device, dtype=torch.float32)[:, None]
    angle_TF = at_T1 * torch.exp(torch.arange(0, dim, 2, device=device) * (-math.log(10000.0) / dim))
    return torch.stack([angle_TF.sin(), angle_TF.cos()], dim=-1).flatten(1)[:, :dim]


class Attention(nn.Module):
    """Multi-head attention over all positions, without biases."""

    is_causal = False

    def __init__(self, config: CrammedBertConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        self.config, self.head_dim = config, dim // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_BTD: Tensor, mask: Tensor | None) -> Tensor:
        """hidden_BTD."""
        split = (*hidden_BTD.shape[:2], -1, self.head_dim)
        query, key, value = (p(hidden_BTD).view(split).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation or "sdpa", eager_attention)
        dropout = self.dropout.p if self.training else 0.0
        found, _ = attend(self, query, key, value, mask, dropout=dropout, scaling=self.scaling)
        return self.o_proj(found.reshape(hidden_BTD.shape).contiguous())


def eager_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    """Attention by explicit products, under the signature of transformers' attention functions."""
    scores = query @ key.transpose(2, 3) * options["scaling"]
    weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), options["dropout"], module.training)
    return (weights @ value).transpose(1, 2), weights


class FeedForward(nn.Module):
    """GELU(gate)·value (Shazeer, 2020, arXiv 2002.05202), without biases."""

    def __init__(self, config: CrammedBertConfig) -> None:
        super().__init__()
        self.in_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.out_proj = nn.Linear(config.intermediate_size // 2, config.hidden_size, bias=False)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        """hidden_BTD."""
        value, gate = self.in_proj(hidden_BTD).chunk(2, dim=-1)
        return self.out_proj(F.gelu(gate) * value)


class Layer(GradientCheckpointingLayer):
    """Attention and feed-forward block, each behind a norm and added to its input."""

    def __init__(self, config: CrammedBertConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = FeedForward(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_BTD: Tensor, mask: Tensor | None = None) -> Tensor:
        """hidden_BTD."""
        hidden_BTD = hidden_BTD + self.dropout(self.self_attn(self.norm1(hidden_BTD), mask))
        return hidden_BTD + self.dropout(self.mlp(self.norm2(hidden_BTD)))


class CrammedBertPreTrainedModel(PreTrainedModel):
    """Initial weights: N(0, 0.02²), norms 1 and 0, the positions' number 1/√dim."""

    config: CrammedBertConfig
    config_class = CrammedBertConfig
    base_model_prefix = "bert"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # linear layers, embeddings, norms
        if isinstance(module, Embeddings):
            nn.init.constant_(module.position_scale, self.config.hidden_size**-0.5)


class CrammedBertModel(CrammedBertPreTrainedModel):
    """The encoder with its final norm."""

    def __init__(self, config: CrammedBertConfig) -> None:
        super().__init__(config)
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList([Layer(config) for _ in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The word embedding."""
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the word embedding."""
        self.embeddings.word_embeddings = value  # type: ignore[assignment]

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None, **_: Any
    ) -> BaseModelOutput:
        """Hidden states; `token_type_ids` are taken and not used: the model has no segments."""
        hidden_BTD = self.embeddings(input_ids)
        mask = create_bidirectional_mask(config=self.config, inputs_embeds=hidden_BTD, attention_mask=attention_mask)
        for layer in self.layers:
            hidden_BTD = layer(hidden_BTD, mask)
        return BaseModelOutput(last_hidden_state=self.norm(hidden_BTD))


class CrammedBertForMaskedLM(CrammedBertPreTrainedModel):
    """The encoder, a linear head and the decoder, which is the word embedding.

    Attributes:
        masked_logits: the forward pass takes `at`, the tokens to decode.
    """

    _tied_weights_keys: ClassVar[dict[str, str]] = {"decoder.weight": "bert.embeddings.word_embeddings.weight"}
    masked_logits = True

    def __init__(self, config: CrammedBertConfig) -> None:
        super().__init__(config)
        self.bert = CrammedBertModel(config)
        self.head = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """The decoder."""
        return self.decoder

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the decoder."""
        self.decoder = new_embeddings  # type: ignore[assignment]

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, at: Tensor | None = None, **_: Any
    ) -> MaskedLMOutput:
        """logits_BTV, or logits_NV of the tokens that `at` (bool [B, T]) names, in its order."""
        hidden = self.bert(input_ids, attention_mask).last_hidden_state
        hidden = hidden if at is None else hidden[at]
        return MaskedLMOutput(logits=self.decoder(self.head(hidden)))  # type: ignore[arg-type]


AutoConfig.register(MODEL_TYPE, CrammedBertConfig, exist_ok=True)
AutoModel.register(CrammedBertConfig, CrammedBertModel, exist_ok=True)
AutoModelForMaskedLM.register(CrammedBertConfig, CrammedBertForMaskedLM, exist_ok=True)
