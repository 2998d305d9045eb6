"""A bench for trainings in tests: tiny jobs, run in forked ranks that can be killed, signalled and watched.

Ranks are forked from a server that has imported torch once, so that a run of a few steps takes about a
second; they are real processes, killed and signalled for real.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import random
import shutil
import socket
from pathlib import Path
from typing import Any

from pipeline_lib.artifacts.files import read_json, write_json
from pipeline_lib.artifacts.job import Job
from pipeline_lib.config.registry import RECIPES

VOCAB, SEQ_LEN, STEPS, BATCH = 64, 16, 6, 8
ROOT = Path(__file__).resolve().parents[1]
MODELS: dict[str, dict[str, Any]] = {
    "llama": {
        "family": "llama", "dim": 32, "layers": 2, "heads": 4, "kv_heads": 2, "ffn": 48, "vocab": VOCAB,
        "max_seq_len": SEQ_LEN, "rope_theta": 10000.0, "norm_eps": 1e-5,
    },
    "bert": {
        "family": "bert", "dim": 32, "layers": 2, "heads": 4, "ffn": 48, "vocab": VOCAB,
        "max_seq_len": SEQ_LEN, "norm_eps": 1e-12,
    },
}  # fmt: skip
# Fraction bits only: a flipped exponent would end so small a training in infinity.
FAULTS: list[dict[str, Any]] = [{"type": "bitflip", "weight": {"p_frac": 0.01}, "input": {"p_frac": 0.01}}]


@dataclasses.dataclass(frozen=True)
class Case:
    """A recipe, or a variant that it declares, on a model family; the engine is the recipe's."""

    recipe: str
    family: str
    variant: str = ""

    def __str__(self) -> str:
        return "-".join(filter(None, (self.recipe, self.variant, RECIPES.load(self.recipe).ENGINE, self.family)))

    @property
    def settings(self) -> dict[str, Any]:
        """The recipe's settings that make the variant."""
        return RECIPES.load(self.recipe).VARIANTS[self.variant] if self.variant else {}


@dataclasses.dataclass(frozen=True)
class Sabotage:
    """Something that happens to a rank at the `number`-th time that it passes a place.

    Places: batch (a micro-batch is read), write (a file or directory reaches the disk), log (a line of
    metrics is half written), merge (a step of a ReLoRA merge, or its master weights are written).
    """

    action: str  # kill or term
    place: str
    number: int
    rank: int = 0


class Bench:
    """Runs the trainings of one case, each in a work dir of its own below `root`."""

    def __init__(self, case: Case, root: Path) -> None:
        self.case, self.root = case, root
        self.inputs = {"tokens": make_tokens(root), "tokenizer": root / "tokenizer"}
        needs = getattr(RECIPES.load(case.recipe), "NEEDS", ())
        if "from" in needs:
            self.inputs["init"] = root / "init"
        if "teacher" in needs:
            self.inputs.update({"teacher": make_records(root), "teacher-model": root / "teacher-model"})
        assert ended(fork(make_with_transformers, root)) == 0
        self._finished: dict[str, Path] = {}

    @property
    def reference(self) -> Path:
        """An undisturbed run in one process."""
        return self._once("reference", 1)

    @property
    def reference_of_two(self) -> Path:
        """An undisturbed run on two ranks."""
        return self._once("reference-of-two", 2)

    @property
    def counts(self) -> dict[str, int]:
        """How often the undisturbed run passes each place."""
        return read_json(self.reference / "counts-0.json")

    def _once(self, name: str, world: int) -> Path:
        if name not in self._finished:
            work = self.fresh(name)
            assert self.run(work, world=world) == [0] * world
            self._finished[name] = work
        return self._finished[name]

    def fresh(
        self,
        name: str,
        transform: list[dict[str, Any]] | None = None,
        recipe: dict[str, Any] | None = None,
        **execution: Any,
    ) -> Path:
        """An empty work dir with its job; `recipe` overrides settings of the recipe."""
        work = self.root / name
        (work / "out").mkdir(parents=True)
        settings = {
            "model": MODELS[self.case.family],
            "transform": FAULTS if transform is None else transform,
            "recipe": recipe_settings(self.case.recipe, **{**self.case.settings, **(recipe or {})}),
            "seed": 3,
        }
        defaults = {"checkpoint_every": 2, "keep_checkpoints": 2, "log_every": 1, "tracking": {"wandb": "off"}}
        execution = {"micro_batch": 2, **defaults, **execution}
        Job("train", str(self.case), "c" * 64, settings, self.inputs, work, work / "out", execution).save(
            work / "job.json"
        )
        return work

    def copied(self, source: str, name: str) -> Path:
        """A copy of a finished run's work dir, its artifact not there yet."""
        shutil.copytree(self._once(source, 1), self.root / name)
        return self.move(self.root / name)

    def move(self, work: Path) -> Path:
        """Make the job in a copied work dir its own."""
        shutil.rmtree(work / "out")
        job = Job.load(work / "job.json")
        dataclasses.replace(job, work=work, out=work / "out").save(work / "job.json")
        return work

    def run(self, work: Path, sabotage: Sabotage | None = None, world: int = 1) -> list[int | None]:
        """Run the job in `work`; the exit codes of its ranks."""
        shutil.rmtree(work / "out", ignore_errors=True)
        (work / "out").mkdir()
        port = free_port()
        ranks = [fork(start_rank, work, rank, world, port, sabotage) for rank in range(world)]
        return [ended(process) for process in ranks]

    def same_result(self, work: Path, other: Path) -> None:
        """Both artifacts are the same bytes, logs and provenance apart."""
        names = artifact_files(other)
        assert artifact_files(work) == names
        for name in names:
            one, two = work / "out" / name, other / "out" / name
            if name.endswith(".json") and "result" in read_json(two):
                assert read_json(one)["result"] == read_json(two)["result"], name
            else:
                assert one.read_bytes() == two.read_bytes(), name


def start_rank(work: Path, rank: int, world: int, port: int, sabotage: Sabotage | None) -> None:
    """A forked process becomes a rank, as the launcher would start it."""
    from tests import training_rank

    if world > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    training_rank.main(work, rank, sabotage)


def recipe_settings(name: str, **override: Any) -> dict[str, Any]:
    """Tiny settings of a recipe, resolved."""
    module = RECIPES.load(name)
    own = {"type": name, "steps": STEPS, "global_batch": BATCH, "seq_len": SEQ_LEN, "lr": 1e-2, "warmup_steps": 2}
    restarts = {"rank": 4, "reset_every": 2, "reset_warmup": 1}
    own.update({key: value for key, value in restarts.items() if key in module.Settings.model_fields})
    return json.loads(json.dumps(module.Settings(**{**own, **override}).resolved(None).semantic()))


def make_tokens(root: Path) -> Path:
    """A tokens artifact of random text."""
    import numpy
    from safetensors.numpy import save_file

    directory = root / "tokens"
    directory.mkdir(parents=True)
    generator = numpy.random.default_rng(5)
    result: dict[str, Any] = {"vocab_size": VOCAB, "bos": 1, "eos": 2, "pad": 0}
    result.update(tokens={}, documents={}, shards={})
    for split, count in (("train", 1200), ("valid", 200), ("test", 200)):
        tokens = generator.integers(5, VOCAB, count).astype(numpy.uint16)
        starts = numpy.arange(0, count, 50, dtype=numpy.int64)
        name = f"{split}-00000.safetensors"
        save_file({"tokens": tokens, "document_starts": starts}, directory / name)
        result["tokens"][split], result["documents"][split] = count, len(starts)
        result["shards"][split] = [{"file": name, "tokens": count}]
    write_json(directory / "tokens.json", {"result": result})
    return directory


def make_records(root: Path) -> Path:
    """A teacher artifact of random tokens."""
    draw = random.Random(7)
    lines = []
    for number in range(3 * STEPS * BATCH):
        prompt, completion = (
            [draw.randrange(5, VOCAB) for _ in range(draw.randrange(*size))] for size in ((2, 7), (4, 14))
        )
        record = {"id": str(number), "messages": [], "completion": "", "metadata": {}}
        lines.append(json.dumps({**record, "prompt_ids": prompt, "completion_ids": completion}))
    directory = root / "teacher"
    directory.mkdir(parents=True)
    (directory / "records.jsonl").write_text("\n".join(lines) + "\n")
    return directory


def make_with_transformers(root: Path) -> None:
    """A word-level tokenizer with special tokens, and weights of two llamas: inputs of recipes that want them."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from pipeline_lib.models import llama

    special = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]
    words = {word: number for number, word in enumerate([*special, *(f"w{i}" for i in range(VOCAB - len(special)))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token", "mask_token"), special, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(root / "tokenizer")
    torch.manual_seed(1)
    llama.build(MODELS["llama"]).save_pretrained(root / "init")
    teacher = llama.build(MODELS["llama"])
    with torch.no_grad():  # untrained models hardly differ: their divergence would be rounding
        teacher.lm_head.weight.mul_(20)
    teacher.save_pretrained(root / "teacher-model")


def fork(target: Any, *args: Any) -> Any:
    """A started process, forked from the server that has imported what ranks need."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.training_rank"])
    process = context.Process(target=target, args=args)
    process.start()
    return process


def ended(process: Any) -> int | None:
    """The exit code of a process; a hanging one is killed."""
    process.join(120)
    if process.exitcode is None:
        process.kill()
        process.join()
    return process.exitcode


def metrics(work: Path) -> list[dict[str, Any]]:
    """The lines of a finished run's log."""
    return [json.loads(line) for line in (work / "out" / "log" / "metrics.jsonl").read_text().splitlines()]


def weights(work: Path) -> bytes:
    """The bytes of a finished run's weights."""
    return (work / "out" / "model.safetensors").read_bytes()


def seen(work: Path, which: str) -> dict[str, str]:
    """What all ranks of all runs in a work dir saw, by place: `sequences` or `masks`; equal where seen twice."""
    found: dict[str, str] = {}
    for path in sorted(work.glob("seen-*.jsonl")):
        for line in path.read_text().splitlines():
            kind, place, digest = json.loads(line)
            if kind == which:
                assert found.setdefault(place, digest) == digest, f"{place} was not the same twice"
    return found


def differing(one: dict[str, str], other: dict[str, str]) -> list[str]:
    """Some places at which two runs saw different things."""
    return sorted(place for place in one.keys() | other.keys() if one.get(place) != other.get(place))[:4]


def artifact_files(work: Path) -> list[str]:
    """Names of the compared files of an artifact."""
    out = work / "out"
    names = (path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
    return sorted(name for name in names if not name.startswith("log/"))


def flip_a_byte(path: Path) -> None:
    """Damage a file without changing its size."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


def free_port() -> int:
    """A port that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
