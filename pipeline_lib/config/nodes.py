"""A node of the DAG: one artifact, known by the fingerprint of what it is made from."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline_lib.config.fingerprint import fingerprint
from pipeline_lib.config.names import slug
from pipeline_lib.config.stages import STAGES

STORE = Path("results/store")
SPECS = Path("results/specs")


@dataclass(frozen=True, eq=False)
class Node:
    """An artifact to be.

    Attributes:
        stage: which stage makes it.
        label: readable name, a function of `settings` alone.
        settings: the semantic settings that the stage reads.
        inputs: upstream nodes by role.
        execution: how to run; never part of the fingerprint.
        fingerprint: SHA-256 (hex) over stage, version, settings and the inputs' fingerprints.
    """

    stage: str
    label: str
    settings: dict[str, Any]
    inputs: dict[str, Node]
    execution: dict[str, Any] = field(default_factory=dict)
    fingerprint: str = ""

    @property
    def id(self) -> str:
        """`<label>-<first 12 digits of the fingerprint>`, the artifact's folder name."""
        return f"{self.label}-{self.fingerprint[:12]}"

    @property
    def path(self) -> str:
        """The artifact's folder."""
        return f"{STORE}/{self.stage}/{self.id}"

    def spec(self) -> dict[str, Any]:
        """What is frozen at results/specs/<stage>/<id>.json and sealed with the artifact."""
        return {
            "stage": self.stage,
            "version": STAGES[self.stage].version,
            "label": self.label,
            "settings": self.settings,
            "inputs": {
                role: {"id": node.id, "stage": node.stage, "fingerprint": node.fingerprint}
                for role, node in self.inputs.items()
            },
            "fingerprint": self.fingerprint,
        }


def make_node(
    stage: str,
    label: str,
    settings: dict[str, Any],
    inputs: dict[str, Node],
    execution: dict[str, Any] | None = None,
) -> Node:
    """A node with its fingerprint.

    Raises:
        UserError: a setting cannot enter a fingerprint.
    """
    mark = fingerprint(
        {
            "stage": stage,
            "version": STAGES[stage].version,
            "settings": settings,
            "inputs": {role: node.fingerprint for role, node in inputs.items()},
        }
    )
    return Node(stage, slug(label), settings, inputs, execution or {}, mark)


def spec_path(stage: str, node_id: str) -> Path:
    """Where a node's spec is frozen."""
    return SPECS / stage / f"{node_id}.json"


def execution_path(stage: str, node_id: str) -> Path:
    """Where a node's execution settings are kept; rewritten by every plan that changes them."""
    return SPECS / stage / f"{node_id}.run.json"
