"""The trained weights, whole, on rank 0, under canonical names."""

from __future__ import annotations

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from pipeline_lib.models.naming import from_canonical, split_transform, to_canonical
from pipeline_lib.training.outcome import check_tokens
from pipeline_lib.training.titan.model import TitanLlama, model_args
from pipeline_lib.training.titan.plan import Plan
from pipeline_lib.training.titan.trainer import TitanTrainer


def whole_state(trainer: TitanTrainer) -> dict[str, torch.Tensor]:
    """Rank 0: canonical name → whole fp32 tensor on the CPU, transforms' state too. The others: nothing.

    All ranks must call it.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(trainer.model_parts[0], options=options)
    return to_canonical({name: value for name, value in state.items() if isinstance(value, torch.Tensor)})


@torch.no_grad()
def reference_logits(plan: Plan, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What torchtitan's model, without transforms and in fp32 on the CPU, says of fixed random tokens.

    Args:
        plan: of the training.
        state: what `whole_state` gave rank 0.

    Returns:
        tokens [B, T] int64 and logits [B, T, vocab] fp32.
    """
    tokens_BT = check_tokens(plan.model["vocab"], plan.recipe.seq_len)
    with torch.device("meta"):
        model = TitanLlama(model_args(plan.model, plan.seed))
    model.load_state_dict(from_canonical(split_transform(state)[0]), strict=True, assign=True)
    model.freqs_cis = model._precompute_freqs_cis()  # a buffer that is not saved, so still on meta
    return {"tokens": tokens_BT, "logits": model(tokens_BT)}
