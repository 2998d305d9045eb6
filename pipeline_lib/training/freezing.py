"""Parameters that do not train, and a teacher that shares them with its student."""

from __future__ import annotations

from torch import nn

from pipeline_lib.config.errors import UserError
from pipeline_lib.transforms.patterns import choose


def freeze(model: nn.Module, patterns: tuple[str, ...]) -> list[str]:
    """Stop the training of parameters whose names match; their names.

    Raises:
        UserError: a pattern matches none, or nothing is left to train.
    """
    names = [name for name, _ in model.named_parameters()]
    frozen = choose(names, patterns, "parameter", "recipe.distill.freeze")
    if len(frozen) == len(names):
        raise UserError("nothing is left to train", where="recipe.distill.freeze", value=list(patterns))
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    return frozen


def share(model: nn.Module, teacher: nn.Module, names: list[str]) -> None:
    """Let the teacher hold the student's own tensors of these names."""
    for name in names:
        path, _, leaf = name.rpartition(".")
        setattr(teacher.get_submodule(path), leaf, model.get_parameter(name))
    for path, module in teacher.named_modules():  # tied weights have a second name
        own = dict(model.get_submodule(path).named_parameters(recurse=False)) if path else {}
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            twin = own.get(leaf)
            if twin is not None and not twin.requires_grad and parameter is not twin:
                setattr(module, leaf, twin)
