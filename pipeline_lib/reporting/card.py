"""The model card of a published checkpoint."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from pipeline_lib.reporting.numbers import Measured, plus_minus


def model_card(
    repo: str,
    experiment: str,
    results: Mapping[str, dict[str, Any]],
    training: Mapping[str, Any],
    provenance: Mapping[str, str],
) -> str:
    """README.md of a hub repository: metadata, what it is, its results, how to load it, where it comes from.

    Args:
        repo: owner/name.
        results: task → `result` of its result.json.
        training: settings of the training: model, transform, recipe, seed; empty when unknown.
        provenance: shown as they are, e.g. fingerprint and commit.
    """
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["errata", "imperfect-arithmetic", *sorted({t["type"] for t in training.get("transform", [])})],
        model_name=repo.rpartition("/")[2],
        eval_results=_eval_results(results) or None,
    )
    sections = [
        f"---\n{data.to_yaml()}\n---",
        f"# {experiment}",
        _what(training),
        "## Results",
        _results(results),
        "## Use",
        _use(repo, bool(training.get("transform"))),
        "## Provenance",
        "\n".join(f"* {name}: `{value}`" for name, value in provenance.items()),
    ]
    return "\n\n".join(part for part in sections if part) + "\n"


def _what(training: Mapping[str, Any]) -> str:
    if not training:
        return "Made by Errata, a pipeline that trains and evaluates language models on imperfect arithmetic."
    transform = training.get("transform") or []
    kind = " + ".join(entry["type"] for entry in transform)
    how = f"with the transform **{kind}** in every forward pass" if transform else "in plain arithmetic"
    settings = json.dumps(training, indent=1, sort_keys=True, ensure_ascii=False)
    return f"Trained {how} by Errata.\n\n<details><summary>Settings</summary>\n\n```json\n{settings}\n```\n\n</details>"


def _results(results: Mapping[str, dict[str, Any]]) -> str:
    if not results:
        return "None yet."
    lines = ["| task | metric | clean | transformed | fault seeds |", "| --- | --- | ---: | ---: | ---: |"]
    for task, result in results.items():
        transformed = result.get("transformed")
        for metric, figures in result["clean"]["metrics"].items():
            faulty = Measured.of(transformed["metrics"][metric]) if transformed else None
            seeds = str(len(transformed["fault_seeds"])) if transformed else ""
            shown = plus_minus(faulty.mean, faulty.stderr) if faulty else ""
            lines.append(f"| {task} | {metric} | {Measured.of(figures)} | {shown} | {seeds} |")
    return (
        "\n".join(lines) + "\n\nMean ± standard error over fault seeds. Clean: the same weights without the transform."
    )


def _use(repo: str, transformed: bool) -> str:
    code = f'from transformers import AutoModelForCausalLM, AutoTokenizer\n\nname = "{repo}"\n'
    code += "model = AutoModelForCausalLM.from_pretrained(name)\ntokenizer = AutoTokenizer.from_pretrained(name)"
    note = (
        "\n\nLoaded this way the model computes in plain arithmetic. `transform.json` holds the settings under which "
        "it was trained; Errata applies them."
    )
    return f"```python\n{code}\n```" + (note if transformed else "")


def _eval_results(results: Mapping[str, dict[str, Any]]) -> list[Any]:
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=task,
            dataset_name=f"{task} ({arm})",
            metric_type=metric,
            metric_value=measured.mean,
        )
        for task, result in results.items()
        for arm in ("clean", "transformed")
        if arm in result
        for metric, figures in result[arm]["metrics"].items()
        if math.isfinite((measured := Measured.of(figures)).mean)
    ]
