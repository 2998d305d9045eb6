"""Application of a composition of transforms to a model, in place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from pipeline_lib.artifacts.progress import say
from pipeline_lib.config.errors import UserError, closest
from pipeline_lib.config.registry import TRANSFORMS
from pipeline_lib.config.validate import validate
from pipeline_lib.transforms.attention import DEFAULT_SPAN, AttentionSites
from pipeline_lib.transforms.base import Function, Site, Transform
from pipeline_lib.transforms.compose import SiteFunctions
from pipeline_lib.transforms.context import FaultContext
from pipeline_lib.transforms.modules import (
    EmbeddingAtSite,
    InnerAttentionAtSites,
    LinearAtSite,
    reclass,
    restore_class,
)
from pipeline_lib.transforms.patterns import EVERYWHERE, matches, merge
from pipeline_lib.transforms.shared_inputs import share_inputs
from pipeline_lib.transforms.sites import (
    ATTENTION_VALUE,
    KV,
    QUERY_KEY,
    Found,
    find_sites,
    is_hugging_face,
    is_inner_attention,
    out_of_reach,
)
from pipeline_lib.transforms.state import whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FUNCTIONS, ATTENTION = "functions_at_site", "attention_sites"
STATE = "transform"  # the attribute under which a module holds what transforms added


class Applied:
    """A composition of transforms on a model.

    Attributes:
        context: where in the fault streams the next forward pass stands; `context.begin` comes before each.
        entries: the settings of the composition, with their defaults.
        at: the sites with their functions.
        report: plain JSON. `settings`: {setting: its values}, where a setting is named `index:type:pattern`; `layers`:
            {site: [setting, …]}; `histogram`: {setting: {kind of site: number}}.
    """

    def __init__(self, model: nn.Module, context: FaultContext, report: dict[str, Any]) -> None:
        self.model, self.context, self.report = model, context, report
        self.at: list[tuple[Found, SiteFunctions]] = []
        self.entries: tuple[dict[str, Any], ...] = ()
        self.transforms: list[Transform] = []
        self._undo: list[Callable[[], None]] = []

    def prepare(self) -> None:
        """Give added state its first values. `apply` does it unless the model is on the meta device.

        After materialisation every rank must call it, once the weights are there and before a checkpoint's state is
        loaded.
        """
        for found, functions in self.at:
            weight = getattr(found.module, "weight", None) if functions.site.shape else None
            stateful = [f for f in functions.functions() if type(f).prepare is not Function.prepare]
            operands = {} if weight is None or not stateful else {"weight": whole(weight.detach())}
            for function in stateful:
                with torch.no_grad():
                    function.prepare(operands)
        for transform in self.transforms:
            transform.prepare(self.model)

    def settle(self) -> None:
        """Take over what functions observed: after each optimizer step; all ranks call it."""
        for transform in self.transforms:
            transform.settle()

    def remove(self) -> None:
        """Make the model what it was before `apply`; weights stay as they are now."""
        while self._undo:
            self._undo.pop()()

    def on_remove(self, undo: Callable[[], None]) -> None:
        """Have `undo` called by `remove`, in reverse order."""
        self._undo.append(undo)

    def set(self, module: nn.Module, name: str, value: Any) -> None:
        """Give `module` an attribute until `remove`."""
        setattr(module, name, value)
        self.on_remove(lambda: delattr(module, name))


def apply(
    model: nn.Module,
    transform: Sequence[dict[str, Any]],
    *,
    seed: int,
    canonical: Callable[[str], str] | None = None,
    global_batch: int = 1,
    fault_devices: int = 1,
) -> Applied:
    """Apply a composition to a model in place, on any device, meta included, and before it is sharded or compiled.

    Linear layers, embeddings and torchtitan's inner attention change class; parameters, names, optimizer state and
    `save_pretrained` do not change. Without product and KV functions attention is not touched.

    Args:
        transform: ordered settings, each with its `type`; [] is plain.
        seed: of all random faults.
        canonical: from module paths of this model to Hugging Face's; None if they are the same.
        global_batch, fault_devices: see `FaultContext`.

    Raises:
        UserError: wrong settings, a pattern that decides about no site, or two stores or computes at one site.
    """
    if any(hasattr(module, name) for module in model.modules() for name in (FUNCTIONS, ATTENTION)):
        raise RuntimeError("the model is transformed already; call Applied.remove() first")
    found = find_sites(model, canonical)
    context = FaultContext(seed, global_batch, fault_devices)
    context.on(lambda: next((p.device for p in model.parameters()), torch.device("cpu")))
    applied = Applied(model, context, {"settings": {}, "layers": {}, "histogram": {}})
    chosen: dict[int, list[tuple[int, Function]]] = {}
    for index, entry in enumerate(transform):
        _choose(index, entry, found, chosen, applied)
    if transform and (exact := out_of_reach(model, found)):
        say(f"{len(exact)} matrices are in no nn.Linear or nn.Embedding and stay exact: {', '.join(exact[:6])} …")
        applied.report["out_of_reach"] = exact
    try:
        applied.at = [(found[i], SiteFunctions(found[i].site, chosen[i], context)) for i in sorted(chosen)]
        _install(model, applied)
        share_inputs(model, applied, found)
    except BaseException:
        applied.remove()
        raise
    if not any(tensor.is_meta for tensor in model.parameters()):
        applied.prepare()
    return applied


def _choose(
    index: int,
    entry: dict[str, Any],
    found: list[Found],
    chosen: dict[int, list[tuple[int, Function]]],
    applied: Applied,
) -> None:
    """Append the functions of one entry of the composition, by the number of their site."""
    kind = entry["type"]
    where = f"transform {kind}"
    module = TRANSFORMS.load(kind, where)
    settings = validate(module.Settings, entry, where)
    applied.entries = (*applied.entries, settings.semantic())
    patterns = getattr(settings, "sites", tuple(EVERYWHERE.items()))
    build: Callable[[Any], Transform] = module.build
    plain: Transform = build(settings)
    candidates = [(i, at.site) for i, at in enumerate(found) if at.site.kind in plain.kinds]
    by_pattern: dict[str, list[tuple[int, Site]]] = {pattern: [] for pattern, _ in patterns}
    for i, site in candidates:
        first = next((pattern for pattern, _ in patterns if matches(pattern, site)), None)
        if first is not None:
            by_pattern[first].append((i, site))
    for pattern, overrides in patterns:
        if not by_pattern[pattern]:
            raise _no_site(pattern, [site for _, site in candidates], where)
        if overrides is None:
            continue
        local = settings
        if overrides:
            local = validate(module.Settings, merge(settings.model_dump(), overrides), f"{where}.sites.{pattern}")
        transform = build(local) if overrides else plain
        applied.transforms.append(transform)
        name = f"{index}:{kind}:{pattern}"
        histogram: Counter[str] = Counter()
        for i, site in by_pattern[pattern]:
            functions = [f for f in (transform.store(site), transform.fault(site), transform.compute(site)) if f]
            if functions:
                chosen.setdefault(i, []).extend((index, function) for function in functions)
                applied.report["layers"].setdefault(site.name, []).append(name)
                histogram[site.kind] += 1
        applied.report["settings"][name] = {k: v for k, v in local.semantic().items() if k != "sites"}
        applied.report["histogram"][name] = dict(sorted(histogram.items()))


def _no_site(pattern: str, candidates: list[Site], where: str) -> UserError:
    hidden = [site.name for site in candidates if matches(pattern, site)]
    if hidden:
        return UserError(
            "every site of this pattern is taken by patterns before it; the first match wins",
            where=f"{where}.sites",
            value=pattern,
            fix="put the narrower pattern first",
        )
    names = [site.name for site in candidates]
    near = closest(pattern, names)
    return UserError(
        "the pattern matches no site",
        where=f"{where}.sites",
        value=pattern,
        allowed=f"patterns on {', '.join(names[:24])}{', …' if len(names) > 24 else ''}" if names else "no site at all",
        fix=near or "compare the pattern with the names above; * crosses dots",
    )


def _install(model: nn.Module, applied: Applied) -> None:
    attention: dict[nn.Module, dict[str, SiteFunctions]] = {}
    for found, functions in applied.at:
        if functions.site.kind in ("linear", "embedding"):
            mixin = LinearAtSite if functions.site.kind == "linear" else EmbeddingAtSite
            applied.set(found.module, FUNCTIONS, functions)
            reclass(found.module, mixin)
            applied.on_remove(lambda module=found.module: restore_class(module))
            _attach_state(model, applied, found.module, {"": functions})
        else:
            attention.setdefault(found.module, {})[functions.site.name.rpartition(".")[2]] = functions
    span = _span(model)
    for module, parts in attention.items():
        sites = AttentionSites(
            applied.context, *(parts.get(part) for part in (KV, QUERY_KEY, ATTENTION_VALUE)), span=span
        )
        applied.set(module, ATTENTION, sites)
        _attach_state(model, applied, module, parts)
        if is_inner_attention(module):
            reclass(module, InnerAttentionAtSites)
            applied.on_remove(lambda module=module: restore_class(module))
    if is_hugging_face(model):
        from pipeline_lib.transforms.hugging_face import follow_cache, use_sites

        if attention:
            applied.on_remove(use_sites(cast("PreTrainedModel", model)))
        if any(functions.draws for _, functions in applied.at):
            applied.on_remove(follow_cache(cast("PreTrainedModel", model), applied.context))


def _span(model: nn.Module) -> int:
    config = getattr(model, "config", None) or getattr(model, "model_args", None)
    for name in ("max_position_embeddings", "max_seq_len"):
        if isinstance(getattr(config, name, None), int):
            return getattr(config, name)
    return DEFAULT_SPAN


def _attach_state(model: nn.Module, applied: Applied, module: nn.Module, parts: dict[str, SiteFunctions]) -> None:
    """Hold the functions that have state under `<module>.transform`, those of attention under the part's name."""
    holder = nn.Module()
    for part, functions in parts.items():
        stateful = functions.stateful()
        if stateful and part:
            holder.add_module(part, nn.ModuleDict(stateful))
        elif stateful:
            for name, function in stateful.items():
                holder.add_module(name, function)
    if next(holder.children(), None) is None:
        return
    if hasattr(module, STATE):
        raise RuntimeError(f"{type(module).__name__} has an attribute `{STATE}` of its own")
    near = next((p.device for owner in (module, model) for p in owner.parameters()), torch.device("cpu"))
    holder.to(near)
    holder.train(module.training)
    applied.set(module, STATE, holder)
