"""`teacher:` in an experiment: which artifacts it asks for, and what is refused while planning."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from pipeline_lib.config.errors import UserError
from pipeline_lib.config.plan import Plan
from pipeline_lib.config.schema import Config
from tests.workflow.clone import TINY

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
