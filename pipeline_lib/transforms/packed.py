"""Stores that can hold their stored tensors themselves, and models and checkpoints made of them.

A packed model has no float weights at the sites of such stores. Its checkpoint is a folder of its own beside the latent
one: config.json, which describes the quantisation; packed.safetensors (in shards above 5 GB) with
`<layer>.transform.store.<part>` for packed layers; and transform.json. There is no model.safetensors: transformers
knows no such quantisation and would, with a warning, load random weights in place of packed ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline_lib.artifacts.files import read_json, write_json
from pipeline_lib.config.errors import UserError
from pipeline_lib.config.registry import TRANSFORMS
from pipeline_lib.config.validate import validate
from pipeline_lib.models.checkpoint import DTYPES, MAX_SHARD, TRANSFORM_FILE, auto_class_of
from pipeline_lib.models.naming import is_transform_state
from pipeline_lib.transforms.apply import STATE, Applied, apply
from pipeline_lib.transforms.base import Store

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FOLDER = "packed"
METHOD = "errata"
WEIGHTS = "packed"
PACKED_DTYPE = torch.bfloat16
"""Of what `convert` leaves unpacked in a packed checkpoint: embedding, output layer, norms, biases."""


class PackedStore(nn.Module, Store):
    """A store of weights that encodes them anew at each pass, or holds what it once encoded.

    Attributes:
        shape: of the weight, (out, in).
        dtype: that decoded weights have while packed tensors are held.
    """

    roles = frozenset({"weight"})

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape
        self.dtype = torch.float32

    def hold(self, stored: dict[str, Tensor], dtype: torch.dtype) -> None:
        """Use these stored tensors from now on: buffers, which no optimizer sees and no state of a transform holds."""
        for part in self.parts:
            self.register_buffer(part, stored[part], persistent=False)
        self.dtype = dtype

    def packed(self, role: str) -> dict[str, Tensor] | None:
        """See `Store.packed`."""
        return {part: getattr(self, part) for part in self.parts} if hasattr(self, self.parts[0]) else None

    def drop_state(self) -> None:
        """Forget what only encoding needs."""

    def bits_per_weight(self) -> float:
        """What the format asks for, without padding."""
        raise NotImplementedError


def packed_sites(applied: Applied) -> dict[str, tuple[nn.Module, PackedStore]]:
    """Site name → (module, store) of every store that packs."""
    return {
        found.site.name: (found.module, functions.store)
        for found, functions in applied.at
        if isinstance(functions.store, PackedStore)
    }


@torch.no_grad()
def pack(applied: Applied) -> None:
    """Let every store that can hold its stored tensors, encoded from the weights as they are now."""
    done: dict[int, dict[str, Tensor]] = {}
    for module, store in packed_sites(applied).values():
        weight: Any = module.weight
        stored = store.encode(weight.detach(), "weight")
        first = done.setdefault(id(weight), stored)
        same = first is stored or (
            first.keys() == stored.keys() and all(torch.equal(first[part], stored[part]) for part in stored)
        )
        store.hold(first if same else stored, weight.dtype)  # tied weights share their memory


def drop_latent(applied: Applied) -> None:
    """Free the float weights of layers that hold packed tensors; the model can then no longer be trained or packed."""
    for module, store in packed_sites(applied).values():
        held = next(iter((store.packed("weight") or {}).values()))
        store.drop_state()
        module.weight = nn.Parameter(torch.empty(0, dtype=store.dtype, device=held.device), requires_grad=False)


@torch.no_grad()
def pack_for(applied: Applied, checkpoint: Path) -> None:
    """`pack` for an evaluation: what lies in a packed checkpoint of the same transform is taken as it is.

    Trained weights are packed from fp32 there; a model loaded in another dtype would round some to other codes.
    """
    sites = packed_sites(applied)
    about = read_json(checkpoint / TRANSFORM_FILE)["result"] if (checkpoint / TRANSFORM_FILE).is_file() else None
    if not sites or about is None or about["transform"] != packing(list(applied.entries)):
        pack(applied)
        return
    state = _tensors(checkpoint)
    for name, (module, store) in sites.items():
        weight: Any = module.weight
        prefix = f"{about['tied'].get(name, name)}.{STATE}.store."
        store.hold({part: state[prefix + part].to(weight.device) for part in store.parts}, weight.dtype)


def packing(transform: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The entries of a composition that pack weights, with their defaults; others do not change what is packed."""
    modules = [(TRANSFORMS.load(entry["type"]), entry) for entry in transform]
    return [
        validate(module.Settings, entry, f"transform {entry['type']}").semantic()
        for module, entry in modules
        if getattr(module, "PACKS", False)
    ]


def save_packed(directory: Path, model: PreTrainedModel, applied: Applied, dtype: torch.dtype) -> dict[str, Any]:
    """Write the packed form of a transformed model whose stores hold packed tensors.

    Args:
        directory: made by this.
        model: its weights elsewhere are written in `dtype`; tied weights are written once.

    Returns:
        Its sizes: see `sizes`.
    """
    directory.mkdir(parents=True)
    sites = packed_sites(applied)
    first: dict[int, str] = {}
    tied = {name: first.setdefault(_memory(store), name) for name, (_, store) in sites.items()}
    state: dict[str, Tensor] = {}
    for name, (_, store) in sites.items():
        if tied[name] == name:
            parts = store.packed("weight") or {}
            state |= {f"{name}.{STATE}.store.{part}": tensor for part, tensor in parts.items()}
    packed_weights = {id(module.weight) for module, _ in sites.values()}
    for name, parameter in model.named_parameters():  # a tied one is named once
        if id(parameter) not in packed_weights:
            state[name] = parameter.detach().to(dtype)
    for name, buffer in _persistent_buffers(model).items():
        state[name] = buffer.to(dtype) if buffer.is_floating_point() else buffer
    transform = packing(list(applied.entries))
    config = model.config.to_dict() | {
        "architectures": [type(model).__name__],
        "dtype": str(dtype).removeprefix("torch."),
        "quantization_config": {"quant_method": METHOD, "transform": transform},
    }
    write_json(directory / "config.json", config)
    tensors = {name: state[name].contiguous() for name in sorted(state)}
    save_torch_state_dict(
        tensors, directory, filename_pattern=f"{WEIGHTS}{{suffix}}.safetensors", max_shard_size=MAX_SHARD
    )
    result = {
        "transform": transform,
        "tied": {name: other for name, other in tied.items() if name != other},
        "tensors": sorted(name for name in state if is_transform_state(name)),
    }
    write_json(directory / TRANSFORM_FILE, {"result": result})
    return sizes(model, applied, state)


def load_packed(
    directory: Path,
    dtype: str = "float32",
    device: str | torch.device = "cpu",
    transform: list[dict[str, Any]] | None = None,
) -> tuple[PreTrainedModel, Applied]:
    """A packed model, in evaluation mode; no float weight of a packed layer is ever made.

    Args:
        directory: what `save_packed` wrote.
        dtype: of all that is not packed, and of what packed layers compute in.
        transform: a composition with the same packing entries, for faults beside them; None: those alone.

    Raises:
        UserError: it is no packed checkpoint, or of another transform.
    """
    import transformers
    from accelerate import init_empty_weights

    about = read_json(directory / TRANSFORM_FILE)["result"]
    if "tied" not in about:
        raise UserError(
            "not a packed checkpoint", where=str(directory), fix=f"give the folder `{FOLDER}` of a convert artifact"
        )
    if transform is not None and packing(transform) != about["transform"]:
        raise UserError(
            "the checkpoint was packed under another transform",
            where=str(directory),
            value=packing(transform),
            allowed=str(about["transform"]),
            fix="use the transform it was packed under",
        )
    config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    vars(config).pop("quantization_config")
    kind = getattr(torch, DTYPES[dtype])
    with init_empty_weights(include_buffers=False):
        model = getattr(transformers, auto_class_of(config.to_dict())).from_config(config)
    applied = apply(model, about["transform"] if transform is None else transform, seed=0)
    state = {name: tensor.to(device) for name, tensor in _tensors(directory).items()}
    for name, (_, store) in packed_sites(applied).items():
        prefix = f"{about['tied'].get(name, name)}.{STATE}.store."
        store.hold({part: state[prefix + part] for part in store.parts}, kind)
    drop_latent(applied)
    own = {name: tensor for name, tensor in state.items() if not is_transform_state(name)}
    own = {name: tensor.to(kind) if tensor.is_floating_point() else tensor for name, tensor in own.items()}
    model.load_state_dict(own, strict=False, assign=True)
    if getattr(config, "tie_word_embeddings", False) and "lm_head" not in packed_sites(applied):
        model.tie_weights()
    missing = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    if missing:
        raise UserError("tensors are missing", where=str(directory), value=missing[:5], fix="make the checkpoint again")
    return model.to(device).eval(), applied


def sizes(model: nn.Module, applied: Applied, state: dict[str, Tensor]) -> dict[str, Any]:
    """Bytes of a packed checkpoint by kind of tensor, beside what the format needs in theory.

    Args:
        state: the tensors of the checkpoint.

    Returns:
        {kind: {weights, bytes, bits_per_weight, theoretical_bits_per_weight}} and `total`; plain JSON.
    """
    rows: dict[str, dict[str, Any]] = {}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    for name, (module, store) in packed_sites(applied).items():
        tensors = [t for key, t in state.items() if key.startswith(f"{name}.{STATE}.store.")]
        if not tensors:
            continue  # tied to one that is counted
        kind = "embedding" if isinstance(module, nn.Embedding) else "head" if module is head else "layers"
        row = rows.setdefault(kind, {"weights": 0, "bytes": 0, "theoretical": 0.0})
        weights = store.shape[0] * store.shape[1]
        row["weights"] += weights
        row["bytes"] += sum(t.numel() * t.element_size() for t in tensors)
        row["theoretical"] += weights * store.bits_per_weight()
    rest = [tensor for name, tensor in state.items() if not is_transform_state(name)]
    size = sum(t.numel() * t.element_size() for t in rest)
    rows["not packed"] = {"weights": sum(t.numel() for t in rest), "bytes": size, "theoretical": 8.0 * size}
    total = {key: sum(row[key] for row in rows.values()) for key in ("weights", "bytes", "theoretical")}
    return {kind: _per_weight(row) for kind, row in {**rows, "total": total}.items()}


def _tensors(directory: Path) -> dict[str, Tensor]:
    """All tensors of a packed checkpoint."""
    files = sorted(directory.glob(f"{WEIGHTS}*.safetensors"))
    return {name: tensor for path in files for name, tensor in load_file(path).items()}


def _memory(store: PackedStore) -> int:
    return min(tensor.data_ptr() for tensor in (store.packed("weight") or {}).values())


def _per_weight(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "weights": row["weights"],
        "bytes": row["bytes"],
        "bits_per_weight": 8 * row["bytes"] / max(row["weights"], 1),
        "theoretical_bits_per_weight": row["theoretical"] / max(row["weights"], 1),
    }


def _persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name not in parameters and not is_transform_state(name)
    }
