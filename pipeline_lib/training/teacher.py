"""Teacher data: a model's own answers to prompts, sampled so that nothing but the seed decides them.

Token t of a record is the inverse of the cumulative distribution at a uniform number that depends on the seed, the
record and t alone (numpy's Philox, keyed by their SHA-256). So neither the number of workers nor a resume changes a
record. Batches hold the same records whoever makes them; another batch size changes sums in their last bit, and so
may change a token now and then.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from pipeline_lib.artifacts.files import write_bytes, write_json
from pipeline_lib.artifacts.job import Job
from pipeline_lib.artifacts.progress import Progress, say
from pipeline_lib.config.errors import UserError
from pipeline_lib.data.prompts import Prompt, TeacherData, choose, render
from pipeline_lib.data.records import RECORDS
from pipeline_lib.models.checkpoint import checkpoint_directory, end_tokens, load_model, load_tokenizer
from pipeline_lib.training.settings import option

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

QUESTIONS = "questions.json"
POLL_S = 0.2


def build(job: Job) -> None:
    """Write records.jsonl and teacher.json into `job.out`; batches of an earlier run in `job.work` are kept.

    Raises:
        UserError: there are no prompts, or the model has no room to answer.
    """
    settings = TeacherData.model_validate(job.settings["data"])
    questions = _questions(job, settings)
    folder = job.work / f"batches-of-{_batch_size(job)}"
    batches = _batches(questions, _batch_size(job))
    done = _done(folder, len(batches))
    with Progress("teacher", len(questions), "records", done=sum(len(batches[i]) for i in done)) as progress:
        if len(done) < len(batches):
            _sample(job, folder, batches, done, progress)
    _publish(job, settings, questions, folder, len(batches))


def _batch_size(job: Job) -> int:
    return int(option(job, "eval_batch_size", 8))


def _questions(job: Job, settings: TeacherData) -> list[dict[str, Any]]:
    """Every prompt with its token ids and the tokens that its answer may have; those without room are left out."""
    from transformers import AutoConfig

    directory = checkpoint_directory(job.inputs["model"])
    tokenizer = load_tokenizer(directory)
    span = int(AutoConfig.from_pretrained(directory, local_files_only=True).max_position_embeddings)
    names = dict.fromkeys(str(entry.dataset) for entry in settings.prompts)
    artifacts = {name: job.inputs[f"dataset-{index}"] for index, name in enumerate(names)}
    found, too_long = [], 0
    for prompt in choose(settings, artifacts):
        ids = render(tokenizer, prompt)
        room = min(settings.max_new_tokens, span - len(ids))
        if room < 1:
            too_long += 1
            continue
        found.append({**_described(prompt, tokenizer), "prompt_ids": ids, "room": room})
    if too_long:
        say(f"{too_long} prompts fill the teacher's {span} positions and are left out")
    if not found:
        raise UserError(
            "no prompt leaves the teacher room for an answer",
            where=job.label,
            value=f"{too_long} prompts",
            allowed=f"shorter than {span} tokens",
            fix="use shorter prompts or a model with more positions",
        )
    job.work.mkdir(parents=True, exist_ok=True)
    write_json(job.work / QUESTIONS, {"questions": found, "left_out": too_long})
    return found


def _described(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    chat = tokenizer.chat_template is not None and prompt.template != "prefix"
    metadata = {"dataset": prompt.dataset, "template": prompt.template, "chat": chat}
    return {"id": prompt.id, "messages": prompt.messages, "metadata": metadata}


def _batches(questions: list[dict[str, Any]], size: int) -> list[list[dict[str, Any]]]:
    """The questions by length, so that little is padded, in batches whose records do not depend on who makes them."""
    ordered = sorted(questions, key=lambda question: (len(question["prompt_ids"]), question["id"]))
    return [ordered[i : i + size] for i in range(0, len(ordered), size)]


def _file(folder: Path, index: int) -> Path:
    return folder / f"{index:06d}.jsonl"


def _done(folder: Path, count: int) -> set[int]:
    return {index for index in range(count) if _file(folder, index).exists()}


def _sample(job: Job, folder: Path, batches: list[list[dict[str, Any]]], done: set[int], progress: Progress) -> None:
    """Make the missing batches: in this process, or in as many as the machine has GPUs for it."""
    workers = min(int(option(job, "processes", 1)), len(batches) - len(done))
    todo = [index for index in range(len(batches)) if index not in done]
    if workers == 1:
        work(job, folder, batches, todo, 0, progress.update)
        return
    job.save(job.work / "job.json")
    context = multiprocessing.get_context("spawn")
    started = [
        context.Process(target=_worker, args=(job.work / "job.json", todo[rank::workers], rank, os.getpid()))
        for rank in range(workers)
    ]
    for process in started:
        process.start()
    try:
        while any(process.is_alive() for process in started):
            time.sleep(POLL_S)
            fresh = _done(folder, len(batches)) - done
            done |= fresh
            if fresh:
                progress.update(sum(len(batches[index]) for index in fresh))
            if any(process.exitcode not in (None, 0) for process in started):
                break
    finally:
        for process in started:
            process.terminate()
            process.join()
    failed = [process.exitcode for process in started if process.exitcode != 0]
    if failed:
        raise RuntimeError(f"{len(failed)} of {workers} workers failed, exit codes {failed}; their errors are above")
    fresh = _done(folder, len(batches)) - done
    if fresh:
        progress.update(sum(len(batches[index]) for index in fresh))


def _worker(job_file: Path, todo: list[int], rank: int, parent: int) -> None:
    """A worker process; it ends with its parent, however that ends."""
    from pipeline_lib.artifacts.files import read_json

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(POLL_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    job = Job.load(job_file)
    size = _batch_size(job)
    batches = _batches(read_json(job.work / QUESTIONS)["questions"], size)
    work(job, job.work / f"batches-of-{size}", batches, todo, rank, lambda count: None)


def work(
    job: Job,
    folder: Path,
    batches: list[list[dict[str, Any]]],
    todo: list[int],
    rank: int,
    made: Callable[[int], None],
) -> None:
    """Make the batches `todo` on this process's device; each is on disk, whole, before the next begins."""
    settings = TeacherData.model_validate(job.settings["data"])
    if job.execution.get("threads"):
        torch.set_num_threads(int(job.execution["threads"]))
    gpus = torch.cuda.device_count()
    device = torch.device("cuda", rank % gpus) if gpus else torch.device("cpu")
    directory = checkpoint_directory(job.inputs["model"])
    model = load_model(directory, job.settings["dtype"]).to(device)  # type: ignore[arg-type]
    tokenizer = load_tokenizer(directory)
    ends = end_tokens(model, tokenizer)
    for index in todo:
        answers = answer(model, batches[index], settings, ends)
        lines = []
        for question, ids in zip(batches[index], answers, strict=True):
            finished = bool(ids) and ids[-1] in ends
            kept = {key: value for key, value in question.items() if key not in ("room", "metadata")}
            text = tokenizer.decode(ids[:-1] if finished else ids, skip_special_tokens=False)
            metadata = {**question["metadata"], "finished": finished}
            record = {**kept, "completion": text, "completion_ids": ids, "metadata": metadata}
            lines.append(json.dumps(record, ensure_ascii=False, sort_keys=True) + "\n")
        write_bytes(_file(folder, index), "".join(lines).encode("utf-8", "surrogatepass"))
        made(len(lines))


@torch.no_grad()
def answer(
    model: PreTrainedModel, questions: list[dict[str, Any]], settings: TeacherData, ends: list[int]
) -> list[list[int]]:
    """The sampled answer to each question: token ids, an end token last where the model ended by itself.

    Args:
        questions: id, prompt_ids and room (most new tokens) of each.
        settings: temperature and seed.
        ends: tokens that end an answer.
    """
    width, room = max(len(q["prompt_ids"]) for q in questions), max(q["room"] for q in questions)
    pad = ends[0] if ends else 0
    ids_BT = torch.full((len(questions), width), pad)
    mask_BT = torch.zeros((len(questions), width), dtype=torch.int64)
    for row, question in enumerate(questions):
        length = len(question["prompt_ids"])
        ids_BT[row, width - length :] = torch.tensor(question["prompt_ids"])
        mask_BT[row, width - length :] = 1
    uniform_BN = np.stack([uniforms(settings.seed, question["id"], room) for question in questions])
    sampler = InverseSampling(torch.from_numpy(uniform_BN).to(model.device), settings.temperature, width)
    own = model.generation_config  # the model's own defaults (top-k, penalties) must not take part
    model.generation_config = GenerationConfig()
    try:
        out_BT = model.generate(  # type: ignore[operator]
            ids_BT.to(model.device),
            attention_mask=mask_BT.to(model.device),
            generation_config=GenerationConfig(
                do_sample=False, max_new_tokens=room, eos_token_id=ends or None, pad_token_id=pad
            ),
            logits_processor=LogitsProcessorList([sampler]),
        )
    finally:
        model.generation_config = own
    return [_cut(row[width:].tolist(), q["room"], ends) for row, q in zip(out_BT, questions, strict=True)]


def _cut(ids: list[int], room: int, ends: list[int]) -> list[int]:
    last = next((place for place, token in enumerate(ids[:room]) if token in ends), room - 1)
    return ids[: last + 1]


def uniforms(seed: int, name: str, count: int) -> np.ndarray:
    """The uniform numbers of one record; float64 [count] in [0, 1). A longer answer begins with the same ones."""
    key = int.from_bytes(hashlib.sha256(f"teacher:{seed}:{name}".encode()).digest()[:16], "big")
    return np.random.Generator(np.random.Philox(key=key)).random(count)


class InverseSampling(LogitsProcessor):
    """Leaves, of the next-token scores, only the token at the record's uniform number.

    Args:
        uniform_BN: float64, for each record and new token.
        temperature: the logits are divided by it.
        width: tokens of the (padded) prompts.
    """

    def __init__(self, uniform_BN: Tensor, temperature: float, width: int) -> None:
        self.uniform_BN, self.temperature, self.width = uniform_BN, temperature, width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        step = input_ids.shape[1] - self.width
        mass_BV = torch.softmax(scores.double() / self.temperature, dim=-1).cumsum(dim=-1)
        wanted_B1 = self.uniform_BN[:, step : step + 1] * mass_BV[:, -1:]
        token_B1 = torch.searchsorted(mass_BV, wanted_B1, right=True).clamp_(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(1, token_B1, 0.0)


def _publish(job: Job, settings: TeacherData, questions: list[dict[str, Any]], folder: Path, batches: int) -> None:
    by_id: dict[str, str] = {}
    for index in range(batches):
        for line in _file(folder, index).read_text(encoding="utf-8").split("\n")[:-1]:
            by_id[json.loads(line)["id"]] = line
    lines = [by_id[question["id"]] for question in questions]
    write_bytes(job.out / RECORDS, ("\n".join(lines) + "\n").encode())
    records = [json.loads(line) for line in lines]
    lengths = [len(record["completion_ids"]) for record in records]
    result = {
        "records": len(records),
        "asked_for": settings.n,
        "finished": sum(record["metadata"]["finished"] for record in records),
        "prompt_tokens": sum(len(record["prompt_ids"]) for record in records),
        "completion_tokens": sum(lengths),
        "longest_completion": max(lengths),
        "datasets": {name: sum(r["metadata"]["dataset"] == name for r in records) for name in _names(records)},
    }
    say(f"{result['records']} records, {result['completion_tokens']} tokens; {result['finished']} ended by themselves")
    write_json(job.out / "teacher.json", {"result": result, "provenance": {}})


def _names(records: list[dict[str, Any]]) -> list[str]:
    return sorted({record["metadata"]["dataset"] for record in records})
