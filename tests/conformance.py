"""What every recipe on every engine must keep, as one class of tests.

A recipe is tested by `tests/training/test_conformance.py` as soon as it is in the registry; a package that
brings its own derives a class from `Conformance` in its tests.
"""

from __future__ import annotations

import dataclasses
import random
import shutil
import signal

import pytest

from pipeline_lib.artifacts.files import read_json
from pipeline_lib.artifacts.job import Job
from pipeline_lib.config.registry import RECIPES
from pipeline_lib.training.checkpoints import newest_good, step_of
from tests.training_bench import (
    BATCH,
    MODELS,
    SEQ_LEN,
    STEPS,
    Bench,
    Case,
    Sabotage,
    differing,
    flip_a_byte,
    metrics,
    seen,
    weights,
)

KILL_SEED = 20240607
METRICS = {"step", "seconds", "loss", "lr", "grad_norm", "tokens", "tokens_per_s", "peak_rss_mib"}
RESULT = {"steps", "tokens", "parameters", "final_train_loss", "transform_report"}


def cases() -> list[Case]:
    """Every recipe that trains and every variant that it declares, on every family it does not refuse."""
    found = []
    for recipe in RECIPES.names():
        module = RECIPES.load(recipe)
        if module.ENGINE:
            families = [family for family in MODELS if not module.refuses(family, ["bitflip"])]
            variants = ["", *getattr(module, "VARIANTS", {})]
            found += [Case(recipe, family, variant) for family in families for variant in variants]
    return found


class Conformance:
    """Subclass it and give `case` (a parameter or a fixture). `bench` is made once for each case."""

    def test_resumes_after_kills_with_the_same_bytes(self, bench: Bench) -> None:
        """SIGKILL at seeded places, again and again in one work dir: in steps, in writes of any file."""
        counts = bench.counts
        draw = random.Random(f"{KILL_SEED}/{bench.case}")
        late = draw.randrange(counts["batch"] * 2 // 3, counts["batch"])  # after the first checkpoints
        points = [("write", draw.randrange(1, 4)), ("batch", late), ("batch", 1), ("log", 1)]
        points += [("write", draw.randrange(3, 8))]  # in the next checkpoint
        work = bench.fresh("killed")
        codes = [bench.run(work, Sabotage("kill", place, number)) for place, number in points]
        assert codes == [[-signal.SIGKILL]] * len(points), list(zip(points, codes, strict=True))
        assert bench.run(work) == [0]
        bench.same_result(work, bench.reference)
        assert read_json(work / "counts-0.json")["batch"] < counts["batch"], "the last run went on, it did not begin"
        lines = metrics(work)
        assert [line["step"] for line in lines] == list(range(1, STEPS + 1)), "each step once, in order"
        assert [line["loss"] for line in lines] == [line["loss"] for line in metrics(bench.reference)]

    def test_metrics_and_result_have_their_fields(self, bench: Bench) -> None:
        for line in metrics(bench.reference):
            assert set(line) >= METRICS, METRICS - set(line)
            assert all(isinstance(line[name], (int, float)) for name in METRICS), line
        assert metrics(bench.reference)[-1]["tokens"] == STEPS * BATCH * SEQ_LEN
        result = read_json(bench.reference / "out" / "train.json")["result"]
        assert set(result) >= RESULT, RESULT - set(result)
        assert (result["steps"], result["tokens"]) == (STEPS, STEPS * BATCH * SEQ_LEN)
        assert 0 < result["final_train_loss"] < 3 * metrics(bench.reference)[0]["loss"]
        assert result["transform_report"]["layers"], "the faults have sites"

    def test_faults_are_equal_under_recompute(self, bench: Bench) -> None:
        """Activation checkpointing runs each layer's forward pass twice; the faults must be the same both times."""
        work = bench.fresh("recomputed", activation_checkpointing="full")
        assert bench.run(work) == [0]
        bench.same_result(work, bench.reference)

    def test_faults_matter(self, bench: Bench) -> None:
        """Without faults the weights differ, so the equalities of this class are about faults too."""
        work = bench.fresh("plain", transform=[])
        assert bench.run(work) == [0]
        assert weights(work) != weights(bench.reference)

    def test_a_damaged_newest_checkpoint_is_set_aside(self, bench: Bench) -> None:
        work = bench.copied("reference", "damaged")
        newest = newest_good(work / "checkpoints")
        assert newest is not None
        assert step_of(newest) == STEPS
        victim = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
        flip_a_byte(victim)
        assert bench.run(work) == [0]
        bench.same_result(work, bench.reference)
        assert "DAMAGED CHECKPOINT" in (work / "stderr-0.log").read_text()
        assert [path.name for path in work.glob("checkpoints/damaged-*")] == [f"damaged-{newest.name}"]

    def test_a_checkpoint_of_another_training_is_refused(self, bench: Bench) -> None:
        """Never a fresh start over somebody's checkpoints."""
        work = bench.copied("reference", "foreign")
        job = Job.load(work / "job.json")
        dataclasses.replace(job, fingerprint="f" * 64).save(work / "job.json")
        assert bench.run(work) == [2]
        assert "another training" in read_json(work / "failure.json")["message"]

    def test_sigterm_to_one_rank_stops_all_at_one_step(self, bench: Bench) -> None:
        work = bench.fresh("stopped")
        assert bench.run(work, Sabotage("term", "batch", 3, rank=1), world=2) == [75, 75]
        newest = newest_good(work / "checkpoints")
        assert newest is not None
        assert 0 < step_of(newest) < STEPS
        assert (work / "stopped.json").exists()
        shutil.copytree(work, work.with_name("shrunk"))
        assert bench.run(work, world=2) == [0, 0]
        bench.same_result(work, bench.reference_of_two)

    def test_two_ranks_go_on_as_one_and_as_two_again(self, bench: Bench) -> None:
        """2 → 1 → 2 processes: same data, same faults, the same losses but for the order of sums."""
        work = bench.root / "shrunk"
        if not work.exists():
            self.test_sigterm_to_one_rank_stops_all_at_one_step(bench)
        bench.move(work)
        assert bench.run(work, Sabotage("term", "batch", 2)) == [75]
        assert bench.run(work, world=2) == [0, 0]
        for which in ("sequences", "masks"):
            alone, both, mixed = (seen(path, which) for path in (bench.reference, bench.reference_of_two, work))
            assert differing(alone, both) == [], f"{which} of one rank and of two"
            assert differing(alone, mixed) == [], f"{which} of one rank and of two that became one, then two"
            assert len(alone) >= STEPS * BATCH
            assert len(set(alone.values())) == len(alone), f"{which} of no two places are the same"
            assert len({place.split()[1] for place in alone}) == STEPS, f"{which} of every step"
        for one, other in zip(metrics(work), metrics(bench.reference), strict=True):
            assert one["loss"] == pytest.approx(other["loss"], rel=2e-4), one["step"]
            assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=5e-3), one["step"]
