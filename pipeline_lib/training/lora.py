"""Low-rank adaptation on merged weights: Y = f(X) · f(W + alpha/r · B A)ᵀ, whatever the transform f does.

Hu et al., LoRA: low-rank adaptation of large language models (ICLR 2022), section 4.1. peft adds B A x to the output of
the frozen layer; here the sum is formed first, because it is the merged weight that lies in imperfect memory. Without a
transform both are the same function, so the adapters are peft's and their files are written as peft reads them.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pipeline_lib.artifacts.files import write_json
from pipeline_lib.config.errors import UserError
from pipeline_lib.training.hooks import Hooks
from pipeline_lib.training.outcome import CHECK, check_tokens
from pipeline_lib.transforms.modules import reclass
from pipeline_lib.transforms.patterns import choose

if TYPE_CHECKING:
    from pipeline_lib.artifacts.job import Job
    from pipeline_lib.training.recipes.finetune import Lora, Settings

FOLDER = "adapter"
"""Where peft's files lie below an artifact; beside config.json transformers would load them unasked."""
A, B = "lora_A", "lora_B"


class Adapted:
    """Mixin before a class derived from `nn.Linear`: its weight is the merged one, formed anew at each reading.

    Attributes:
        lora_A: [r, in], fp32.
        lora_B: [out, r], fp32.
        lora_scale: alpha/r.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_scale: float

    @property
    def weight(self) -> Tensor:
        """[out, in], formed in the base's dtype and never in autocast's; its gradient reaches the adapters alone."""
        base: Tensor = self._parameters["weight"]  # type: ignore[attr-defined]
        with torch.autocast(base.device.type, enabled=False):
            return merged(base, self.lora_A, self.lora_B, self.lora_scale)


def merged(base: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """W + scale · B A. base [out, in], a [r, in], b [out, r]."""
    return torch.addmm(base, b, a, alpha=scale)


class LoraHooks(Hooks):
    """Fine-tuning that trains adapters alone, and what a transform adds to be trained."""

    settings: Settings

    def __init__(self, settings: Settings, job: Job) -> None:
        super().__init__(settings, job.settings["seed"])
        assert settings.lora is not None  # the settings see to it
        self.lora: Lora = settings.lora
        self._base = job.settings["model"]
        self._targets: list[str] = []

    def adapt(self, model: nn.Module) -> None:
        """Freeze the model and give each target its adapters: A as peft draws it, B zero, so that nothing changes yet.

        Raises:
            UserError: a pattern matches no linear layer, or a target shares its weight with another layer.
        """
        model.requires_grad_(False)
        linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        owners = [id(weight) for _, weight in model.named_parameters(remove_duplicate=False)]
        for name in choose(linears, self.lora.targets, "linear layer", "recipe.finetune.lora.targets"):
            module = linears[name]
            if owners.count(id(module.weight)) > 1:
                raise UserError(
                    "the layer shares its weight with another one, which an adapter would change too",
                    where="recipe.finetune.lora.targets",
                    value=name,
                    fix="leave it out of the targets",
                )
            self._add(name, module)

    def _add(self, name: str, module: nn.Linear) -> None:
        digest = hashlib.sha256(f"{self.seed}/{name}.{A}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        like: Any = {"dtype": torch.float32, "device": module.weight.device}
        module.register_parameter(A, nn.Parameter(torch.empty(self.lora.r, module.in_features, **like)))
        module.register_parameter(B, nn.Parameter(torch.zeros(module.out_features, self.lora.r, **like)))
        if not module.weight.is_meta:
            nn.init.kaiming_uniform_(module.get_parameter(A), a=math.sqrt(5), generator=generator)
        reclass(module, Adapted)
        module.lora_scale = self.lora.alpha / self.lora.r  # type: ignore[assignment]
        self._targets.append(name)

    def export(self, model: nn.Module, state: dict[str, Tensor], out: Path) -> dict[str, Tensor]:
        """The weights with the adapters merged into them.

        Beside them go the adapters in peft's files, and logits of the model as it was trained, unmerged and without its
        transform, for the conversion to compare with.
        """
        from safetensors.torch import save_file

        self._save_adapters(state, out / FOLDER)
        tokens_BT = check_tokens(model.config.vocab_size, self.settings.seq_len)  # type: ignore[union-attr, arg-type]
        model.cpu().eval()
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # two sequences are not worth compiling for
            logits_BTV = model(input_ids=tokens_BT, use_cache=False).logits
        save_file({"tokens": tokens_BT, "logits": logits_BTV.float().contiguous()}, out / CHECK)
        whole = {name: value for name, value in state.items() if not name.endswith((f".{A}", f".{B}"))}
        for name in self._targets:
            base = whole[f"{name}.weight"]
            whole[f"{name}.weight"] = merged(
                base, state[f"{name}.{A}"], state[f"{name}.{B}"], self.lora.alpha / self.lora.r
            )
        return whole

    def _save_adapters(self, state: dict[str, Tensor], folder: Path) -> None:
        from peft import LoraConfig
        from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
        from safetensors.torch import save_file

        config = LoraConfig(
            task_type="CAUSAL_LM",
            base_model_name_or_path=self._base.get("repo"),
            revision=self._base.get("revision"),
            r=self.lora.r,
            lora_alpha=self.lora.alpha,  # type: ignore[arg-type]  # peft divides it only
            target_modules=self._targets,
            inference_mode=True,
        )
        # peft would write its sets in an order that changes from process to process.
        values = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
        write_json(folder / CONFIG_NAME, values)
        tensors = {
            f"base_model.model.{name}.{part}.weight": state[f"{name}.{part}"]
            for name in self._targets
            for part in (A, B)
        }
        save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
