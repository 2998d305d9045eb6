"""What the Snakefile needs: inputs, freshness, resources. Only this module and the rules know Snakemake."""

from __future__ import annotations

import inspect
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline_lib.artifacts import store, views
from pipeline_lib.artifacts.files import read_json, write_json
from pipeline_lib.artifacts.locks import is_held, try_hold
from pipeline_lib.artifacts.progress import say
from pipeline_lib.config.comparisons import outline
from pipeline_lib.config.errors import UserError
from pipeline_lib.config.nodes import Node, execution_path, spec_path
from pipeline_lib.config.plan import Plan
from pipeline_lib.stages import allocation, attempts

ORCHESTRATOR = store.RESULTS / ".orchestrator.lock"
HEAL_LIMIT = 3
STARTED = time.time()
TOLD_LIMIT = 20
"""So many failures are told at the end of a run, each with its log and fix."""


def open_plan(file: str, overrides: dict[str, Any], root: Path, main: bool) -> Plan:
    """The plan, for the Snakefile; a mistake in it ends the command with one message and no traceback."""
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    paths = [str(root), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    describe_resources()
    try:
        if main:
            store.set_aside_reported()
            sweep_markers()
        plan = Plan.load(file, overrides)
        for argument in sys.argv[1:]:
            if (
                main
                and argument.startswith("results/")
                and not argument.startswith(("results/store/", "results/logs/"))
            ):
                node, _ = plan.view(argument)
                name = Path(argument).stem
                if node.stage == "table" and name in plan.config.comparisons:
                    say(outline(name, plan.config.comparisons[name]))
    except UserError as error:
        sys.exit(f"errata: {error}")
    return plan


def described(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with its parameters at hand: Snakemake asks for them several times a job, and working them out takes
    longer than all of our planning."""
    from snakemake.common import overwrite_function_params

    overwrite_function_params(function, inspect.signature(function).parameters)  # type: ignore[arg-type]
    return function


def describe_resources() -> None:
    """The same for Snakemake's own `Resource.evaluate`, asked for twice a resource of every job."""
    from snakemake.common import overwrite_function_params
    from snakemake.resources import Resource

    parameters = inspect.signature(Resource("", 0).evaluate).parameters  # of the bound method: without `self`
    overwrite_function_params(Resource.evaluate, parameters)  # type: ignore[arg-type]


def freeze(node: Node) -> None:
    """Write a node's spec (immutable, named by its hash) and its execution settings."""
    path = spec_path(node.stage, node.id)
    if not path.exists() or not path.stat().st_size:  # empty after a power failure
        write_json(path, node.spec(), durable=False)  # thousands a plan; the next one writes it again
    if node.execution:
        beside = execution_path(node.stage, node.id)
        if not beside.exists() or read_json(beside) != node.execution:
            write_json(beside, node.execution, durable=False)


_asked: dict[str, Node | None] = {}
"""Nodes of this DAG by path (None: frozen before). Specs are frozen when a run begins, which `-n` is spared."""


def inputs(plan: Plan, stage: str, node_id: str) -> list[str]:
    """Manifests a stage waits for: the upstream ones that do not exist yet.

    Existing ones are left out on purpose: their time stamps must not decide anything, and `ancient()`
    can end with exit code 0 and the result missing.
    """
    return [manifest for manifest in _upstream(plan, stage, node_id) if not os.path.exists(manifest)]


def _upstream(plan: Plan, stage: str, node_id: str) -> list[str]:
    node = plan.node(stage, node_id)
    _asked[f"{store.STORE}/{stage}/{node_id}"] = node
    if node is None:  # a cluster job, or an artifact that config.yaml no longer holds
        try:
            upstream = read_json(spec_path(stage, node_id))["inputs"].values()
        except FileNotFoundError:
            raise UserError(
                "nothing was planned under that name",
                where=f"{store.STORE}/{stage}/{node_id}",
                fix="ask for a readable target, e.g. results/plain-nano/pydocs.json",
            ) from None
        return [f"{store.STORE}/{entry['stage']}/{entry['id']}/{store.MANIFEST}" for entry in upstream]
    if stage == "sweep":
        return _sweep_upstream(node)
    return [f"{upstream.path}/{store.MANIFEST}" for upstream in node.inputs.values()]


def _sweep_upstream(node: Node) -> list[str]:
    """Cells that share a checkpoint are evaluated by the sweep itself, in one process; others are jobs of their own."""
    cells: dict[str, list[Node]] = {}
    needed: dict[str, None] = {}
    for input in node.inputs.values():
        if input.stage == "evaluate":
            cells.setdefault(input.inputs["checkpoint"].path, []).append(input)
        else:
            needed[f"{input.path}/{store.MANIFEST}"] = None
    for group in cells.values():
        unique = {cell.path: cell for cell in group}
        for cell in unique.values():
            if len(unique) == 1:
                needed[f"{cell.path}/{store.MANIFEST}"] = None
                continue
            _asked[cell.path] = cell
            if not os.path.exists(f"{cell.path}/{store.MANIFEST}"):
                upstream = [node for node in cell.inputs.values() if node.path not in unique]
                needed.update({f"{node.path}/{store.MANIFEST}": None for node in upstream})
    return list(needed)


def view_inputs(plan: Plan, view: str) -> list[str]:
    """What a readable result waits for: nothing when it is fresh.

    A missing input alone is no reason for Snakemake to run a rule whose output exists: so a stale result
    gets its spec, which does exist, as an input and an old time stamp.
    """
    node, file = plan.view(view)
    if views.is_fresh(Path(view), Path(node.path) / file):
        return []
    freeze(node)  # now, since it is an input
    views.make_stale(Path(view))
    return [f"{node.path}/{store.MANIFEST}", str(spec_path(node.stage, node.id))]


def view_source(plan: Plan, view: str) -> str:
    """The published file behind a readable result."""
    node, file = plan.view(view)
    return f"{node.path}/{file}"


def tell_left_behind() -> None:
    """Say what becomes of jobs that an earlier run submitted."""
    for job in allocation.left_behind():
        at = f"{'+'.join(sorted(job.stages))} {job.id or '(a group)'}"
        what = f"this run does not need it: `scancel {job.job}` ends it"
        if any(_needs(stage, job.id) for stage in job.stages):
            what = "what this run submits for it waits for its end and adopts its work"
        say(f"Slurm job {job.job} ({job.state}) of an earlier run is at {at}; {what}")


def _needs(stage: str, node_id: str | None) -> bool:
    """Whether this run asks for an artifact, or where none is named, for any of that stage."""
    folder = f"{store.STORE}/{stage}/"
    return f"{folder}{node_id}" in _asked if node_id else any(path.startswith(folder) for path in _asked)


def sweep_markers() -> None:
    """Remove the 'incomplete' markers of killed runs, unless their orchestrator lives.

    Our outputs appear by rename and are never incomplete; but `--report` refuses to run beside a marker.
    """
    if not is_held(ORCHESTRATOR):
        shutil.rmtree(".snakemake/incomplete", ignore_errors=True)


def begin(workflow: Any) -> None:
    """At the start of a run: one orchestrator a results/ directory, and every spec frozen."""
    holder = try_hold(ORCHESTRATOR)
    if holder is not None:
        sys.exit(
            f"errata: another snakemake ({holder}) works in this results/; wait for it, then give the same command"
        )
    for node in filter(None, _asked.values()):
        freeze(node)
    if allocation.submits(workflow):
        tell_left_behind()


def tell_failures(workflow: Any) -> None:
    """At the end of a failed run: what failed, where its log is, and what to do."""
    told = attempts.failures(STARTED)
    if allocation.submits(workflow) and not store.requested():
        told += [attempts.never_begun(*node) for node in _never_begun(workflow)]
    for paragraph in told[:TOLD_LIMIT]:
        say(paragraph)
    if len(told) > TOLD_LIMIT:
        say(f"and {len(told) - TOLD_LIMIT} more")


def _never_begun(workflow: Any) -> list[tuple[str, str]]:
    """(stage, id) of what could be made, since all that it needs is there, and of which no stage said a word."""
    found = []
    for job in workflow.dag.needrun_jobs():
        if job.is_local or not all(os.path.exists(path) for path in job.input):
            continue
        artifact = store.STORE / job.rule.name / job.wildcards.id
        begun = attempts.has_begun(store.work_directory(artifact), STARTED) or is_held(store.lock_file(artifact))
        if not begun and not (artifact / store.MANIFEST).exists():
            found.append((job.rule.name, job.wildcards.id))
    return found


def plan_again_if_damage_was_reported() -> None:
    """At the end of a failed run: if readers found damaged artifacts, start again so that they are remade."""
    healed = int(os.environ.get("ERRATA_HEAL", "0"))
    if healed < HEAL_LIMIT and store.requested():
        say("damaged artifacts were reported; planning again to remake them")
        os.environ["ERRATA_HEAL"] = str(healed + 1)
        os.execv(sys.executable, [sys.executable, "-m", "snakemake", *sys.argv[1:]])
