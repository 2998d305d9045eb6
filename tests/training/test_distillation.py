"""The recipe `distill` in place: the loss against a plain computation of it, its memory, gamma, freezing, validation."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline_lib.artifacts.files import read_json
from pipeline_lib.artifacts.job import Job
from pipeline_lib.config.errors import UserError
from pipeline_lib.config.registry import RECIPES
from pipeline_lib.models import llama
from pipeline_lib.models.checkpoint import load_model
from pipeline_lib.training.distillation import DistillHooks
from pipeline_lib.training.divergences import cakld, forward_kl, jsd, reverse_kl, soft_cross_entropy, token_scale
from pipeline_lib.training.loop import Loop
from pipeline_lib.training.losses import IGNORED

VOCAB, SEQ_LEN = 200, 24
MODEL = {
    "family": "llama", "dim": 16, "layers": 1, "heads": 2, "kv_heads": 1, "ffn": 32, "vocab": VOCAB, "max_seq_len": 64,
    "rope_theta": 10000.0, "norm_eps": 1e-5,
}  # fmt: skip
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("distill")
    for seed, name in enumerate(("init", "teacher-model")):
        torch.manual_seed(seed)
        model = llama.build(MODEL)
        with torch.no_grad():
            model.lm_head.weight.mul_(30)
        model.save_pretrained(root / name)
    (root / "teacher").mkdir()
    draw = random.Random(3)
    lines = []
    for number in range(30):
        ids = [draw.randrange(VOCAB) for _ in range(draw.randrange(8, 30))]
        lines.append(json.dumps({"id": str(number), "prompt_ids": ids[:4], "completion_ids": ids[4:]}))
    (root / "teacher" / "records.jsonl").write_text("\n".join(lines) + "\n")
    return {name: root / name for name in ("init", "teacher-model", "teacher")}


def job(root: Path, inputs: dict[str, Path], transform: Any = (), **recipe: Any) -> Job:
    module = RECIPES.load("distill")
    given = {"steps": 3, "global_batch": 6, "seq_len": SEQ_LEN, "lr": 1e-3, "chunk": 5, **recipe}
    settings = module.Settings(**given).resolved(None).semantic()
    for name in ("work", "out"):
        (root / name).mkdir(parents=True, exist_ok=True)
    spec = {"model": MODEL, "transform": list(transform), "recipe": settings, "seed": 0}
    execution = {"micro_batch": 3, "tracking": {"wandb": "off"}, "log_every": 1}
    return Job("train", "t", "f" * 64, spec, inputs, root / "work", root / "out", execution)


def opened(root: Path, inputs: dict[str, Path], **recipe: Any) -> tuple[Loop, Any]:
    loop = Loop(job(root, inputs, **recipe))
    assert isinstance(loop.hooks, DistillHooks)
    return loop, loop.hooks


def batch_of(loop: Loop) -> dict[str, torch.Tensor]:
    inputs_BT, labels_BT = loop.loader.batch(0, 0, 6)
    return {"input_ids": inputs_BT, "labels": labels_BT}


def logits(loop: Loop, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        teacher_BTV = loop.hooks.teacher(input_ids=batch["input_ids"]).logits
    return loop.model(input_ids=batch["input_ids"]).logits, teacher_BTV


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("loss", ["ce", "forward", "reverse", "jsd", "cakld", "tlsd"])
def test_chunks_change_neither_loss_nor_gradient(
    loss: str, temperature: float, tmp_path: Path, inputs: dict[str, Path]
) -> None:
    given = {"gamma": 0.3} if loss == "cakld" else {}
    loop, hooks = opened(tmp_path, inputs, loss=loss, temperature=temperature, jsd_beta=0.7, **given)
    batch = batch_of(loop)
    mask_BT = batch["labels"] != IGNORED
    hooks.loss(loop.model, batch).sum().backward()
    found = {name: parameter.grad.clone() for name, parameter in loop.model.named_parameters()}
    loop.model.zero_grad()
    if loss == "ce":
        assert hooks.teacher is None, "nothing is loaded for it"
        student = loop.model(input_ids=batch["input_ids"]).logits
        loss_BT = torch.nn.functional.cross_entropy(
            student.transpose(1, 2), batch["labels"], ignore_index=IGNORED, reduction="none"
        )
    else:
        student, teacher = logits(loop, batch)
        labels = batch["labels"].clamp(min=0).unsqueeze(-1)
        surprise = -torch.log_softmax(teacher, -1).gather(-1, labels).squeeze(-1)
        plain = {
            "forward": forward_kl, "reverse": reverse_kl, "tlsd": soft_cross_entropy,
            "jsd": lambda s, t: jsd(s, t, 0.7), "cakld": lambda s, t: cakld(s, t, 0.3),
        }[loss]  # fmt: skip
        weight = token_scale(surprise, mask_BT) if loss == "tlsd" else mask_BT
        loss_BT = plain(student / temperature, teacher / temperature) * weight
    expected_B = (loss_BT * mask_BT).sum(1)
    assert torch.allclose(hooks.loss(loop.model, batch), expected_B, rtol=1e-4)
    expected_B.sum().backward()
    for name, parameter in loop.model.named_parameters():
        scale = float(parameter.grad.abs().max())  # type: ignore[union-attr]
        assert torch.allclose(found[name], parameter.grad, rtol=1e-3, atol=1e-4 * scale), name  # type: ignore[arg-type]


class Largest(TorchDispatchMode):
    """Bytes of every tensor that any operation makes, forward and backward: the largest, and those ≥ `size`."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements, self.seen, self.largest = elements, 0, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
                self.seen += tensor.numel() >= self.elements
        return out


@pytest.mark.parametrize("loss", ["cakld", "jsd", "tlsd", "ce"])
def test_no_tensor_of_batch_time_vocabulary_is_ever_made(loss: str, tmp_path: Path, inputs: dict[str, Path]) -> None:
    loop, hooks = opened(tmp_path, inputs, loss=loss, chunk=4, **({"gamma": 0.5} if loss == "cakld" else {}))
    batch = batch_of(loop)
    whole = batch["input_ids"].numel() * VOCAB
    with Largest(whole // 2) as counted:
        hooks.loss(loop.model, batch).sum().backward()
    assert counted.seen == 0
    assert counted.largest <= max(whole * 4 // batch["input_ids"].shape[1], VOCAB * 16)
    kept = 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept = max(kept, tensor.numel() if VOCAB in tensor.shape and tensor.ndim == 3 else 0)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hooks.loss(loop.model, batch)
    assert kept == 0, "no logits wait for the backward pass"
    with Largest(whole) as naive:
        loop.model(input_ids=batch["input_ids"])
    assert naive.seen > 0, "a plain forward pass makes one: the counter counts"


def test_prompts_are_not_learnt_unless_asked(tmp_path: Path, inputs: dict[str, Path]) -> None:
    loop, hooks = opened(tmp_path / "a", inputs, loss="forward")
    batch = batch_of(loop)
    assert hooks.targets(batch) == int((batch["labels"] != IGNORED).sum())
    assert (batch["labels"][:, :3] == IGNORED).all()
    other, _ = opened(tmp_path / "b", inputs, loss="forward", mask_prompt=False)
    assert (batch_of(other)["labels"][:, :3] != IGNORED).all()


def test_gamma_is_the_teachers_mean_probability_of_the_answers_tokens(tmp_path: Path, inputs: dict[str, Path]) -> None:
    loop, hooks = opened(tmp_path, inputs, loss="cakld", gamma_batches=2)
    total, count = 0.0, 0
    for step in range(2):
        ids, labels = loop.loader.batch(step, 0, 6)
        p = torch.softmax(hooks.teacher(input_ids=ids).logits, -1).gather(-1, labels.clamp(min=0).unsqueeze(-1))[..., 0]
        mask = labels != IGNORED
        total, count = total + float(p[mask].double().sum()), count + int(mask.sum())
    hooks.select(loop, 0, [])
    assert hooks.gamma == pytest.approx(total / count, rel=1e-5)
    assert 0 < hooks.gamma < 1
    assert opened(tmp_path / "fixed", inputs, loss="cakld", gamma=0.25)[1].gamma == 0.25


def test_gamma_as_published(tmp_path: Path, inputs: dict[str, Path]) -> None:
    """Eleven batches' mean largest probability over all positions, divided by ten."""
    loop, hooks = opened(tmp_path, inputs, loss="cakld", variant="original")
    total = 0.0
    for step in range(11):
        numbers = [int(k) for k in loop.loader.sequences(step, 0, 6)]
        ids, _ = loop.loader.pad(numbers, SEQ_LEN)
        total += float(torch.softmax(hooks.teacher(input_ids=ids).logits, -1).amax(-1).double().mean())
    hooks.select(loop, 0, [])
    assert hooks.gamma == pytest.approx(total / 10, rel=1e-5)


def test_losses_as_published(tmp_path: Path, inputs: dict[str, Path]) -> None:
    """Every position that holds a token, prompts included; summed over a sequence, averaged over sequences."""
    loop, hooks = opened(tmp_path / "a", inputs, loss="reverse", variant="original")
    batch = batch_of(loop)
    student, teacher = logits(loop, batch)
    lengths = [loop.loader.length(int(k)) for k in loop.loader.sequences(0, 0, 6)]
    loss_BT = reverse_kl(student, teacher)
    expected = torch.stack([row[:length].sum() for row, length in zip(loss_BT, lengths, strict=True)])
    assert torch.allclose(hooks.loss(loop.model, batch), expected, rtol=1e-4)
    assert hooks.targets(batch) == 6
    loop, hooks = opened(tmp_path / "b", inputs, loss="tlsd", variant="original")
    labels = batch["labels"]
    surprise = -torch.log_softmax(teacher, -1).gather(-1, labels.clamp(min=0).unsqueeze(-1))[..., 0]
    surprise = torch.where(labels == IGNORED, torch.zeros_like(surprise), surprise)
    weight = torch.softmax(surprise / 10, 1)
    expected_sum = (weight * soft_cross_entropy(student, teacher)).sum()
    found = hooks.loss(loop.model, batch).sum() / hooks.targets(batch)
    assert found.item() == pytest.approx(expected_sum.item(), rel=1e-4), "padding has weight, and the batch is summed"


def test_frozen_parameters_stay_and_are_held_once(tmp_path: Path, inputs: dict[str, Path]) -> None:
    same = {**inputs, "teacher-model": inputs["init"]}
    loop, hooks = opened(tmp_path, same, loss="forward", freeze=["model.embed_tokens.*", "lm_head.*"])
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert loop.model.get_parameter(name) is hooks.teacher.get_parameter(name)
    others = [p.data_ptr() for n, p in loop.model.named_parameters() if p.requires_grad]
    assert not set(others) & {p.data_ptr() for p in hooks.teacher.parameters()}, "what trains is not the teacher's"
    start = load_model(inputs["init"]).state_dict()
    from pipeline_lib.training.signals import StopRequest

    with StopRequest(None) as stop:
        loop.train(stop)
    after = loop.model.state_dict()
    moved = {name for name in start if not torch.equal(start[name], after[name])}
    assert moved == {n for n, p in loop.model.named_parameters() if p.requires_grad}
    with pytest.raises(UserError, match="the pattern matches no parameter"):
        opened(tmp_path / "typo", inputs, freeze=["lm_haed.*"])
    with pytest.raises(UserError, match="nothing is left to train"):
        opened(tmp_path / "all", inputs, freeze=["*"])


def test_training_brings_the_student_nearer_and_validates(tmp_path: Path, inputs: dict[str, Path]) -> None:
    from pipeline_lib.training.signals import StopRequest

    given = job(tmp_path, inputs, loss="forward", steps=12, lr=1e-2)
    loop = Loop(given)
    before = loop.hooks.validate(loop)
    loop.hooks.settings = loop.hooks.settings.model_copy(update={"valid_every": 4})
    given.execution["log_every"] = 5
    with StopRequest(None) as stop:
        loop.train(stop)
    result = read_json(given.out / "train.json")["result"]
    assert before is not None
    assert result["valid_loss"] < before
    lines = [json.loads(line) for line in (given.out / "log" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [4, 5, 8, 10, 12]
    assert [line["step"] for line in lines if "valid_loss" in line] == [4, 8, 12], "at the step they belong to"
    assert lines[-1]["valid_loss"] == result["valid_loss"]
    assert result["records"] == {"read": 24, "truncated": result["records"]["truncated"], "left_out": 0}


def test_errors(tmp_path: Path, inputs: dict[str, Path]) -> None:
    torch.manual_seed(0)
    small = llama.build({**MODEL, "vocab": VOCAB - 8})
    small.save_pretrained(tmp_path / "small")
    with pytest.raises(UserError, match="different vocabularies"):
        opened(tmp_path / "a", {**inputs, "teacher-model": tmp_path / "small"})
    with pytest.raises(UserError, match="largest token id"):
        opened(tmp_path / "b", {**inputs, "init": tmp_path / "small"})
    capped = llama.build(MODEL)
    capped.config.final_logit_softcapping = 30.0
    capped.save_pretrained(tmp_path / "capped")
    with pytest.raises(UserError, match="more than the product of hidden states and head"):
        opened(tmp_path / "c", {**inputs, "teacher-model": tmp_path / "capped"})
    for wrong, message in (
        ({"variant": "original", "gamma": 0.5}, "estimates gamma itself"),
        ({"loss": "mse"}, "loss"),
    ):
        with pytest.raises(ValueError, match=message):
            RECIPES.load("distill").Settings(steps=1, **wrong)


@pytest.mark.parametrize("loss", ["cakld", "jsd", "ce"])
def test_the_loss_is_fp32_in_a_training_in_bf16(loss: str, tmp_path: Path, inputs: dict[str, Path]) -> None:
    """Logits come out of the head in bf16; logarithms and sums over the vocabulary do not stay there."""
    given = {"gamma": 0.4} if loss == "cakld" else {}
    loop, hooks = opened(tmp_path, inputs, loss=loss, precision="bf16", **given)
    batch = batch_of(loop)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found_B = hooks.loss(loop.model, batch)
        student_BTV = loop.model(input_ids=batch["input_ids"]).logits
        teacher_BTV = student_BTV if loss == "ce" else hooks.teacher(input_ids=batch["input_ids"]).logits
    assert student_BTV.dtype == torch.bfloat16
    assert found_B.dtype == torch.float32
    s, t = student_BTV.double(), teacher_BTV.double()
    labels = batch["labels"].clamp(min=0).unsqueeze(-1)
    exact = {
        "cakld": lambda: cakld(s, t, 0.4),
        "jsd": lambda: jsd(s, t, 0.5),
        "ce": lambda: -torch.log_softmax(s, -1).gather(-1, labels).squeeze(-1),
    }[loss]()
    expected_B = (exact * (batch["labels"] != IGNORED)).sum(1)
    torch.testing.assert_close(found_B.double(), expected_B, rtol=1e-4, atol=0)
