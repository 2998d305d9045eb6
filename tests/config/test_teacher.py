"""`teacher:` in an experiment: which artifacts it asks for, and what is refused while planning."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from pipeline_lib.config.errors import UserError
from pipeline_lib.config.plan import Plan
from pipeline_lib.config.schema import Config
from tests.workflow.clone import ROOT, TINY

DISTILL = {"distill": {"steps": 4, "seq_len": 16, "global_batch": 4, "data": {"n": 20}}}


def plan(**experiments: Any) -> Plan:
    config = copy.deepcopy(TINY)
    config["datasets"]["other"] = {"source": {"type": "hub", "repo": "owner/other"}}
    config["models"]["chat"] = {"hub": {"repo": "owner/chat"}, "dtype": "bfloat16"}
    config["experiments"] = {"plain-tiny": {}, "bitflip-tiny": {}, **experiments}
    config["datasets"]["words"]["source"] = {"type": "hub", "repo": "owner/words"}
    return Plan(Config(**config))


def student(**given: Any) -> dict[str, Any]:
    return {"from": "plain-tiny", "transform": "bitflip", "teacher": "plain-tiny", "recipe": DISTILL, **given}


def test_an_experiment_as_teacher() -> None:
    made = plan(student=student())
    train = made.resolver.train(made.resolver.experiments.get("student"))
    assert set(train.inputs) == {"tokenizer", "init", "teacher", "teacher-model"}
    teacher = train.inputs["teacher"]
    assert teacher.stage == "teacher"
    assert teacher.inputs["model"] is train.inputs["teacher-model"]
    assert train.inputs["init"].fingerprint == train.inputs["teacher-model"].fingerprint
    [prompts] = teacher.settings["data"]["prompts"]
    assert (prompts["template"], prompts["dataset"]) == ("prefix", "owner-words-0"), "its own dataset, by what it is"
    assert teacher.settings["dtype"] == "float32"


def test_a_hub_model_teaches_itself() -> None:
    prompts = [{"dataset": "other", "template": "instruction", "weight": 2}, {"dataset": "words"}]
    recipe = {"distill": {"steps": 4, "data": {"prompts": prompts}}}
    made = plan(student={"model": "chat", "teacher": "chat", "recipe": recipe})
    train = made.resolver.train(made.resolver.experiments.get("student"))
    assert train.inputs["teacher-model"].stage == train.inputs["init"].stage == "assets"
    assert train.inputs["teacher-model"].path == train.inputs["init"].path
    assert set(train.inputs["teacher"].inputs) == {"model", "dataset-0", "dataset-1"}
    assert train.inputs["teacher"].settings["dtype"] == "bfloat16"
    assert "chat_template.jinja" in train.inputs["tokenizer"].inputs["asset"].settings["patterns"]


def test_what_does_not_concern_the_teacher_shares_its_records() -> None:
    variants = {"loss": "jsd", "lr": 1e-4, "seq_len": 12, "variant": "original"}
    entries = {
        f"s{n}": student(recipe={"distill": {**DISTILL["distill"], key: value}})
        for n, (key, value) in enumerate(variants.items())
    }
    other = {**DISTILL["distill"], "data": {"n": 21}}
    made = plan(student=student(), more=student(recipe={"distill": other}), run=student(seed=3), **entries)
    nodes = {
        name: made.resolver.train(made.resolver.experiments.get(name)) for name in ["student", "more", "run", *entries]
    }
    teachers = {node.inputs["teacher"].fingerprint for name, node in nodes.items() if name != "more"}
    assert teachers == {nodes["student"].inputs["teacher"].fingerprint}
    assert nodes["more"].inputs["teacher"].fingerprint not in teachers
    assert len({node.fingerprint for node in nodes.values()}) == len(nodes)


def test_a_datasets_name_is_no_part_of_identity() -> None:
    one = plan(student=student())
    config = one.config.model_dump(by_alias=True, exclude_none=True)
    config["datasets"]["renamed"] = config["datasets"].pop("words")
    config["tokenizers"]["words"]["train"]["dataset"] = config["models"]["tiny"]["dataset"] = "renamed"
    config["tasks"]["words"]["dataset"] = "renamed"
    other = Plan(Config(**config))
    marks = {p.resolver.train(p.resolver.experiments.get("student")).fingerprint for p in (one, other)}
    assert len(marks) == 1


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (student(teacher=None), "needs `teacher`"),
        ({"model": "tiny", "teacher": "plain-tiny", "recipe": DISTILL}, "needs weights to start from"),
        (student(teacher="bitflip-tiny"), r"a teacher computes exactly(.|\n)*from: bitflip-tiny"),
        (student(teacher="tiny"), r"has no weights to teach with(.|\n)*plain-tiny"),
        (student(teacher="nobody"), "no such experiment"),
        (student(teacher="student"), "in a circle"),
        (student(recipe={"distill": {"steps": 4, "data": {"prompts": [{"dataset": "nope"}]}}}), "nope"),
        (student(recipe={"distill": {"steps": 4, "data": {"temperature": 0}}}), "temperature"),
        (student(recipe={"cram": {"steps": 4}}), "recipe cram reads no teacher"),
    ],
)  # fmt: skip
def test_errors(entry: dict[str, Any], message: str) -> None:
    made = plan(student={key: value for key, value in entry.items() if value is not None})
    with pytest.raises(UserError, match=message):
        made.resolver.train(made.resolver.experiments.get("student"))


READY = {
    "int2-llama-3.2-1b-instruct": ("ifeval", "instruction", "yahma/alpaca-cleaned"),
    "int2-llama-guard-3-1b": ("toxicchat", "guard", "lmsys/toxic-chat"),
}


@pytest.mark.parametrize("name", list(READY))
def test_the_ready_experiments_plan_with_all_that_comes_before(name: str) -> None:
    """Of config.yaml itself: every stage, the published sampling, ranges searched on the teacher's own answers."""
    task, template, repo = READY[name]
    made = Plan.load(str(ROOT / "config.yaml"))
    made.view(f"results/{name}/{task}.json")
    stages = {"assets", "tokenizer", "dataset", "teacher", "clip", "train", "convert", "evaluate", "result"}
    assert {node.stage for node in made.nodes.values()} >= stages
    train = made.resolver.train(made.resolver.experiments.get(name))
    teacher, clip = train.inputs["teacher"], train.inputs["clip"]
    asked = teacher.settings["data"]
    sampling = {key: asked[key] for key in ("n", "temperature", "max_new_tokens", "seed")}
    assert sampling == {"n": 3000, "temperature": 0.7, "max_new_tokens": 1024, "seed": 42}
    assert [prompts["template"] for prompts in asked["prompts"]] == [template]
    assert teacher.inputs["dataset-0"].settings["source"]["repo"] == repo
    assert clip.inputs["text"] is teacher
    assert clip.inputs["init"].id == train.inputs["init"].id == train.inputs["teacher-model"].id
    recipe = train.settings["recipe"]
    published = {"loss": "cakld", "lr": 8e-6, "decay": "constant", "global_batch": 16, "valid_share": 0.2}
    assert {key: recipe[key] for key in published} == published
    assert recipe["steps"] * recipe["global_batch"] == 3000 * 0.8, "an epoch"
    [transform] = train.settings["transform"]
    assert (transform["format"], transform["group_size"], transform["clip"]["grid"]) == ("int2-asym", 128, 20)
    assert made.resolver.execution(made.resolver.experiments.get(name))["recipe"] == {"valid_every": 25}
