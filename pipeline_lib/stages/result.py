"""result: the clean and the transformed arm of an experiment and a task, in one JSON."""

from __future__ import annotations

from pipeline_lib.artifacts.files import read_json, write_json
from pipeline_lib.artifacts.job import Job
from pipeline_lib.evaluation.arms import merge_arms
from pipeline_lib.evaluation.records import write_readable


def run(job: Job) -> None:
    """Merge the arms in `job.inputs` into result.json; the evaluator's own JSON is kept beside `result`.

    Of a task whose runs leave records, its readable files are written beside it, named `result` too.
    """
    arms = {name: read_json(path / "result.json") for name, path in job.inputs.items()}
    evaluator = {
        name: {file.stem: read_json(file) for file in sorted((path / "evaluator").glob("*.json"))}
        for name, path in job.inputs.items()
    }
    value = {
        "result": merge_arms({name: arm["result"] for name, arm in arms.items()}),
        "evaluator": evaluator,
        "provenance": {"arms": {name: arm["provenance"] for name, arm in arms.items()}},
    }
    write_json(job.out / "result.json", value)
    write_readable(job.out, "result", value["result"]["task"], job.inputs)
