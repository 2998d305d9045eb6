"""`losses:` in an experiment: which artifacts it asks for, and what is refused while planning."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline_lib.config.errors import UserError
from pipeline_lib.config.nodes import Node
from pipeline_lib.config.plan import Plan
from pipeline_lib.config.schema import Config
from pipeline_lib.data.example_losses import ExampleLosses
from tests.workflow.clone import TINY

SMALL = {"steps": 4, "global_batch": 4, "seq_len": 16}
RHO = {"rho-loss": {"mega_batch": 8}}


def plan(**experiments: Any) -> Plan:
    config = copy.deepcopy(TINY)
    config["datasets"]["words"] = {
        "source": {"type": "hub", "repo": "owner/words"}, "split": {"valid": 0.2, "test": 0.2, "holdout": 0.2},
    }  # fmt: skip
    config["datasets"]["other"] = {"source": {"type": "hub", "repo": "owner/other"}}
    config["models"]["encoder"] = {
        "bert": {"dim": 32, "layers": 2, "heads": 2, "ffn": 64}, "tokenizer": "words", "dataset": "words", "tasks": [],
    }  # fmt: skip
    config["models"]["foreign"] = {**config["models"]["tiny"], "tokenizer": "others"}
    config["tokenizers"]["others"] = {"train": {"dataset": "words", "vocab_size": 301}}
    config["experiments"] = {"plain-tiny": {}, "judge": judge(), **experiments}
    return Plan(Config(**config))


def judge(model: str = "tiny", **more: Any) -> dict[str, Any]:
    return {"model": model, "recipe": {"cram": {**SMALL, "split": "holdout"}}, **more}


def chooser(model: str = "tiny", losses: Any = "judge", methods: Any = (RHO,), **more: Any) -> dict[str, Any]:
    return {"model": model, "losses": losses, "recipe": {"cram": {**SMALL, "methods": list(methods)}}, **more}


def trained(made: Plan, name: str = "chooser") -> Node:
    return made.resolver.train(made.resolver.experiments.get(name))


def refused(message: str, **experiments: Any) -> None:
    with pytest.raises(UserError, match=message):
        trained(plan(**experiments))


def test_an_experiments_losses() -> None:
    made = plan(chooser=chooser())
    train = trained(made)
    losses = train.inputs["losses"]
    assert losses.stage == "score"
    assert set(losses.inputs) == {"model", "tokenizer", "tokens"}
    assert losses.inputs["tokens"].fingerprint == train.inputs["tokens"].fingerprint, "of what is trained on"
    assert losses.inputs["model"].inputs["train"].settings["recipe"]["split"] == "holdout"
    assert losses.settings == {"seq_len": 16, "masks": None, "dtype": "float32"}
    assert "split" not in train.settings["recipe"], "a training on its train split is what it was"


def test_an_encoders_losses_have_masks_that_do_not_depend_on_the_chooser() -> None:
    changed = chooser("encoder", "judged", seed=3)
    changed["recipe"]["cram"]["lr"] = 1e-4
    made = plan(judged=judge("encoder", seed=5), chooser=chooser("encoder", "judged"), again=changed)
    one, other = trained(made).inputs["losses"], trained(made, "again").inputs["losses"]
    assert one.settings["masks"] == {"seed": 5, "rate": 0.15}
    assert one.fingerprint == other.fingerprint, "one model on the holdout serves all seeds and settings"


def test_a_training_and_its_judge_may_read_different_amounts_of_text() -> None:
    """The mega-batches are what is read; the losses are those of that text."""
    config = plan(chooser=chooser(), plain=chooser(losses=None, methods=())).config.model_dump(
        by_alias=True, exclude_none=True
    )
    config["datasets"]["words"]["bytes_per_token"] = 2**16
    made = Plan(Config(**config))
    sizes = {
        name: trained(made, name).inputs["tokens"].inputs["dataset"].settings["max_bytes"]
        for name in ("chooser", "plain")
    }
    assert sizes["chooser"] == 2 * sizes["plain"], "mega_batch is twice global_batch"
    losses = trained(made).inputs["losses"]
    assert losses.inputs["tokens"].fingerprint == trained(made).inputs["tokens"].fingerprint


def test_losses_of_the_very_text_are_refused() -> None:
    """A model that has seen the sequences has no irreducible losses of them; not even further down the chain."""
    refused("not irreducible", chooser=chooser(losses="plain-tiny"))
    onwards = {"from": "plain-tiny", "recipe": {"cram": {**SMALL, "split": "holdout"}}}
    refused("not irreducible", onwards=onwards, chooser=chooser(losses="onwards"))
    still = {"from": "plain-tiny", "recipe": "none"}
    refused("not irreducible", still=still, chooser=chooser(losses="still"))
    assert trained(plan(elsewhere=judge(dataset="other"), chooser=chooser(losses="elsewhere"))).inputs["losses"]


def test_what_makes_no_sense_is_refused() -> None:
    refused("needs `losses`", chooser=chooser(losses=None))
    refused("reads no losses", chooser=chooser(methods=()))
    refused("mega_batch 2 is smaller than global_batch 4", chooser=chooser(methods=[{"rho-loss": {"mega_batch": 2}}]))
    on_holdout = chooser()
    on_holdout["recipe"]["cram"]["split"] = "holdout"
    refused("it chooses from the train split", chooser=on_holdout)
    refused("encoder's losses mean nothing to a decoder", judged=judge("encoder"), chooser=chooser(losses="judged"))
    refused("another tokenizer's tokens", judged=judge("foreign"), chooser=chooser(losses="judged"))
    refused("this experiment has a transform", judged=judge(transform="bitflip"), chooser=chooser(losses="judged"))
    refused("no such experiment", chooser=chooser(losses="nowhere"))
    circle = {"losses": "chooser", "recipe": chooser()["recipe"], "model": "tiny"}
    refused("in a circle", judge=circle, chooser=chooser())


def test_imported_losses(tmp_path: Path) -> None:
    folder = tmp_path / "losses"
    given = {"folder": str(folder)}
    refused("no imported losses in the folder", chooser=chooser(losses=given))
    ExampleLosses(np.ones(3, np.float32), 16, "0" * 64, {"seed": None, "rate": None}).save(folder)
    made = plan(chooser=chooser(losses=given))
    losses = trained(made).inputs["losses"]
    assert set(losses.inputs) == {"imported", "tokens"}
    assert losses.inputs["imported"].stage == "assets"
    assert losses.inputs["imported"].execution == {"path": str(folder)}
    assert str(folder) not in str(losses.spec()) + str(losses.inputs["imported"].spec()), "known by content"
    before = losses.fingerprint
    ExampleLosses(np.zeros(3, np.float32), 16, "0" * 64, {"seed": None, "rate": None}).save(folder)
    assert trained(plan(chooser=chooser(losses=given))).inputs["losses"].fingerprint != before

    encoder = chooser("encoder", given)
    refused("nobody knows the masks", chooser=encoder)
    encoder["recipe"]["cram"]["methods"] = [{"rho-loss": {"mega_batch": 8, "masks": "fresh"}}]
    assert trained(plan(chooser=encoder)).inputs["losses"].inputs["imported"]
