"""What can be asked for: readable targets, and the nodes behind them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline_lib.config.comparisons import comparison
from pipeline_lib.config.errors import UserError, closest, known
from pipeline_lib.config.experiments import Resolved
from pipeline_lib.config.load import load_config, merge
from pipeline_lib.config.nodes import Node, make_node
from pipeline_lib.config.registry import RECIPES
from pipeline_lib.config.resolve import Resolver
from pipeline_lib.config.schema import Config, Experiment, Sweep
from pipeline_lib.config.sweeps import points
from pipeline_lib.config.validate import validate

RESULTS = "results"


class Plan:
    """The configuration as a DAG. Nodes are made when asked for and kept."""

    def __init__(self, config: Config, file: str = "config.yaml") -> None:
        self.config, self.file = config, file
        self.resolver = Resolver(config, file)
        self.nodes: dict[str, Node] = {}
        self._views: dict[str, tuple[Node, str]] = {}

    @staticmethod
    def load(file: str = "config.yaml", overrides: dict[str, Any] | None = None) -> Plan:
        """The plan of a configuration file; everything it lists is checked.

        Raises:
            UserError: the first thing that is wrong.
        """
        plan = Plan(load_config(Path(file), overrides), file)
        for name in plan.config.experiments:
            plan.resolver.checkpoint(plan.resolver.experiments.get(name))
        for name in plan.config.datasets:
            plan.resolver.dataset(name)
        plan._check_what_nothing_uses_yet()
        return plan

    def _check_what_nothing_uses_yet(self) -> None:
        """Check entries that no listed experiment reaches: a mistake must not wait for the first who asks."""
        config = self.config
        for name in config.tokenizers:
            self.resolver.tokenizer(name)
        for name, model in config.models.items():
            for key, value, names in (
                ("tokenizer", model.tokenizer, config.tokenizers),
                ("dataset", model.dataset, config.datasets),
            ):
                if value is not None:
                    known(value, names, f"{key}s", f"{self.file}: models.{name}.{key}")
        for name in config.recipes:
            RECIPES.load(config.recipes[name].get("type", name), f"{self.file}: recipes.{name}")
        for name in config.tasks:
            self.resolver.task(name)
        for name, sweep in config.sweeps.items():
            next(self._points(name, sweep))

    # -- targets ---------------------------------------------------------------------------------------------------

    def targets(self) -> list[str]:
        """What the target `all` makes: every listed experiment's tasks, sweeps, tables and the report."""
        found = [
            f"{RESULTS}/{name}/{task}.{kind}"
            for name in self.config.experiments
            for task in self.resolver.experiments.get(name).tasks
            for kind in ("json", *self._endings(task))
        ]
        found += [
            f"{RESULTS}/sweeps/{name}.{kind}"
            for name, sweep in self._sweeps().items()
            for kind in ("csv", "svg", "png", *self._endings(sweep.task))
        ]
        found += [f"{RESULTS}/tables/{name}.{kind}" for name in self.config.tables for kind in ("csv", "md")]
        found += [f"{RESULTS}/tables/{name}.{kind}" for name in self._comparisons() for kind in ("csv", "md")]
        return [*found, f"{RESULTS}/report.html"] if found else found

    def _endings(self, task: str) -> tuple[str, ...]:
        """Endings of the readable files that a task leaves beside its JSON."""
        return tuple(getattr(self.resolver.task(task)[0], "READABLE", ()))

    def _sweeps(self) -> dict[str, Sweep]:
        """Those that are made without being asked for by name."""
        return {name: sweep for name, sweep in self.config.sweeps.items() if not sweep.on_request}

    def _comparisons(self) -> list[str]:
        """Those that are made without being asked for by name."""
        return [name for name, given in self.config.comparisons.items() if not given.on_request]

    def view(self, target: str) -> tuple[Node, str]:
        """The node behind a readable target, and the file in its artifact.

        Raises:
            UserError: nothing of that name can be made.
        """
        if target not in self._views:
            node, file = self._make(target)
            self._register(node)
            self._views[target] = node, file
        return self._views[target]

    def _make(self, target: str) -> tuple[Node, str]:
        parts = target.removeprefix(f"{RESULTS}/").split("/")
        if target == f"{RESULTS}/report.html":
            return self.report(), "report.html"
        if len(parts) == 2:
            folder, file = parts
            stem, _, kind = file.rpartition(".")
            if folder == "sweeps":
                known(stem, self.config.sweeps, "sweeps", f"target {target}")
                if kind in ("csv", "svg", "png", *self._endings(self.config.sweeps[stem].task)):
                    return self.sweep(stem), f"table.{kind}"
            if folder == "tables" and (kind in ("csv", "md") or (kind == "svg" and stem in self.config.comparisons)):
                return self._table(stem, f"target {target}"), f"table.{kind}"
            if folder == "publish" and kind == "json":
                return self.publish(self.resolver.experiments.get(stem)), "publish.json"
            if file == "timing.json" and "timing" not in self.config.tasks:
                return self.resolver.timing(self.resolver.experiments.get(folder)), file
            if kind == "json" or (stem in self.config.tasks and kind in self._endings(stem)):
                return self.resolver.result(self.resolver.experiments.get(folder), stem), f"result.{kind}"
        raise UserError(
            "nothing of that name can be made",
            where="target",
            value=target,
            allowed="results/<experiment>/<task>.json (and .md, … of tasks that leave records), "
            "results/<experiment>/timing.json, results/sweeps/<sweep>.csv, .svg or .png, "
            "results/tables/<table or comparison>.csv or .md, results/publish/<experiment>.json, results/report.html",
            fix="see `experiments:`, `tasks:`, `sweeps:`, `tables:` and `comparisons:` in config.yaml",
        )

    def _register(self, node: Node) -> None:
        if node.path not in self.nodes:
            self.nodes[node.path] = node
            for upstream in node.inputs.values():
                self._register(upstream)

    def node(self, stage: str, node_id: str) -> Node | None:
        """The registered node of that name, if a target that was asked for needs it."""
        return self.nodes.get(f"results/store/{stage}/{node_id}")

    # -- collections -----------------------------------------------------------------------------------------------

    def sweep(self, name: str) -> Node:
        """The CSV of a sweep; its points are evaluate artifacts of their own."""
        sweep = self.config.sweeps[name]
        columns = list(sweep.grid)
        rows, inputs, clean = [], {}, {}
        for index, (values, exp) in enumerate(self._points(name, sweep)):
            rows.append(values)
            arms = self.resolver.arms(exp, sweep.task)
            inputs[f"{index:05}"] = arms.get("transformed", arms["clean"])
            clean[arms["clean"].path] = arms["clean"]
            if getattr(exp.recipe, "on_divergence", "stop") == "keep":  # its result says whether it diverged
                inputs[f"train-{index:05}"] = self.resolver.train(exp)
        if self._endings(sweep.task) and len(clean) == 1:  # the arm that readable files show beside the points
            inputs["clean"] = next(iter(clean.values()))
        settings: dict[str, Any] = {"columns": columns, "rows": rows, "metrics": None}
        if sweep.metric is not None:
            settings["metric"] = sweep.metric
        execution = self.resolver.execution(self.resolver.experiments.get(sweep.experiment))
        return make_node("sweep", f"{sweep.task}-{len(rows)}", settings, inputs, execution)

    def _points(self, name: str, sweep: Sweep) -> Iterator[tuple[list[Any], Resolved]]:
        where = f"{self.file}: sweeps.{name}"
        base = self.resolver.experiments.get(sweep.experiment)
        entry = self.resolver.experiments.entry(sweep.experiment)
        if sweep.task not in self.config.tasks:
            raise UserError(
                "unknown task",
                where=f"{where}.task",
                value=sweep.task,
                allowed=list(self.config.tasks),
                fix="add it under `tasks:`",
            )
        full = full_settings(base)
        checked: set[str] = set()
        for values, settings in points(sweep.grid, sweep.settings, where):
            over: dict[str, Any] = {}
            for key, value in settings.items():
                if key not in checked:
                    check_axis(key, full, f"{where}.{'grid' if key in sweep.grid else 'settings'}")
                    checked.add(key)
                over = merge(over, nested(key, value))
            yield values, self.resolver.variant(sweep.experiment, with_settings(entry, base, over, where))

    def _table(self, name: str, where: str) -> Node:
        if name in self.config.comparisons:
            return comparison(self.resolver, name)
        return self.table(known(name, [*self.config.tables, *self.config.comparisons], "tables", where))

    def table(self, name: str) -> Node:
        """A table of experiments in rows and columns."""
        table = self.config.tables[name]
        inputs = {}
        for row in table.cells:
            for exp in row:
                inputs[exp] = self.resolver.result(self.resolver.experiments.get(exp), table.task)
        settings = {key: value for key, value in table.semantic().items() if key != "task"}
        return make_node("table", name, settings, inputs)

    def report(self) -> Node:
        """The HTML report over everything that config.yaml lists."""
        inputs: dict[str, Node] = {}
        for name in self.config.experiments:
            exp = self.resolver.experiments.get(name)
            for task in exp.tasks:
                inputs[f"result:{name}:{task}"] = self.resolver.result(exp, task)
            if exp.recipe_module.ENGINE is not None and exp.tasks:
                inputs[f"train:{name}"] = self.resolver.train(exp)
        inputs.update({f"sweep:{name}": self.sweep(name) for name in self._sweeps()})
        inputs.update({f"table:{name}": self.table(name) for name in self.config.tables})
        inputs.update({f"comparison:{name}": comparison(self.resolver, name) for name in self._comparisons()})
        tables = {name: table.semantic() for name, table in self.config.tables.items()}
        return make_node("report", "report", {"title": self.config.report.title, "tables": tables}, inputs)

    def publish(self, exp: Resolved) -> Node:
        """The upload of an experiment's checkpoint and model card."""
        if exp.publish is None:
            raise UserError(
                "publishing is off",
                where=f"{self.resolver.experiments.where(exp.name)}.publish",
                fix="add `publish: owner/name` to the experiment",
            )
        inputs = {"checkpoint": self.resolver.checkpoint(exp)}
        inputs.update({f"result:{task}": self.resolver.result(exp, task) for task in exp.tasks})
        return make_node("publish", exp.publish, {"repo": exp.publish, "experiment": exp.name}, inputs)


def full_settings(exp: Resolved) -> dict[str, Any]:
    """Everything a sweep can vary, as nested plain values."""
    transform = {name: settings.semantic() for name, settings in exp.transform_settings.items()}
    return {
        "transform": transform,
        "recipe": {exp.recipe_name: exp.recipe.semantic()},
        "seed": exp.seed,
        "dataset": exp.dataset,
        "model": exp.model_name,
    }


def check_axis(key: str, full: dict[str, Any], where: str) -> None:
    """Raise a UserError unless the dotted `key` names a setting in `full`."""
    current: Any = full
    for depth, part in enumerate(key.split(".")):
        if not isinstance(current, dict) or part not in current:
            allowed = sorted(current) if isinstance(current, dict) else "nothing below it"
            at = ".".join(key.split(".")[:depth]) or "the experiment"
            raise UserError(
                f"no such setting: '{part}' in {at}",
                where=where,
                value=key,
                allowed=allowed,
                fix=(isinstance(current, dict) and closest(part, current)) or "use one of the above",
            )
        current = current[part]


def nested(key: str, value: Any) -> dict[str, Any]:
    """`a.b.c`, v → {a: {b: {c: v}}}."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def with_settings(entry: Experiment, base: Resolved, over: dict[str, Any], where: str) -> Experiment:
    """`entry` with the settings of one sweep point laid over it."""
    values = entry.model_dump(by_alias=True, exclude_defaults=True)
    for key in ("transform", "recipe"):
        if key in over:
            names = base.transform_settings if key == "transform" else {base.recipe_name: None}
            given = values.get(key)
            listed = given if isinstance(given, dict) else {name: {} for name in names}
            over[key] = merge(listed, over[key])
    return validate(Experiment, {**values, **over}, where)
