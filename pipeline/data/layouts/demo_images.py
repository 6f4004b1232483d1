"""Ultrasound-like images drawn from a seed: speckled tissue, bright structures, and one dark lesion whose shape counts.

The class is the contour alone: round, lobed (bulges with sharp notches between them) or spiked. Position, area, aspect,
contrast, edge, tissue, gain and the bright structures around the lesion are drawn before the class is looked at, from
the same distributions for every class, and the bright structures have contours of all three kinds: whoever knows where
the lesion is knows which contour to read. All lengths are fractions of the image's side, so a scene is the same at
every size but for the grain of its speckle.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.errors import ConfigError
from pipeline.progress import Progress, silent

CLASS_NAMES = ("lobed", "round", "spiked")  # in the order of their names, as a table numbers them
VERSION = 1  # of the drawing: other pixels, other number
_ANGLES = np.linspace(0, 2 * np.pi, 721)
_REACH = 1.6  # largest radius of any contour of area pi: what keeps a lesion inside the image, whatever its class

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Difficulty:
    """How hard the shape is to see.

    Attributes:
        shape: Depth of notches and spikes, as a share of the radius.
        contrast: Range of the lesion's echo below that of the tissue around it, in dB.
        speckle: Strength of the speckle; 1 is fully developed, 0 is none.
        structures: Smallest and largest number of bright structures around the lesion.
        radius: Smallest and largest radius of the disc of the lesion's area, as a share of the side.

    Raises:
        ConfigError: A range does not begin with its smaller end.
    """

    shape: float = 0.40
    contrast: tuple[float, float] = (6.0, 17.0)
    speckle: float = 0.33
    structures: tuple[int, int] = (1, 3)
    radius: tuple[float, float] = (0.13, 0.20)

    def __post_init__(self) -> None:
        for name in ("contrast", "structures", "radius"):
            low, high = getattr(self, name)
            if low > high:
                message = f"data.difficulty.{name}: got {[low, high]!r}; the smaller number comes first"
                raise ConfigError(message)


STANDARD = Difficulty()


def demo_arrays(
    count: int, size_px: int, seed: int, *, difficulty: Difficulty = STANDARD, progress: Progress = silent
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
    """Draw images in memory.

    Args:
        count: Number of images; the first n of a longer series are the same n.
        size_px: Side of the square images.
        seed: Another seed, other patients.
        difficulty: How hard the shape is to see.
        progress: Called after each image.

    Returns:
        Images uint8 (n, S, S), lesion masks bool (n, S, S), labels int64 (n,).
    """
    images, objects = demo_objects(count, size_px, seed, difficulty=difficulty, progress=progress)
    return images, objects[:, 0], np.array([label for label, _, _ in roll(count, seed)], np.int64)


def demo_objects(
    count: int, size_px: int, seed: int, *, difficulty: Difficulty = STANDARD, progress: Progress = silent
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]:
    """Draw the images of `demo_arrays`, which has the arguments, with a mask of every object for a miniature SAM.

    Returns:
        Images uint8 (n, S, S), and masks bool (n, 1 + k, S, S): the lesion, then up to k bright structures, which may
        lie over each other; masks beyond an image's last structure are empty.
    """
    images = np.empty((count, size_px, size_px), np.uint8)
    objects = np.zeros((count, 1 + difficulty.structures[1], size_px, size_px), bool)
    for i, (label, patient, visit) in enumerate(roll(count, seed)):
        images[i], objects[i, 0], structures = draw(label, patient, visit, size_px, seed, difficulty)
        objects[i, 1 : 1 + len(structures)] = structures
        progress("draw", i + 1, count)
    return images, objects


def roll(count: int, seed: int) -> list[tuple[int, int, int]]:
    """Label, patient and visit of every image: 1 to 3 visits a patient, all of one class, classes in equal numbers."""
    rng = np.random.default_rng([seed, 0])
    rows: list[tuple[int, int, int]] = []
    drawn = [0] * len(CLASS_NAMES)
    patient = 0
    while len(rows) < count:
        label = min(range(len(drawn)), key=drawn.__getitem__)
        visits = int(rng.integers(1, 4))
        rows += [(label, patient, visit) for visit in range(visits)]
        drawn[label] += visits
        patient += 1
    return rows[:count]


def draw(
    label: int, patient: int, visit: int, size_px: int, seed: int, difficulty: Difficulty
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Draw one image; a patient's visits share their tissue and differ in everything about the lesion.

    Args:
        label: Number of the lesion's class.
        patient: Number of the patient.
        visit: Number of the patient's image.
        size_px: Side of the image.
        seed: Of the series.
        difficulty: How hard the shape is to see.

    Returns:
        Grey pixels uint8 (S, S), the lesion's mask bool (S, S), and those of its bright structures bool (k, S, S).
    """
    of_patient = np.random.default_rng([seed, 1, patient])
    rng = np.random.default_rng([seed, 2, patient, visit])
    axis = (np.arange(size_px) + 0.5) / size_px
    y, x = axis[:, None], axis[None, :]
    echo_db = _tissue(of_patient, rng, y, x)
    grain = of_patient.uniform(0.006, 0.010) * size_px
    radius, aspect = rng.uniform(*difficulty.radius), rng.uniform(1.0, 1.3)
    margin = min(_REACH * radius * np.sqrt(aspect), 0.5)
    centre = rng.uniform(margin, 1 - margin, 2)
    contrast, edge = rng.uniform(*difficulty.contrast), rng.uniform(0.006, 0.014)
    structures = np.zeros((0, size_px, size_px), bool)
    for level in rng.uniform(3.0, 9.0, rng.integers(difficulty.structures[0], difficulty.structures[1] + 1)):
        size, stretch, place = rng.uniform(0.04, 0.11), rng.uniform(1.0, 1.6), rng.uniform(0.02, 0.98, 2)
        contour = _contour(rng, int(rng.integers(len(CLASS_NAMES))), difficulty.shape)
        if np.hypot(*(place - centre)) > margin + 1.3 * size:
            inside = _depth(rng, y, x, place, size, stretch, contour)
            echo_db += level * _soft(inside, edge)
            structures = np.concatenate([structures, inside[None] > 0])
    depth = _depth(rng, y, x, centre, radius, aspect, _contour(rng, label, difficulty.shape))
    echo_db -= contrast * _soft(depth, edge)
    speckle_db = 20 * np.log10(_speckle(rng, size_px, grain) + 1e-3)
    brightness = 128 + 255 / 50 * (echo_db + difficulty.speckle * speckle_db)  # a dynamic range of 50 dB
    return np.rint(brightness.clip(0, 255)).astype(np.uint8), depth > 0, structures


def _tissue(of_patient: np.random.Generator, rng: np.random.Generator, y: Floats, x: Floats) -> Floats:
    """Echo of the tissue in dB (S, S): gain, loss with depth, and layers; a visit only shifts it a little."""
    gain, loss = of_patient.uniform(-3, 3), of_patient.uniform(0, 6)
    echo = gain - loss * (y - 0.5) + np.zeros_like(x)
    for _ in range(5):
        level, slope = of_patient.uniform(0.5, 2.0), of_patient.uniform(-3, 3)
        waves, phase = of_patient.uniform(1, 5), of_patient.uniform(0, 2 * np.pi)
        echo += level * np.sin(2 * np.pi * (waves * y + slope * x) + phase + rng.normal(0, 0.5))
    return echo


def _contour(rng: np.random.Generator, label: int, shape: float) -> Floats:
    """Radius of a contour at `_ANGLES`, scaled so that every contour has the area of the unit disc.

    The numbers drawn are the same for every class: irregularity, turn, and a number of lobes or spikes.
    """
    turn, lobes, spikes = rng.uniform(0, 2 * np.pi), int(rng.integers(4, 7)), int(rng.integers(7, 10))
    size = rng.uniform(0.75, 1.25)
    uneven = np.zeros_like(_ANGLES)
    for waves in (2, 3):
        uneven += rng.normal(0, 0.05) * np.cos(waves * _ANGLES + rng.uniform(0, 2 * np.pi))
    bulges = np.abs(np.cos(lobes * (_ANGLES - turn) / 2)) - 2 / np.pi
    points = (1 - np.abs(np.sin(spikes * (_ANGLES - turn) / 2))) ** 2 - (1.5 - 4 / np.pi)
    radius = 1 + uneven + shape * size * (bulges, 0.0, points)[label]
    area = np.sum(radius[:-1] ** 2) / 2 * (_ANGLES[1] - _ANGLES[0])
    return np.asarray(radius * np.sqrt(np.pi / area), np.float64)


def _depth(
    rng: np.random.Generator, y: Floats, x: Floats, centre: Floats, radius: float, aspect: float, contour: Floats
) -> Floats:
    """How far inside a turned and stretched contour each pixel lies (S, S), in sides; negative outside."""
    turn = rng.uniform(0, 2 * np.pi)
    dy, dx = y - centre[0], x - centre[1]
    u = (np.cos(turn) * dx + np.sin(turn) * dy) / np.sqrt(aspect)
    v = (np.cos(turn) * dy - np.sin(turn) * dx) * np.sqrt(aspect)
    edge = radius * np.interp(np.arctan2(v, u) % (2 * np.pi), _ANGLES, contour)
    return np.asarray(edge - np.hypot(u, v), np.float64)


def _soft(depth: Floats, edge: float) -> Floats:
    """1 inside, 0 outside, and a slope as wide as `edge` between."""
    return np.asarray(1 / (1 + np.exp(-np.clip(4 * depth / edge, -30, 30))), np.float64)


def _speckle(rng: np.random.Generator, size_px: int, grain_px: float) -> Floats:
    """Fully developed speckle: modulus of filtered complex noise (Rayleigh), scaled to a mean square of 1, (S, S)."""
    fy, fx = np.fft.fftfreq(size_px)[:, None], np.fft.fftfreq(size_px)[None, :]
    spread = np.exp(-2 * (np.pi * grain_px) ** 2 * ((1.6 * fx) ** 2 + fy**2))  # coarser across the beam than along it
    noise = rng.standard_normal((2, size_px, size_px))
    field = np.abs(np.fft.ifft2(np.fft.fft2(noise[0] + 1j * noise[1]) * spread))
    return np.asarray(field / np.sqrt(np.mean(field**2)), np.float64)
