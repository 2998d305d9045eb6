"""Adapters on merged weights: what a transform sees, what trains, what is exported."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from pipeline_lib.artifacts.files import read_json
from pipeline_lib.artifacts.job import Job
from pipeline_lib.config.errors import UserError
from pipeline_lib.config.registry import TRANSFORMS
from pipeline_lib.models.checkpoint import load_model
from pipeline_lib.stages import convert
from pipeline_lib.training.hooks import Hooks
from pipeline_lib.training.lora import Adapted, LoraHooks
from pipeline_lib.training.recipes import finetune
from pipeline_lib.transforms.apply import apply
from tests.training_bench import FAULTS, MODELS, STEPS, Bench, Case, ended, fork
from tests.transforms.transform_toys.models import llama, logits

BATCH = torch.arange(24).view(2, 12)
R, ALPHA = 3, 6.0
LORA = {"r": R, "alpha": ALPHA}
Settings: Any = finetune.Settings  # pydantic fills what pyright misses


def hooks(seed: int = 0, **lora: Any) -> LoraHooks:
    settings = Settings(steps=1, method="lora", lora={**LORA, **lora})
    made = finetune.hooks(
        settings, Job("train", "x", "f", {"seed": seed, "model": {}}, {"init": Path()}, Path(), Path())
    )
    assert isinstance(made, LoraHooks)
    return made


def adapted(model: nn.Module, seed: int = 0, **lora: Any) -> nn.Module:
    """The model with adapters that are no longer zero."""
    hooks(seed, **lora).adapt(model)
    torch.manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(std=0.2)
    return model


def by_hand(model: nn.Module, name: str) -> Tensor:
    """W + alpha/r · B A, from the parameters."""
    state = model.state_dict()
    return state[f"{name}.weight"] + ALPHA / R * (state[f"{name}.lora_B"] @ state[f"{name}.lora_A"])


def plain_twin(model: nn.Module) -> nn.Module:
    """A llama whose weights are the merged ones."""
    twin = llama()
    with torch.no_grad():
        for name, module in twin.named_modules():
            if isinstance(module, nn.Linear) and "layers" in name:
                module.weight.copy_(by_hand(model, name))
    return twin


# -- the forward and backward pass -------------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", [
    [{"type": "bitflip", "weight": {"p": 0.03, "zero_out": 2.0}, "input": {"p": 0.01, "zero_out": 30.0}}],
    [{"type": "toy_store"}],
    [{"type": "toy_store"}, {"type": "bitflip", "weight": {"p": 0.05}}],
], ids=["faults", "store", "store-faults"])  # fmt: skip
def test_a_transform_acts_on_the_merged_weight(transform: list[dict[str, Any]], toys: None) -> None:
    """The same faults, on the same values, as in a model that simply has the merged weights."""
    model = adapted(llama())
    twin = plain_twin(model)
    base = llama()
    found = []
    for one in (model, twin, base):
        applied = apply(one, transform, seed=3)
        applied.context.begin(2, 0)
        found.append(logits(one, BATCH))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found[1], found[2], atol=1e-2), "the adapters matter"


def test_the_gradient_is_that_of_the_merged_weight_through_the_gate() -> None:
    """dB = s·dW Aᵀ, dA = s·Bᵀ dW, where dW is zero wherever the guard zeroed a weight (straight through elsewhere)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 12, bias=False))
    with torch.no_grad():
        model.get_parameter("0.weight").normal_(std=0.5)
    hooks(targets=("0",)).adapt(model)
    layer: Any = model[0]
    with torch.no_grad():
        layer.lora_B.normal_(std=0.2)
    limit = 0.8
    applied = apply(model, [{"type": "bitflip", "weight": {"p": 0.02, "zero_out": limit}, "sites": {"*": {}}}], seed=1)
    applied.context.begin(0, 0)
    x, weight = torch.randn(5, 16), by_hand(model, "0")
    read = model(torch.eye(16)).T.detach()  # the weight as it was loaded
    assert 0 < (read == 0).double().mean() < 1
    assert (read != weight).any()
    g = torch.randn(5, 12)
    applied.context.begin(0, 0)
    output = model(x)
    torch.testing.assert_close(output, x @ read.T)
    output.backward(g)
    dw = (g.T @ x) * (read.abs() < limit) * (read != 0)
    scale = ALPHA / R
    torch.testing.assert_close(layer.lora_B.grad, scale * dw @ layer.lora_A.T)
    torch.testing.assert_close(layer.lora_A.grad, scale * layer.lora_B.T @ dw)
    assert layer._parameters["weight"].grad is None


def test_adapters_begin_as_nothing_and_depend_on_seed_and_name_alone() -> None:
    """B is zero, and A is drawn as peft draws it: uniform in ±√(1/in) (kaiming with a = √5)."""
    model, fewer, other = llama(), llama(), llama()
    before = logits(llama(), BATCH)
    hooks(0).adapt(model)
    hooks(0, targets=("*.1.mlp.*",)).adapt(fewer)
    hooks(1).adapt(other)
    assert torch.equal(logits(model, BATCH), before)
    name = "model.layers.1.mlp.up_proj.lora_A"
    a = model.state_dict()[name]
    assert torch.equal(a, fewer.state_dict()[name])
    assert not torch.equal(a, other.state_dict()[name])
    assert not torch.equal(a, model.state_dict()["model.layers.1.mlp.gate_proj.lora_A"])
    bound = (1 / 16) ** 0.5
    assert a.abs().max() <= bound
    assert a.std() == pytest.approx(bound / 3**0.5, rel=0.2)


def test_the_merged_weight_is_formed_in_full_precision_under_autocast() -> None:
    model = adapted(llama())
    layer: Any = model.get_submodule("model.layers.0.mlp.up_proj")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = layer.weight
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, by_hand(model, "model.layers.0.mlp.up_proj"))


def test_it_compiles_without_a_break() -> None:
    """One graph, for step after step."""
    model = adapted(nn.Sequential(nn.Linear(16, 12)), targets=("0",))
    applied = apply(model, [{"type": "bitflip", "weight": {"p": 0.05, "zero_out": 4.0}, "sites": {"*": {}}}], seed=0)
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    x = torch.randn(3, 16)
    for step in range(3):
        applied.context.begin(step, 0)
        torch.testing.assert_close(compiled(x), model(x))
    assert graphs.frame_count == 1


def test_layers_may_have_faults_of_their_own() -> None:
    """Not one setting for the whole model: here layer 1 alone has flips, and layer 0's adapters see none."""
    model = adapted(llama())
    sites = {"model.layers.0.*": None, "*.layers.1.*": {}}
    applied = apply(model, [{"type": "bitflip", "weight": {"p": 0.05, "zero_out": 2.0}, "sites": sites}], seed=0)
    assert {name.split(".")[2] for name in applied.report["layers"]} == {"1"}


# -- what trains -------------------------------------------------------------------------------------------------------


def test_every_linear_of_the_decoder_but_the_head_by_default() -> None:
    model = llama()
    made = hooks()
    made.adapt(model)
    names = {name for name, module in model.named_modules() if isinstance(module, Adapted)}
    parts = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    parts += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    assert names == {f"model.layers.{layer}.{part}" for layer in (0, 1) for part in parts}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {f"{name}.{part}" for name in names for part in ("lora_A", "lora_B")}
    held = {id(p) for group in made.optimizer(model.parameters()).param_groups for p in group["params"]}
    assert held == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}


def test_adapters_of_an_8b_llama_are_one_percent() -> None:
    """r 32 on Llama-3.1-8B, counted on the meta device: 83,886,080 of 8,030,261,248 parameters, 1.04 %."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    before = sum(parameter.numel() for parameter in model.parameters())
    hooks(r=32, alpha=32).adapt(model)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert (before, trained) == (8_030_261_248, 83_886_080)


def test_full_fine_tuning_decays_matrices_and_no_norm() -> None:
    """By dimension: lists of names such as `layer_norm.weight` know no llama's norms."""
    model = llama()
    made = Hooks(Settings(steps=1, weight_decay=0.1), 0).optimizer(model.parameters())
    decay = {id(p): group["weight_decay"] for group in made.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert decay[id(parameter)] == (0.0 if "norm" in name else 0.1), name


def test_a_transform_that_is_trained_trains_beside_the_adapters(toys: None) -> None:
    model = adapted(llama())
    apply(model, [{"type": "toy_compute", "sites": {"linear:*.layers.*": {}}}], seed=0)
    trained = {name.rpartition(".")[2] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"lora_A", "lora_B", "gain"}


@pytest.mark.parametrize(
    ("kind", "targets", "message"),
    [
        ({}, ("*.q_prj",), r"matches no linear layer(.|\n)*model.layers.0.self_attn.q_proj"),
        ({"tie_word_embeddings": True}, ("lm_head",), "shares its weight with another"),
    ],
)
def test_impossible_targets_are_refused(kind: dict[str, Any], targets: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        hooks(targets=targets).adapt(llama(**kind))


def test_other_decoders_have_biases_and_tied_embeddings() -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 61}
    config = Qwen2Config(**sizes, num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True)
    model: Any = Qwen2ForCausalLM(config).eval()
    before = logits(model, BATCH)
    made = hooks()
    made.adapt(model)
    assert torch.equal(logits(model, BATCH), before)
    assert not model.model.layers[0].self_attn.q_proj.bias.requires_grad


# -- settings ----------------------------------------------------------------------------------------------------------


def test_settings() -> None:
    lora = Settings(method="lora")
    assert lora.lora.model_dump() == {"r": 32, "alpha": 32.0, "targets": ("*.layer*.*",)}
    assert (lora.tokens_per_parameter, Settings().tokens_per_parameter) == (0.01, 0.22)
    assert Settings(method="lora", tokens=5).tokens_per_parameter is None
    full = Settings(steps=1).semantic()
    assert "lora" not in full, "trainings from before the setting keep their fingerprint"
    resolved = lora.resolved(10**6)
    assert Settings(**resolved.semantic()) == resolved
    for wrong, message in (
        ({"lora": {"r": 4}}, "needs method lora"),
        ({"method": "lora", "clip_weights": 0.1}, "leaves frozen"),
        ({"method": "lora", "lora": {"rank": 4}}, "Extra inputs"),
        ({"method": "lora", "lora": {"targets": []}}, "at least 1"),
        ({"method": "ia3"}, "'full' or 'lora'"),
    ):
        with pytest.raises(ValidationError, match=message):
            Settings(steps=1, **wrong)


def test_the_budget_counts_accumulation() -> None:
    """80 M tokens with 8 devices × 1 sequence × 2 micro-batches × 2,048 tokens are 2,442 steps: every sequence of the
    global batch counts, so that accumulation does not double what is trained on."""
    settings = Settings(method="lora", global_batch=8 * 1 * 2, seq_len=2048)
    resolved = settings.resolved(8_000_000_000)
    assert resolved.steps == 2442
    assert abs(resolved.steps * resolved.tokens_per_step - 80_000_000) < resolved.tokens_per_step


# -- a whole training --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(Case("finetune", "llama", "lora"), tmp_path_factory.mktemp("lora"))


def converted(bench: Bench, work: Path, out: Path) -> Path:
    """The artifact of `convert`."""
    settings = {"model": MODELS["llama"], "transform": FAULTS, "dtype": "float32", "layout": "hf"}
    inputs = {"train": work / "out", "tokenizer": bench.inputs["tokenizer"]}
    (out / "work").mkdir(parents=True)
    (out / "out").mkdir()
    convert.run(Job("convert", "x", "f", settings, inputs, out / "work", out / "out"))
    return out / "out"


def test_the_base_stays_and_the_update_is_of_low_rank(bench: Bench) -> None:
    work = bench.fresh("rank", recipe={"lora": {"r": 2, "alpha": 4.0}})
    assert bench.run(work) == [0]
    base, made = load_file(bench.inputs["init"] / "model.safetensors"), load_file(work / "out" / "model.safetensors")
    assert base.keys() == made.keys(), "no adapter in the checkpoint"
    for name, value in made.items():
        if "_proj" in name:
            spectrum = torch.linalg.svdvals(value.double() - base[name].double())
            assert spectrum[1] > 1e-5 > spectrum[2], name
        else:
            assert torch.equal(value, base[name]), name
    result = read_json(work / "out" / "train.json")["result"]
    assert result["parameters"] == sum(value.numel() for value in base.values())
    adapters = load_file(work / "out" / "adapter" / "adapter_model.safetensors")
    assert result["trained_parameters"] == sum(value.numel() for value in adapters.values())


def test_checkpoints_hold_what_trains_and_no_frozen_weight(bench: Bench) -> None:
    saved = load_file(bench.reference / "checkpoints" / f"step-{STEPS:06d}" / "weights.safetensors")
    assert saved
    assert {name.rpartition(".")[2] for name in saved} == {"lora_A", "lora_B"}


def test_the_checkpoint_is_merged_and_peft_gives_the_same_model(bench: Bench, tmp_path: Path) -> None:
    """What `from_pretrained` loads = base + adapters through peft = what was trained."""
    from peft import PeftModel

    made = converted(bench, bench.reference, tmp_path)
    check = load_file(bench.reference / "out" / "check.safetensors")
    base = load_model(bench.inputs["init"])
    with torch.no_grad():
        untrained = base(check["tokens"]).logits
        merged = load_model(made)(check["tokens"]).logits
        peft = PeftModel.from_pretrained(base, str(made / "adapter"))(input_ids=check["tokens"]).logits
    assert float((merged - untrained).abs().max()) > 1e-2, "it was trained"
    torch.testing.assert_close(merged, check["logits"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(peft, check["logits"], rtol=1e-5, atol=1e-5)
    config = read_json(made / "adapter" / "adapter_config.json")
    assert (config["r"], config["lora_alpha"]) == (32, 32)
    assert len(config["target_modules"]) == 2 * 7


def test_a_checkpoint_that_was_not_merged_is_refused(bench: Bench, tmp_path: Path) -> None:
    """As a save of the base weights beside adapters that no plain load would read."""
    work = tmp_path / "copy"
    shutil.copytree(bench.reference, work)
    shutil.copyfile(bench.inputs["init"] / "model.safetensors", work / "out" / "model.safetensors")
    with pytest.raises(UserError, match="computes other logits than the model that was trained"):
        converted(bench, work, tmp_path / "made")


def forwards(init: Path, adapter: Path, out: Path) -> None:
    """The faulty logits of base + adapters, and of the merged model, at one place of the fault streams."""
    from pipeline_lib.training.lora import A, B

    model = load_model(init)
    state = load_file(adapter / "adapter_model.safetensors")
    made = hooks(r=32, alpha=32.0)
    made.adapt(model)
    with torch.no_grad():
        for name in made._targets:
            for part in (A, B):
                key = f"base_model.model.{name}.{part}.weight"
                model.get_parameter(f"{name}.{part}").copy_(state[key])
    applied = apply(model, FAULTS, seed=9)
    applied.context.begin(0, 0)
    with torch.no_grad():
        save_file({"logits": model(torch.arange(16)[None]).logits}, out)


def test_merging_changes_no_fault(bench: Bench, tmp_path: Path) -> None:
    """The exported model under flips computes what the model with adapters computed under the same flips, bit for bit."""
    made = converted(bench, bench.reference, tmp_path / "made")
    assert ended(fork(forwards, bench.inputs["init"], made / "adapter", tmp_path / "trained.safetensors")) == 0
    model = load_model(made)
    applied = apply(model, FAULTS, seed=9)
    applied.context.begin(0, 0)
    with torch.no_grad():
        assert torch.equal(model(torch.arange(16)[None]).logits, load_file(tmp_path / "trained.safetensors")["logits"])


def test_sharing_the_batch_changes_nothing_but_the_order_of_sums(bench: Bench) -> None:
    whole = bench.fresh("whole", micro_batch=8)
    assert bench.run(whole) == [0]
    ones, others = (load_file(work / "out" / "model.safetensors") for work in (whole, bench.reference))
    assert max(float((ones[name] - others[name]).abs().max()) for name in ones) < 1e-4


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Toy transforms by name."""
    for name in ("store", "compute"):
        monkeypatch.setitem(TRANSFORMS._extra, f"toy_{name}", f"tests.transforms.transform_toys.{name}")
