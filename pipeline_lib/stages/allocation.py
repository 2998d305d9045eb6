"""What a job is given: cores, memory, GPUs, and its place on a cluster. Resource functions of the rules."""

from __future__ import annotations

import os
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

from pipeline_lib.artifacts import store
from pipeline_lib.artifacts.files import read_json
from pipeline_lib.artifacts.locks import is_held
from pipeline_lib.config.nodes import execution_path
from pipeline_lib.config.plan import Plan
from pipeline_lib.stages import attempts, slurm


@lru_cache(maxsize=4096)
def _execution(stage: str, node_id: str) -> dict[str, Any]:
    path = execution_path(stage, node_id)
    return read_json(path) if path.exists() else {}


def resource(plan: Plan, stage: str, node_id: str, key: str, default: int | str) -> Any:
    """One execution setting of a node, as Snakemake's resources want it."""
    node = plan.node(stage, node_id)
    execution = node.execution if node is not None else _execution(stage, node_id)
    value = execution.get(key)
    return default if value is None else value


def memory(plan: Plan, stage: str, node_id: str, key: str, default: int) -> int:
    """MB for the next attempt: once more for each attempt that was killed without a word, and is not still at work."""
    asked = int(resource(plan, stage, node_id, key, default))
    if not os.path.exists(f"{store.WORK}/{stage}--{node_id}"):  # asked for every job of every plan
        return asked
    artifact = store.STORE / stage / node_id
    killed = attempts.killed(store.work_directory(artifact))
    if killed and is_held(store.lock_file(artifact)):  # by a job that outlived its orchestrator: it was not killed
        killed -= 1
    return asked * (1 + killed)


def gpus(plan: Plan, stage: str, node_id: str) -> int:
    """GPUs of a training, over all its nodes."""
    return resource(plan, stage, node_id, "gpus", 0) * resource(plan, stage, node_id, "nodes", 1)


def slurm_options(plan: Plan, workflow: Any, stage: str, node_id: str) -> str:
    """Further options of sbatch: as many GPUs on every node, and waiting for a job that is at the artifact already."""
    options = []
    a_node = resource(plan, stage, node_id, "gpus", 0)
    if stage == "train" and a_node and resource(plan, stage, node_id, "nodes", 1) > 1:
        options.append(f"--gpus-per-node={a_node}")
    if submits(workflow):
        together = _grouped_with(workflow, stage)
        waited_for = [job.job for job in left_behind() if _is_at(job, together, node_id)]
        alive = [job for job in waited_for if slurm.is_alive(job)]
        options += [f"--dependency=afterany:{':'.join(alive)}"] if alive else []  # of two such options sbatch takes one
    return " ".join(options)


def _grouped_with(workflow: Any, stage: str) -> set[str]:
    """The stages that share jobs with `stage` (`groups` of the profile), itself among them."""
    groups = workflow.group_settings.overwrite_groups
    return {stage} | {other for other, group in groups.items() if group == groups.get(stage)}


def _is_at(job: slurm.Orphan, stages: set[str], node_id: str) -> bool:
    """Whether a job is at an artifact; or may be, where groups come in: all members of a group must get one answer."""
    return bool(job.stages & stages) and (len(stages) > 1 or job.id in (node_id, None))


def is_for_slurm(workflow: Any) -> bool:
    """Whether this plan is for a Slurm: it is here, or the profile is a cluster's (no other says `nodes`), as it is
    where somebody only looks at what a cluster would run."""
    defaults = workflow.resource_settings.default_resources
    return slurm.is_here() or (defaults is not None and "nodes" in defaults)


def submits(workflow: Any) -> bool:
    """Whether this process submits jobs to Slurm."""
    plugin = workflow.executor_plugin
    return workflow.is_main_process and plugin is not None and plugin.name == "slurm"


@lru_cache(maxsize=1)
def left_behind() -> list[slurm.Orphan]:
    """Jobs that a killed orchestrator submitted."""
    try:
        return slurm.orphans(Path.cwd())
    except ConnectionError as error:
        sys.exit(f"errata: {error}, so jobs of an earlier run may still be at work; try again when Slurm answers")


def leave_cores_to_the_cluster(workflow: Any) -> None:
    """Lift the limit `cores: all` from jobs that run elsewhere.

    profiles/default needs that key for a plain command to work here, and no other profile can take it back; but it
    counts the cores of this machine, and would cut the threads of every cluster job down to them.
    """
    from snakemake.utils import available_cpu_count

    settings = workflow.resource_settings
    if workflow.non_local_exec and workflow.is_main_process and settings.cores == available_cpu_count():
        settings.cores = None
        workflow.global_resources["_cores"] = None
