"""evaluate: one arm of a result, a checkpoint under a transform at a task."""

from __future__ import annotations

from pipeline_lib.artifacts.files import write_bytes, write_json
from pipeline_lib.artifacts.job import Job
from pipeline_lib.evaluation.records import write_records
from pipeline_lib.evaluation.run import shared_session


def run(job: Job) -> None:
    """Evaluate `settings.transform` on the checkpoint; leave result.json, the evaluator's own JSON and records.

    Several calls in one process share imports, the checkpoint and the task's data.
    """
    arm = shared_session().evaluate(job.settings, job.inputs, job.work / "runs", job.execution)
    for name, record in arm.evaluator.items():
        write_json(job.out / "evaluator" / f"{name}.json", record)
    write_records(job.out, arm.records)
    for name, text in arm.files.items():
        write_bytes(job.out / "log" / name, text.encode())
    write_json(job.out / "result.json", {"result": arm.result, "provenance": arm.provenance})
