"""What a transform adds to a model is initialised, trained, checkpointed and exported with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline_lib.artifacts.job import Job
from pipeline_lib.config.errors import Stopped
from pipeline_lib.config.registry import TRANSFORMS
from pipeline_lib.models.checkpoint import load_model, load_transform
from pipeline_lib.models.initial import initial_weight
from pipeline_lib.stages import convert
from pipeline_lib.training.titan.run import run
from tests.training.titan import gain
from tests.training.titan.jobs import again, make_job, result
from tests.training.titan.test_convert import convert_job

GAIN = [{"type": "gain"}]


@pytest.fixture(scope="module")
def trained(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Job:
    TRANSFORMS.register("gain", gain.__name__)
    job = make_job(tmp_path_factory.mktemp("gain"), inputs, GAIN)
    run(job)
    return job


def test_state_is_prepared_trained_and_exported_apart_from_the_weights(trained: Job) -> None:
    _, state = load_transform(trained.out)
    assert len(state) == 2 * 2 * 3
    assert not set(state) & set(load_file(trained.out / "model.safetensors"))
    for name, value in state.items():
        module, _, rest = name.partition(".transform.")
        if rest.endswith("gain"):
            assert value.isfinite().all()
            assert value.item() != 1.5
        else:
            shape = (32, 48) if "down_proj" in module else (48, 32)
            assert value == initial_weight(f"{module}.weight", shape, 32, seed=3).abs().max()


def test_weights_alone_count_as_the_model(trained: Job) -> None:
    weights = load_file(trained.out / "model.safetensors")
    assert result(trained)["parameters"] == sum(value.numel() for value in weights.values())


def test_state_is_part_of_checkpoints(trained: Job, inputs: dict[str, Path], tmp_path: Path) -> None:
    job = make_job(tmp_path, inputs, GAIN, time_limit_s=0.0)
    with pytest.raises(Stopped):
        run(job)
    finished = again(job, time_limit_s=None)
    run(finished)
    for name in ("model.safetensors", "transform.safetensors"):
        assert (finished.out / name).read_bytes() == (trained.out / name).read_bytes()


def test_conversion_keeps_it_beside_a_plain_checkpoint(trained: Job, tmp_path: Path) -> None:
    job = convert_job(trained, tmp_path / "out")
    convert.run(job)
    settings, state = load_transform(job.out)
    assert settings == GAIN
    expected = load_transform(trained.out)[1]
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)
    assert not any("transform" in name for name in load_model(job.out).state_dict())
