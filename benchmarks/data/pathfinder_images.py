"""Images for Pathfinder: two long dashed paths, shorter ones beside them, and two circles."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Points = NDArray[np.float64]
STEP_TRIES = 12
PATH_TRIES = 60
SCENE_TRIES = 200


@dataclass(frozen=True)
class Scene:
    """What an image looks like; lengths in pixels.

    Both kinds of image hold two long paths and two circles at ends of long paths, so that nothing
    but the connection tells them apart.

    Attributes:
        size: Along an edge.
        dashes: Of a long path.
        distractors: Number of short paths.
        dash: Length of a dash.
        gap: Between two dashes of a path.
        clearance: Between two paths, at least.
        bend: Largest change of direction from dash to dash, in radians.
        thickness: Of a dash.
        radius: Of a circle.
    """

    size: int = 16
    dashes: int = 4
    distractors: int = 2
    dash: float = 1.6
    gap: float = 1.0
    clearance: float = 2.2
    bend: float = 0.6
    thickness: float = 0.8
    radius: float = 1.2

    def __post_init__(self) -> None:
        if self.size < 8 or self.dashes < 2 or self.distractors < 0:
            raise ValueError(
                "expected at least 8 pixels, 2 dashes and no fewer than 0 distractors, got "
                f"size={self.size}, dashes={self.dashes}, distractors={self.distractors}"
            )

    @property
    def short_dashes(self) -> int:
        """A distractor has a third of a long path's dashes."""
        return max(1, self.dashes // 3)


def draw_images(scene: Scene, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw `size` images, every second one with joined circles.

    Args:
        scene: What an image looks like.
        size: Number of images.
        seed: Fixes all of them.

    Returns:
        Grey values (size, scene.size ** 2), uint8, and classes (size,): 1 where the circles lie at
        the two ends of one path, 0 where they lie on two.

    Raises:
        ValueError: The scene's paths find no room in the image.

    Source:
        Linsley et al. (2018), arXiv 1805.08315, section 3.

    Example:
        >>> images, classes = draw_images(Scene(size=16), 2, seed=0)
        >>> images.shape, classes.tolist()
        (torch.Size([2, 256]), [0, 1])
    """
    chance = np.random.default_rng(seed)
    classes = torch.arange(size) % 2
    images = [_render(scene, *_arrange(scene, bool(joined), chance)) for joined in classes]
    return torch.from_numpy(np.stack(images)), classes


def _arrange(
    scene: Scene, joined: bool, chance: np.random.Generator
) -> tuple[list[Points], Points]:
    """Paths, as corners (2 * dashes, 2), and the two circles' centres."""
    for _ in range(SCENE_TRIES):
        paths = _place_paths(scene, chance)
        if paths is not None:
            first, second = paths[0], paths[1]
            other = first[-1] if joined else second[chance.integers(2) - 1]
            return paths, np.stack([first[0], other])
    raise ValueError(
        f"two paths of {scene.dashes} dashes and {scene.distractors} of {scene.short_dashes} find "
        f"no room in {scene.size} x {scene.size} pixels: take a larger image, fewer distractors or "
        "shorter paths"
    )


def _place_paths(scene: Scene, chance: np.random.Generator) -> list[Points] | None:
    paths: list[Points] = []
    for dashes in [scene.dashes] * 2 + [scene.short_dashes] * scene.distractors:
        taken = np.concatenate([np.empty((0, 2)), *map(_along, paths)])
        for _ in range(PATH_TRIES):
            path = _walk(scene, dashes, taken, chance)
            if path is not None:
                paths.append(path)
                break
        else:
            return None
    return paths


def _walk(scene: Scene, dashes: int, taken: Points, chance: np.random.Generator) -> Points | None:
    """Corners of one path that bends gently, stays inside and keeps clear of what is there."""
    position = chance.uniform(scene.radius, scene.size - scene.radius, 2)
    direction = chance.uniform(0, 2 * np.pi)
    corners: list[Points] = []
    for _ in range(dashes):
        for _ in range(STEP_TRIES):
            angle = direction + chance.uniform(-scene.bend, scene.bend)
            ahead = np.array([np.cos(angle), np.sin(angle)])
            dash = np.stack([position, position + scene.dash * ahead])
            if _is_free(scene, dash, taken, corners):
                break
        else:
            return None
        corners += list(dash)
        position = dash[1] + scene.gap * ahead
        direction = angle
    return np.stack(corners)


def _is_free(scene: Scene, dash: Points, taken: Points, own: list[Points]) -> bool:
    if dash.min() < scene.radius or dash.max() > scene.size - scene.radius:
        return False
    # The dash before is near by rights.
    return all(_is_clear(scene, dash, others) for others in (taken, np.array(own[:-2])))


def _along(corners: Points) -> Points:
    """Corners, and points between each of them and the next."""
    steps = np.linspace(0, 1, 4)[:, None, None]
    between = (1 - steps) * corners[:-1] + steps * corners[1:]
    return between.reshape(-1, 2)


def _is_clear(scene: Scene, dash: Points, others: Points) -> bool:
    if not len(others):
        return True
    squares = ((dash[:, None] - others[None]) ** 2).sum(-1)
    return bool(squares.min() >= scene.clearance**2)


def _render(scene: Scene, paths: list[Points], circles: Points) -> NDArray[np.uint8]:
    """Grey values (size ** 2,): dashes at three quarters of the circles' brightness."""
    grid = np.arange(scene.size) + 0.5
    pixels = np.stack(np.meshgrid(grid, grid, indexing="ij"), -1).reshape(-1, 1, 2)
    dashes = np.concatenate([path.reshape(-1, 2, 2) for path in paths])
    start, along = dashes[:, 0], dashes[:, 1] - dashes[:, 0]
    # The nearest point of every dash to every pixel.
    share = ((pixels - start) * along).sum(-1) / (along**2).sum(-1)
    nearest = start + np.clip(share, 0, 1)[..., None] * along
    lines = _ink(np.linalg.norm(pixels - nearest, axis=-1).min(1), scene.thickness / 2)
    discs = _ink(np.linalg.norm(pixels - circles, axis=-1).min(1), scene.radius)
    brightness: NDArray[np.uint8] = np.round(255 * np.maximum(0.75 * lines, discs)).astype(np.uint8)
    return brightness


def _ink(distance: Points, radius: float) -> Points:
    """1 inside, 0 outside, and a soft edge one pixel wide."""
    return np.clip(radius + 0.5 - distance, 0, 1)
