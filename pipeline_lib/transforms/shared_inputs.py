"""Inputs that several layers read from one memory: loaded, and their faults drawn, once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from pipeline_lib.config.errors import UserError
from pipeline_lib.transforms.modules import SharedInput
from pipeline_lib.transforms.sites import ONE_INPUT, Found

if TYPE_CHECKING:
    from pipeline_lib.transforms.apply import Applied


def share_inputs(model: nn.Module, applied: Applied, found: list[Found]) -> None:
    """Load inputs that lie in one memory once, in the module around the layers that read them.

    Raises:
        UserError: layers beside each other have other settings for it, or no two read the same input.
    """
    at = {f.site.name: (f.module, functions) for f, functions in applied.at if f.site.kind == "linear"}
    linear = {f.site.name for f in found if f.site.kind == "linear"}
    paths = {module: path for path, module in model.named_modules()}
    wanted = {name for name, (_, functions) in at.items() if functions.one_memory()}
    shared: set[str] = set()
    for name in sorted(wanted):
        around, _, last = name.rpartition(".")
        group = next((group for group in ONE_INPUT if last in group), ())
        members = [f"{around}.{layer}" for layer in group if f"{around}.{layer}" in linear]
        if len(members) < 2 or name in shared:
            continue
        said = {name: at[name][1].one_memory() if name in at else [] for name in members}
        if any(said[member] != said[name] for member in members):
            raise UserError(
                "layers that read their input from one memory must have the same settings for it",
                where=around,
                value=", ".join(f"{member.rpartition('.')[2]}: {said[member] or 'none'}" for member in members),
                fix="give them one pattern, or set shared_input to false there",
            )
        shared |= set(members)
        own = [paths[at[member][0]].split(".") for member in members]
        depth = next(i for i, parts in enumerate(zip(*own, strict=False)) if len(set(parts)) > 1)
        input = SharedInput(at[members[0]][1])
        applied.on_remove(input.install(model.get_submodule(".".join(own[0][:depth]))))
        for member in members:
            applied.set(at[member][0], "shared_input", input)
    if wanted and not shared:
        raise UserError(
            "no two layers read the same input",
            where="shared_input",
            value=sorted(wanted)[:5],
            allowed=f"layers beside each other named {'; '.join(', '.join(group) for group in ONE_INPUT)}",
            fix="set shared_input to false",
        )
