"""Attention with transforms on its products and on the keys and values it reads; knows no framework."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pipeline_lib.config.errors import UserError
from pipeline_lib.transforms.compose import SiteFunctions
from pipeline_lib.transforms.context import FaultContext

DEFAULT_SPAN = 2**20


class AttentionSites:
    """The sites of one attention module.

    Args:
        kv, query_key, attention_value: what happens there; None where nothing does.
        span: most positions a sequence can have.

    Raises:
        UserError: a compute at the KV site replaces the products that another transform acts on.
    """

    def __init__(
        self,
        context: FaultContext,
        kv: SiteFunctions | None,
        query_key: SiteFunctions | None,
        attention_value: SiteFunctions | None,
        span: int = DEFAULT_SPAN,
    ) -> None:
        self.context, self.kv, self.query_key, self.attention_value = context, kv, query_key, attention_value
        self.span = span
        self.whole = kv.compute if kv else None
        products = query_key or attention_value
        if kv and self.whole and products:
            raise UserError(
                "a compute at a KV site is the whole attention and leaves no products for another transform",
                where=kv.site.name,
                value=type(self.whole).__name__,
                fix=f"exclude {products.site.name} or {kv.site.name} with `sites: {{…: null}}`",
            )

    @property
    def is_explicit(self) -> bool:
        """Whether the fused kernel cannot be used."""
        return self.query_key is not None or self.attention_value is not None or self.whole is not None

    def read(self, query_BHTD: Tensor, key_BHTD: Tensor, value_BHTD: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values as they are read from memory; each [B, kv_heads, positions, D]."""
        if self.kv is None:
            return key_BHTD, value_BHTD
        first = self._first_key(query_BHTD, key_BHTD)
        return _load(self.kv, key_BHTD, "key", first), _load(self.kv, value_BHTD, "value", first)

    def attend(
        self,
        query_BHTD: Tensor,
        key_BHTD: Tensor,
        value_BHTD: Tensor,
        *,
        mask: Tensor | None,
        scale: float,
        is_causal: bool,
        dropout: float = 0.0,
    ) -> tuple[Tensor, Tensor | None]:
        """softmax(scale · query·keyᵀ + mask) · value by two products.

        Args:
            key_BHTD, value_BHTD: what `read` gave; fewer heads than the query's are shared by groups of them.
            mask: broadcasts to [B, heads, queries, keys]; boolean (True = attend) or added to the scores; None is
                causal or no mask, as `is_causal` says.
            dropout: probability of dropping an attention weight; 0 outside training.

        Returns:
            ([B, heads, queries, D], probabilities [B, heads, queries, keys] or None if they are never formed).
        """
        queries = query_BHTD.shape[2]
        if mask is None and is_causal and queries > 1:
            key_BHTD, value_BHTD = key_BHTD[:, :, :queries], value_BHTD[:, :, :queries]
            mask = torch.ones(queries, key_BHTD.shape[2], dtype=torch.bool, device=query_BHTD.device).tril()
        first_key = self._first_key(query_BHTD, key_BHTD)
        groups = query_BHTD.shape[1] // key_BHTD.shape[1]
        if self.whole is not None:
            key_BHTD, value_BHTD = _share(key_BHTD, groups), _share(value_BHTD, groups)
            assert self.kv is not None
            operands = (query_BHTD, key_BHTD, value_BHTD, _attended(mask), scale, dropout)
            return self.kv.meet(*operands, **self._place(query_BHTD)), None

        left = _load(self.query_key, query_BHTD, "left", self.context.position)
        right = _share(_load(self.query_key, key_BHTD, "right", first_key), groups)
        scores = self._product(self.query_key, left, right.transpose(-1, -2)) * scale
        if mask is not None:
            lowest = torch.finfo(scores.dtype).min
            scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query_BHTD.dtype)
        weights = nn.functional.dropout(weights, dropout)

        left = self._load_probabilities(weights, mask)
        right = _share(_load(self.attention_value, value_BHTD, "right", first_key), groups)
        return self._product(self.attention_value, left, right), weights

    def _product(self, functions: SiteFunctions | None, left_BHQK: Tensor, right_BHKM: Tensor) -> Tensor:
        if functions is None or functions.compute is None:
            return left_BHQK @ right_BHKM
        return functions.meet(left_BHQK, right_BHKM, **self._place(left_BHQK))

    def _place(self, left_BHQK: Tensor) -> dict[str, Any]:
        """Of a result [B, heads, queries, …]: that of (query, head) is vector query · heads + head."""
        heads = left_BHQK.shape[1]
        return {"first_vector": self.context.position * heads, "strides": (1, heads)}

    def _load_probabilities(self, weights_BHQK: Tensor, mask: Tensor | None) -> Tensor:
        functions = self.attention_value
        if functions is None or not functions.holds("left"):
            return weights_BHQK
        loaded = functions.probabilities(
            weights_BHQK.permute(0, 2, 3, 1), "left", self.context.position, self.span
        ).permute(0, 3, 1, 2)
        attended = _attended(mask)
        # What is masked is never multiplied: a fault there must not let a token see the future or padding.
        return loaded if attended is None else torch.where(attended, loaded, 0.0)

    def _first_key(self, query: Tensor, key: Tensor) -> Tensor:
        """Position of the first key; keys beyond the queries are a cache's and come before them."""
        return (self.context.position + (query.shape[2] - key.shape[2])).clamp(min=0)


def _load(functions: SiteFunctions | None, tensor_BHTD: Tensor, role: str, first_position: Tensor) -> Tensor:
    if functions is None or not functions.holds(role):
        return tensor_BHTD
    return functions.activation(tensor_BHTD.transpose(1, 2), role, first_position).transpose(1, 2)


def _share(tensor_BHTD: Tensor, groups: int) -> Tensor:
    return tensor_BHTD if groups == 1 else tensor_BHTD.repeat_interleave(groups, dim=1)


def _attended(mask: Tensor | None) -> Tensor | None:
    if mask is None or mask.dtype == torch.bool:
        return mask
    return mask > torch.finfo(mask.dtype).min / 2
