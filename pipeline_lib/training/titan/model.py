"""torchtitan's llama with rotary halves as Hugging Face has them, so that weights need no permutation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torchtitan.models.llama3.model.args import RoPEScalingArgs, TransformerModelArgs
from torchtitan.models.llama3.model.model import Attention, Transformer

from pipeline_lib.config.models import Llama
from pipeline_lib.models.initial import initial_weight
from pipeline_lib.models.naming import canonical_titan, is_transform_state


def model_args(model: Mapping[str, Any], seed: int) -> TitanArgs:
    """torchtitan's arguments for model settings as they stand in a spec."""
    size = Llama(**{key: value for key, value in model.items() if key in Llama.model_fields})
    base = int(2 * 4 * size.dim / 3)  # torchtitan computes the hidden width from this and a multiplier
    return TitanArgs(
        dim=size.dim,
        n_layers=size.layers,
        n_heads=size.heads,
        n_kv_heads=size.kv_heads,
        vocab_size=model["vocab"],
        multiple_of=1,
        ffn_dim_multiplier=(size.ffn + 0.5) / base,  # + 0.5: the product is rounded down to exactly ffn
        norm_eps=size.norm_eps,
        rope_theta=size.rope_theta,
        rope_scaling_args=RoPEScalingArgs(scaling_factor=1.0),
        max_seq_len=model["max_seq_len"],
        attn_type="sdpa",
        attn_mask_type="causal",
        seed=seed,
    )


@dataclass
class TitanArgs(TransformerModelArgs):
    """torchtitan's model arguments and the seed of the initial weights."""

    seed: int = 0


class TitanLlama(Transformer):
    """torchtitan's llama; differs in how positions are rotated and in where initial weights come from."""

    model_args: TitanArgs

    def __init__(self, model_args: TitanArgs) -> None:
        super().__init__(model_args)
        for module in self.modules():
            if type(module) is Attention:
                module.__class__ = HalfRotaryAttention

    def _precompute_freqs_cis(self) -> torch.Tensor:
        """Cosines and signed sines of the rotary angles, [2, max_seq_len, head_dim], fp32."""
        args = self.model_args
        head_dim = args.dim // args.n_heads
        rates_F = 1.0 / args.rope_theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
        angles_TF = torch.outer(torch.arange(args.max_seq_len).float(), rates_F)
        cos_TF, sin_TF = angles_TF.cos(), angles_TF.sin()
        return torch.stack([torch.cat([cos_TF, cos_TF], -1), torch.cat([-sin_TF, sin_TF], -1)])

    @torch.no_grad()
    def init_weights(self, buffer_device: torch.device | None = None) -> None:
        """Draw every weight in full and keep this rank's part of it; transforms initialise what is theirs."""
        with torch.device(buffer_device or self.freqs_cis.device):
            self.freqs_cis = self._precompute_freqs_cis()
        for name, parameter in self.named_parameters():
            canonical = canonical_titan(name)
            if not is_transform_state(canonical):
                shape = tuple(parameter.shape)
                assign(parameter, initial_weight(canonical, shape, self.model_args.dim, self.model_args.seed))


class HalfRotaryAttention(Attention):
    """torchtitan's attention, rotating the two halves of a head rather than neighbouring pairs."""

    def forward(
        self,
        x: torch.Tensor,
        freqs_cis: torch.Tensor,
        attention_masks: None,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend causally. x: [B, T, D] → [B, T, D]; freqs_cis: [2, max_seq_len, head_dim]."""
        assert attention_masks is None
        assert positions is None
        batch, length, _ = x.shape
        q_BTND = self.wq(x).view(batch, length, -1, self.head_dim)
        k_BTND = self.wk(x).view(batch, length, -1, self.head_dim)
        v_BTND = self.wv(x).view(batch, length, -1, self.head_dim)
        table_2T1D = freqs_cis[:, :length, None, :]
        q_BTND, k_BTND = rotate(q_BTND, table_2T1D), rotate(k_BTND, table_2T1D)
        out_BNTD = self.inner_attention(
            q_BTND.transpose(1, 2), k_BTND.transpose(1, 2), v_BTND.transpose(1, 2), enable_gqa=self.enable_gqa
        )
        return self.wo(out_BNTD.transpose(1, 2).reshape(batch, length, -1))


def rotate(x_BTND: torch.Tensor, table_2T1D: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding in fp32: x·cos + swap(x)·(∓sin), where swap exchanges the halves of a head.

    RoFormer (arXiv:2104.09864), eq. 34, with dimensions i and i + D/2 paired.
    """
    x32_BTND = x_BTND.float()
    swapped_BTND = torch.roll(x32_BTND, x_BTND.shape[-1] // 2, -1)
    return (x32_BTND * table_2T1D[0] + swapped_BTND * table_2T1D[1]).type_as(x_BTND)


@torch.no_grad()
def assign(parameter: nn.Parameter | torch.Tensor, full: torch.Tensor) -> None:
    """Copy a full tensor into a parameter, of which this rank may hold a shard; no communication."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(parameter, DTensor):
        full = full.to(parameter.device)
        parameter.copy_(distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None))
    else:
        parameter.copy_(full)
