"""train, convert and evaluate reach for no network; the assets stage does, and is stopped by the same hook."""

from __future__ import annotations

import contextlib
import copy
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline_lib.config.plan import Plan
from pipeline_lib.config.stages import STAGES
from pipeline_lib.stages.wiring import freeze
from tests.workflow.clone import Clone
from tests.workflow.conftest import CONFIG, TARGETS

# Loaded by every Python below it: no connection or datagram to any Internet address, loopback included, and no name
# look-up. Each attempt is noted before it is refused, so that code which tries and goes on is found too.
HOOK = """
import os, socket, sys

def _refuse(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        outside = getattr(arguments[0], "family", None) in (socket.AF_INET, socket.AF_INET6)
    else:
        outside = event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr")
    if outside:
        with open(os.environ["ERRATA_TEST_ATTEMPTS"], "a") as file:
            file.write(f"{event} {arguments!r}\\n")
        raise PermissionError(f"a test blocks the network: {event} {arguments!r}")

sys.addaudithook(_refuse)
"""


class Blocked:
    """A clone whose stages run behind the hook."""

    def __init__(self, clone: Clone, folder: Path) -> None:
        self.clone, self.log = clone, folder / "attempts"
        hook = folder / "hook"
        hook.mkdir()
        (hook / "sitecustomize.py").write_text(HOOK)
        extra = {"PYTHONPATH": str(hook), "ERRATA_TEST_ATTEMPTS": str(self.log)}
        self.environment = clone.environment(extra)
        for name in ("HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_TOKEN"):
            self.environment.pop(name, None)

    def stage(self, manifest: str) -> subprocess.CompletedProcess[str]:
        """Run a stage as its rule does."""
        return self.python("-m", "pipeline_lib", "stage", manifest)

    def python(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run Python in the clone."""
        command = [sys.executable, *arguments]
        return subprocess.run(
            command, cwd=self.clone.root, env=self.environment, capture_output=True, text=True, timeout=300
        )

    def until_an_attempt(self, manifest: str) -> int | None:
        """Run a stage until it reaches for the network (it would try again for half a minute); its exit code."""
        command = [sys.executable, "-m", "pipeline_lib", "stage", manifest]
        with open(self.log.with_name("stderr"), "w") as stderr:
            process = subprocess.Popen(command, cwd=self.clone.root, env=self.environment, stderr=stderr)
        deadline = time.monotonic() + 120
        while not self.attempts() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        code = process.poll()
        process.kill()
        process.wait()
        return code

    def attempts(self) -> list[str]:
        """What was tried so far."""
        return self.log.read_text().splitlines() if self.log.exists() else []


@pytest.fixture
def blocked(copied: Clone, tmp_path: Path) -> Blocked:
    return Blocked(copied, tmp_path)


def test_the_hook_blocks(blocked: Blocked) -> None:
    """Connections and look-ups, of the standard library and of the hub's client alike."""
    tries = (
        "import socket; socket.create_connection(('127.0.0.1', 9))",
        "import socket; socket.getaddrinfo('huggingface.co', 443)",
        "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'', ('192.0.2.1', 53))",
        "import huggingface_hub; huggingface_hub.HfApi().model_info('a/b')",
    )
    for count, code in enumerate(tries, start=1):
        done = blocked.python("-c", code)
        assert done.returncode != 0
        assert "a test blocks the network" in done.stderr
        assert len(blocked.attempts()) >= count


OFFLINE = ("tokenizer", "tokens", "train", "convert", "evaluate", "result")
LEARNING = ("teacher", "clip")  # in the order of the DAG


@pytest.mark.slow
@pytest.mark.parametrize("stage", OFFLINE)
def test_stage_uses_no_network(stage: str, blocked: Blocked) -> None:
    """Its artifact (of the experiment with faults, where there are several) is made again behind the hook."""
    store = blocked.clone.root / "results" / "store" / stage
    before = {path.name for path in store.iterdir()}
    name = sorted(before, key=lambda name: "bitflip" not in name)[0]
    shutil.rmtree(store / name)
    done = blocked.stage(f"results/store/{stage}/{name}/manifest.json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert blocked.attempts() == []
    assert {path.name for path in store.iterdir()} == before
    assert "adopted" not in done.stderr


@pytest.mark.slow
def test_cells_of_a_sweep_use_no_network(blocked: Blocked) -> None:
    store = blocked.clone.root / "results" / "store"
    [name] = [path.name for path in (store / "sweep").iterdir()]
    for folder in ("sweep", "evaluate"):
        shutil.rmtree(store / folder)
    done = blocked.stage(f"results/store/sweep/{name}/manifest.json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert blocked.attempts() == []
    assert (store / "sweep" / name / "table.csv").exists()


@pytest.mark.slow
def test_teacher_and_clip_use_no_network(blocked: Blocked) -> None:
    """Those of a student that is added to the configuration."""
    changed = copy.deepcopy(CONFIG)
    data = {"n": 8, "max_new_tokens": 4, "prompts": [{"prefix_chars": 20, "min_chars": 40}]}
    changed["transforms"]["int2"] = {}
    changed["experiments"]["student"] = {
        "from": "plain-tiny",
        "teacher": "plain-tiny",
        "transform": {"int2": {"group_size": 32, "clip": {}}},
        "recipe": {"distill": {"steps": 2, "global_batch": 4, "seq_len": 16, "data": data}},
    }
    blocked.clone.write_config(changed)
    with contextlib.chdir(blocked.clone.root):
        plan = Plan.load()
        plan.view("results/student/words.json")
        nodes = {stage: node for stage in LEARNING for node in plan.nodes.values() if node.stage == stage}
        for node in nodes.values():
            freeze(node)
    for stage, node in nodes.items():
        done = blocked.stage(f"results/store/{stage}/{node.id}/manifest.json")
        assert done.returncode == 0, done.stdout + done.stderr
    assert blocked.attempts() == []


@pytest.mark.slow
def test_score_uses_no_network(blocked: Blocked) -> None:
    """Losses of another dataset's sequences under a model that is there."""
    changed = copy.deepcopy(CONFIG)
    changed["datasets"]["more"] = {**changed["datasets"]["words"], "seed": 1}
    changed["experiments"]["judge"] = {"from": "plain-tiny", "recipe": "none"}
    methods = [{"rho-loss": {"mega_batch": 8}}]
    recipe = {"cram": {"steps": 2, "global_batch": 4, "seq_len": 16, "methods": methods}}
    changed["experiments"]["chooser"] = {"model": "tiny", "dataset": "more", "losses": "judge", "recipe": recipe}
    blocked.clone.write_config(changed)
    with contextlib.chdir(blocked.clone.root):
        resolver = Plan.load().resolver
        score = resolver.train(resolver.experiments.get("chooser")).inputs["losses"]
        nodes = [score.inputs["tokens"].inputs["dataset"], score.inputs["tokens"], score]
        for node in nodes:
            freeze(node)
    for node in nodes:
        done = blocked.stage(f"results/store/{node.stage}/{node.id}/manifest.json")
        assert done.returncode == 0, done.stdout + done.stderr
    assert blocked.attempts() == []


@pytest.mark.slow
def test_timing_uses_no_network(blocked: Blocked) -> None:
    """Of a training whose budget is in this machine's own times."""
    changed = copy.deepcopy(CONFIG)
    recipe = {"cram": {"budget": {"rst_hours": 1e-6, "reference": "measured"}, "global_batch": 4, "seq_len": 16}}
    changed["experiments"]["timed"] = {"model": "tiny", "recipe": recipe}
    blocked.clone.write_config(changed)
    with contextlib.chdir(blocked.clone.root):
        resolver = Plan.load().resolver
        node = resolver.train(resolver.experiments.get("timed")).inputs["timing"]
        freeze(node)
    path = f"results/store/timing/{node.id}/manifest.json"
    code = (
        "import sys, pathlib; from pipeline_lib.training import timing; timing.SECONDS = 2.0\n"
        "from pipeline_lib.stages.runner import run_stage; sys.exit(run_stage(pathlib.Path(sys.argv[1])))"
    )
    done = blocked.python("-c", code, path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert blocked.attempts() == []
    assert (blocked.clone.root / path).exists()


def test_every_stage_that_declares_no_network_was_run() -> None:
    """A stage that is built later has to be added here (or be declared to use the network)."""
    offline = {name for name, stage in STAGES.items() if not stage.network}
    assert offline == {*OFFLINE, *LEARNING, "timing", "score", "sweep", "table", "report"}, (
        "table and report only read JSON and CSV"
    )


@pytest.mark.parametrize("kind", ["assets", "dataset"])
def test_assets_and_dataset_would_have_hit_it(kind: str, blocked: Blocked) -> None:
    """The same hook stops the stages that fetch."""
    changed = copy.deepcopy(CONFIG)
    changed["models"]["hubbed"] = {"hub": {"repo": "errata-tests/nowhere"}}
    changed["datasets"]["far"] = {"source": {"type": "hub", "repo": "errata-tests/nowhere"}}
    changed["experiments"]["far"] = {"model": "tiny", "dataset": "far"}
    blocked.clone.write_config(changed)
    target = "results/plain-hubbed/words.json" if kind == "assets" else "results/far/words.json"
    with contextlib.chdir(blocked.clone.root):
        plan = Plan.load()
        plan.view(target)
        [node] = [node for node in plan.nodes.values() if node.stage == kind and "nowhere" in node.id]
        freeze(node)
    name = node.id
    before = set((blocked.clone.root / "results" / "store").glob("*/*"))
    assert blocked.until_an_attempt(f"results/store/{kind}/{name}/manifest.json") is None
    assert "huggingface.co" in blocked.attempts()[0]
    assert set((blocked.clone.root / "results" / "store").glob("*/*")) == before


def test_targets_are_fresh_behind_the_hook(blocked: Blocked) -> None:
    """Planning asks nobody either."""
    done = blocked.python("-m", "pipeline_lib", "plan", *TARGETS)
    assert done.returncode == 0, done.stderr
    assert "0 stages to make" in done.stdout
    assert blocked.attempts() == []
