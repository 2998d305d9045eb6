"""Model settings and parameter counts. The formulas are those of the architectures themselves; no torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from pipeline_lib.config.base import Settings, added

PositiveInt = Annotated[int, Field(gt=0)]


class Llama(Settings):
    """A llama-style decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU, untied head."""

    family: Literal["llama"] = "llama"
    dim: PositiveInt = Field(description="width of the residual stream")
    layers: PositiveInt = Field(description="number of decoder blocks")
    heads: PositiveInt = Field(description="query heads; must divide dim")
    kv_heads: PositiveInt = Field(description="key/value heads; must divide heads")
    ffn: PositiveInt = Field(description="hidden width of the SwiGLU block")
    rope_theta: float = Field(default=10000.0, gt=0, description="base of the rotary position embedding")
    norm_eps: float = Field(default=1e-5, gt=0, description="epsilon of RMSNorm")

    @model_validator(mode="after")
    def _divisible(self) -> Llama:
        if self.dim % self.heads:
            raise ValueError(f"heads must divide dim: {self.heads} does not divide {self.dim}")
        if (self.dim // self.heads) % 2:
            raise ValueError(f"dim/heads must be even for rotary positions: {self.dim}/{self.heads}")
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads must divide heads: {self.kv_heads} does not divide {self.heads}")
        return self

    def parameters(self, vocab: int) -> tuple[int, int]:
        """(all parameters, those without the input embedding; the untied head counts)."""
        kv = self.dim * self.kv_heads // self.heads
        block = 2 * self.dim * self.dim + 2 * self.dim * kv + 3 * self.dim * self.ffn + 2 * self.dim
        rest = self.layers * block + self.dim + vocab * self.dim
        return rest + vocab * self.dim, rest


class Mistral(Llama):
    """Mistral: a llama's dimensions under Mistral's names, without a sliding window."""

    family: Literal["mistral"] = "mistral"  # type: ignore[assignment]


class Bert(Settings):
    """A BERT encoder with the masked-language-model head of Hugging Face (tied decoder)."""

    family: Literal["bert"] = "bert"
    dim: PositiveInt = Field(description="width of the residual stream")
    layers: PositiveInt = Field(description="number of encoder blocks")
    heads: PositiveInt = Field(description="attention heads; must divide dim")
    ffn: PositiveInt = Field(description="hidden width of the feed-forward block")
    norm_eps: float = Field(default=1e-12, gt=0, description="epsilon of LayerNorm")
    crammed: bool = added(
        False,
        "the crammed BERT: norms before, gated feed-forward (ffn: value and gate together), no biases, sinusoidal "
        "positions, decoder for masked tokens alone",
    )

    @model_validator(mode="after")
    def _divisible(self) -> Bert:
        if self.dim % self.heads:
            raise ValueError(f"heads must divide dim: {self.heads} does not divide {self.dim}")
        if self.crammed and self.ffn % 2:
            raise ValueError(f"ffn of a crammed BERT is half value and half gate, and {self.ffn} is odd")
        return self

    def parameters(self, vocab: int) -> tuple[int, int]:
        """(all parameters without position embeddings, those without the word embedding)."""
        if self.crammed:
            block = 4 * self.dim * self.dim + 3 * self.dim * self.ffn // 2 + 4 * self.dim
            rest = self.layers * block + self.dim * self.dim + 4 * self.dim + 1
            return rest + vocab * self.dim, rest
        block = 4 * (self.dim * self.dim + self.dim) + 2 * self.dim * self.ffn + self.ffn + self.dim + 4 * self.dim
        head = self.dim * self.dim + self.dim + 2 * self.dim + vocab
        rest = self.layers * block + head + 4 * self.dim
        return rest + vocab * self.dim, rest


ARCHITECTURES: dict[str, type[Llama] | type[Bert]] = {"llama": Llama, "mistral": Mistral, "bert": Bert}


def count_parameters(model: dict[str, Any]) -> tuple[int, int]:
    """(all, without the input embedding) for model settings as they stand in a spec."""
    architecture = ARCHITECTURES[model["family"]]
    own = {key: value for key, value in model.items() if key in architecture.model_fields}
    return architecture(**own).parameters(model["vocab"])
