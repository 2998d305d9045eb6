"""The ready experiments of ternary weights and ReLoRA: as published, and as a controlled pair."""

from __future__ import annotations

import pytest

from pipeline_lib.config.nodes import Node
from pipeline_lib.config.plan import Plan
from tests.workflow.clone import ROOT

RATES = ("5e-5", "1e-4", "2e-4")
PUBLISHED = {
    "steps": 30_000, "global_batch": 16, "seq_len": 1024, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01,
    "max_norm": 1.0, "warmup_steps": 1000, "decay": "linear", "min_lr_factor": 20 / 49, "precision": "fp16",
}  # fmt: skip
RESTARTS = {"rank": 128, "reset_every": 2000, "reset_warmup": 100, "alpha": None, "adapter_start": "xavier"}


@pytest.fixture(scope="module")
def plan() -> Plan:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return Plan.load()


def training(plan: Plan, name: str) -> Node:
    return plan.resolver.train(plan.resolver.experiments.get(name))


def test_the_published_runs_have_their_published_settings(plan: Plan) -> None:
    """The text of the source names one rate for both; its code has two."""
    plain, relora = (training(plan, name) for name in ("plain-mistral-1b", "relora-ternary-mistral-1b"))
    for node, rate in ((plain, 5e-5), (relora, 2e-4)):
        recipe, model = node.settings["recipe"], node.settings["model"]
        assert {key: recipe[key] for key in PUBLISHED} == PUBLISHED
        assert recipe["lr"] == rate
        sizes = {"dim": 4160, "layers": 5, "heads": 32, "kv_heads": 8, "ffn": 14_400, "vocab": 32_000}
        assert {key: model[key] for key in ("family", *sizes)} == {"family": "mistral", **sizes}
        assert node.inputs["tokens"].inputs["dataset"].settings["source"]["config"].startswith("wikitext-103")
    recipe, [transform] = relora.settings["recipe"], relora.settings["transform"]
    own = {**RESTARTS, "schedule": "published", "optimizer_reset": "all"}
    assert {key: recipe[key] for key in own} == own
    assert (transform["type"], transform["quantiser"]) == ("ternary", "sign_center")
    assert not any("mistral-1b" in target or "-1b-lr" in target for target in plan.targets()), "asked for by name"


@pytest.mark.parametrize("rate", RATES)
def test_the_pair_differs_in_what_it_compares_and_in_nothing_else(plan: Plan, rate: str) -> None:
    plain, relora = (training(plan, f"{name}-1b-lr{rate}") for name in ("pair-plain", "pair-relora-ternary"))
    for node in (plain, relora):
        recipe = node.settings["recipe"]
        assert {key: recipe[key] for key in PUBLISHED} == PUBLISHED
        assert recipe["lr"] == float(rate)
    assert plain.settings["seed"] == relora.settings["seed"]
    assert plain.settings["model"] == relora.settings["model"]
    assert plain.inputs["tokens"].path == relora.inputs["tokens"].path
    recipe, [transform] = relora.settings["recipe"], relora.settings["transform"]
    assert {key: recipe[key] for key in RESTARTS} == RESTARTS
    assert (recipe["schedule"], transform["quantiser"]) == ("jagged", "absmean_round"), "no wasted step, three values"
