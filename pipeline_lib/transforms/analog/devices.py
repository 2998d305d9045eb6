"""Phase-change memory devices: what programming, drift and reading make of a conductance.

The statistics are those that Nandakumar et al. ("Phase-change memory models for deep learning training and inference",
ICECS 2019) and Joshi et al. ("Accurate deep neural network inference using computational phase-change memory", Nature
Communications 2020) fitted to a million devices, with the constants that IBM's aihwkit documents as its
`PCMLikeNoiseModel`. g is a conductance as a share of the largest, 25 µS.
"""

from __future__ import annotations

import math

from torch import Tensor

from pipeline_lib.transforms.analog.settings import Settings
from pipeline_lib.transforms.base import Draw, Fault
from pipeline_lib.transforms.draws import normals

MAX_CONDUCTANCE = 25.0  # µS
PROGRAMMING = (0.26348, 1.9650, -1.1731)  # µS: constant, linear and quadratic in g
FIRST_READING = 20.0  # s after programming: when drift begins to count
READ_TIME = 250e-9  # s
SMALLEST = 1e-7  # below it log g is that of this


def programming_deviation(g: Tensor) -> Tensor:
    """σ of the programmed conductance about its target g: (0.26348 + 1.965 g − 1.1731 g²) µS, as a share of 25 µS."""
    constant, linear, quadratic = PROGRAMMING
    return (constant + linear * g + quadratic * g * g).clamp(min=0) / MAX_CONDUCTANCE


def drift_mean(g: Tensor) -> Tensor:
    """Mean drift exponent of devices of target g: −0.0155 ln g + 0.0244, within 0.049 and 0.1."""
    return (-0.0155 * g.clamp(min=SMALLEST).log() + 0.0244).clamp(0.049, 0.1)


def drift_deviation(g: Tensor) -> Tensor:
    """σ of the drift exponent of devices of target g: −0.0125 ln g − 0.0059, within 0.008 and 0.045."""
    return (-0.0125 * g.clamp(min=SMALLEST).log() - 0.0059).clamp(0.008, 0.045)


def read_deviation(g: Tensor, time: float) -> Tensor:
    """σ of a reading of programmed conductance g, as a share of what is read: 1/f noise accumulated over `time`.

    min(0.0088 g^−0.65, 0.2) · √ln((t + t_read) / (2 t_read)), with t counted from programming.
    """
    spread = (0.0088 * g.clamp(min=SMALLEST) ** -0.65).clamp(max=0.2)
    return spread * math.sqrt(math.log((time + FIRST_READING + READ_TIME) / (2 * READ_TIME)))


def elapsed(settings: Settings) -> float:
    """(t / 20 s): what is raised to minus the drift exponent."""
    return (settings.time + FIRST_READING) / FIRST_READING


class Devices(Fault):
    """Conductances as they are read: programmed once a chip, drifted since, disturbed anew at each step."""

    roles = frozenset({"weight"})

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        fixed = settings.programming_noise > 0 or (settings.drift > 0 and settings.time > 0)
        self.chip_seed = settings.chip_seed if fixed else None

    def __call__(self, tensor: Tensor, role: str, draw: Draw) -> Tensor:
        """[1, out, in] targets in [0, 1] → what is read, at least 0. The gradient goes straight through."""
        return tensor + (self._read(tensor.detach(), draw) - tensor).detach()

    def _read(self, target: Tensor, draw: Draw) -> Tensor:
        settings = self.settings
        found = programmed = target
        if draw.chip is not None:
            missed, exponent = normals(draw._replace(key=draw.chip), target.shape)
            missed = settings.programming_noise * programming_deviation(target) * missed
            found = programmed = (target + missed).clamp(min=0)
            if settings.time > 0:
                nu = settings.drift * (drift_mean(target) + drift_deviation(target) * exponent).abs()
                found = programmed * elapsed(settings) ** -nu
        if settings.read_noise > 0:
            noise, _ = normals(draw, target.shape)
            found = found * (1 + settings.read_noise * read_deviation(programmed, settings.time) * noise)
        return found.clamp(min=0)
