"""The recipe `relora`: frozen base, adapters, merges (Lialin et al., 2023, arXiv 2307.05695, algorithm 1).

A merge is collective and happens in memory: each rank adds its rows of the update to its rows of the master weights,
and all load the new base. On disk it becomes true with the next checkpoint: every rank writes its master rows, and only
then rank 0 seals. A kill at any moment leaves the checkpoint before, from which the same merge is made again.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pipeline_lib.models.naming import is_adapter
from pipeline_lib.training.masking import TextHooks
from pipeline_lib.training.masters import RowShares, load_masters, save_masters
from pipeline_lib.training.schedules import is_merge, jagged_lr_factor, published_lr_factor
from pipeline_lib.training.state import full_state
from pipeline_lib.transforms.low_rank import add_adapters, freeze
from pipeline_lib.transforms.state import assign, whole

if TYPE_CHECKING:
    from pipeline_lib.training.loop import Loop
    from pipeline_lib.training.recipes.relora import Settings

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class ReLoRAHooks(TextHooks):
    """Adapters, merges and restarts; next-token loss for a decoder, masked-token loss for an encoder.

    Attributes:
        layers: name → linear layer with an adapter.
        masters: name → this rank's rows of its fp32 weight, on the host.
        rows: name → rows of the whole weight.
        merges: merges done.
    """

    settings: Settings

    def prepare(self, loop: Loop) -> None:
        """Freeze the base, keep its fp32 rows on the host, add the adapters."""
        super().prepare(loop)
        recipe, self.shares, self.merges = self.settings, RowShares(), 0
        factor = 1.0 if recipe.alpha is None else recipe.alpha / recipe.rank
        if not recipe.train_rest:
            loop.model.requires_grad_(False)
        self.layers = add_adapters(loop.model, recipe.targets, recipe.rank, factor, recipe.adapter_start)
        self.masters: dict[str, Tensor] = {}
        self.rows: dict[str, int] = {}
        for name, layer in self.layers.items():
            first, last = self.shares.span(len(layer.weight))
            self.rows[name] = len(layer.weight)
            self.masters[name] = layer.weight.detach()[first:last].to("cpu", torch.float32, copy=True)
            freeze(layer, DTYPES[recipe.base])
            layer.low_rank.reset(self._key(name))

    def after_step(self, loop: Loop, step: int) -> None:
        """Merge and restart, after the steps that end a cycle."""
        recipe = self.settings
        if recipe.reset_every and step < self._steps and is_merge(step, recipe.reset_every, recipe.schedule):
            self.merge(loop)

    @torch.no_grad()
    def merge(self, loop: Loop) -> None:
        """Add every update to its master weight, load the new base, start the adapters anew. All ranks call it."""
        self.merges += 1
        for name, layer in self.layers.items():
            self.masters[name] = self._merged(name, layer)
            self._load_base(name, layer)
            layer.low_rank.reset(self._key(name))
        restart_optimizer(loop.optimizer, self._adapters(), self.settings.optimizer_reset, self.settings.prune)

    def _merged(self, name: str, layer: Any) -> Tensor:
        """This rank's rows of the weight with its update added, fp32 on the host."""
        first, last = self.shares.span(self.rows[name])
        return self.masters[name] + layer.low_rank.delta(first, last).cpu()

    def _load_base(self, name: str, layer: Any) -> None:
        """What products see becomes the master weight, in the form that the device holds."""
        own, device = self.masters[name], layer.low_rank.A.device
        if layer.weight is None:
            # On the device, so that no merge waits for the host to quantise.
            layer.functions_at_site.store.pack(own.to(device), "weight", self.shares)
        else:
            local = layer.weight.to_local() if hasattr(layer.weight, "to_local") else layer.weight
            local.copy_(own)  # sharded by rows, as the masters are

    def _key(self, name: str) -> str:
        return f"{self.seed}/{name}/{self.merges}"

    def _adapters(self) -> list[Tensor]:
        return [matrix for layer in self.layers.values() for matrix in (layer.low_rank.A, layer.low_rank.B)]

    def lr_factor(self, step: int) -> float:
        """The base schedule times the warm-up after the last merge."""
        recipe = self.settings
        if recipe.reset_every is None:
            return super().lr_factor(step)
        if recipe.schedule == "published":
            warmup = recipe.warmup_steps or 0
            return published_lr_factor(
                step, self._steps, warmup, recipe.min_lr_factor, recipe.reset_every, recipe.reset_warmup
            )
        return jagged_lr_factor(step, super().lr_factor(step), recipe.reset_every, recipe.reset_warmup)

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """How many merges there were."""
        return {}, {"merges": self.merges}

    def load(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Take back what `state` gave."""
        self.merges = values["merges"]

    def save(self, directory: Path) -> None:
        """This rank's master rows."""
        save_masters(directory, self.masters)

    def host_memory(self) -> int:
        """The master rows."""
        return sum(master.nbytes for master in self.masters.values())

    def restore(self, loop: Loop, directory: Path) -> None:
        """Master rows from a checkpoint of any number of ranks, and the base that they make."""
        load_masters(directory, self.masters, self.rows)
        with torch.no_grad():
            for name, layer in self.layers.items():
                self._load_base(name, layer)

    @torch.no_grad()
    def whole(self, loop: Loop) -> dict[str, Tensor]:
        """The model's own weights with the last updates merged: rank 0's whole state, nothing on the others."""
        frozen = {f"{name}.weight" for name in self.layers}
        state = {n: t for n, t in full_state(loop.model).items() if not is_adapter(n) and n not in frozen}
        for name, layer in self.layers.items():
            weight = self.shares.gather(self._merged(name, layer))
            if state:
                state[f"{name}.weight"] = weight
        return dict(sorted(state.items()))


def restart_optimizer(optimizer: torch.optim.Optimizer, adapters: Iterable[Tensor], how: str, prune: float) -> None:
    """Forget the state of the adapters (`adapters`) or of all parameters (`all`), or set the share `prune` of each of
    the adapters' moments that is smallest in magnitude to 0 (`pruned`). Moments may be sharded: all ranks call it."""
    if how == "all":
        optimizer.state.clear()
        return
    for parameter in adapters:
        if how == "adapters":
            optimizer.state.pop(parameter, None)
            continue
        for moment in optimizer.state.get(parameter, {}).values():
            if isinstance(moment, Tensor) and moment.shape == parameter.shape:
                assign(moment, pruned(whole(moment), prune))


def pruned(values: Tensor, share: float) -> Tensor:
    """`values` with the share of smallest magnitude, rounded down, set to 0; ties with the last of them as well."""
    count = int(share * values.numel())
    if count == 0:
        return values
    threshold = values.abs().flatten().kthvalue(count).values
    return torch.where(values.abs() > threshold, values, 0)
