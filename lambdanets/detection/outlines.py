"""Areas of masks and the boxes around them from their outlines and run lengths, a million points at a time.

The area of a polygon is first that of its corners, which is another than it covers where it crosses itself, overlaps
the next or lies partly outside the picture: what does not fit is drawn before it is judged.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from lambdanets.detection.annotations import POLYGONS, RUN_LENGTHS, SOUND, Annotations
from lambdanets.detection.masks import rasterise
from lambdanets.detection.run_lengths import read_runs

FINE, NOT_FINITE, NO_AREA, FAR_OUTSIDE, BROKEN, WRONG_SUM = 0, 11, 12, 13, 14, 15

_Array = np.ndarray[Any, Any]
_AT_ONCE = 1 << 20  # points, or bytes of run lengths
_LEAST_AREA = 1e-6  # px: of three points on a line rounding leaves less


class Outlines(NamedTuple):
    """What is known of the masks of a file.

    areas      float64 (objects,) px: of run lengths exact, of polygons the sum of theirs by their corners; NaN without
               a sound mask
    bounds     float64 (objects, 4) x0, y0, x1, y1 px
    faults     uint8 (polygons,): the file's, or NOT_FINITE, NO_AREA, FAR_OUTSIDE
    run_faults uint8 (objects,): FINE, BROKEN, WRONG_SUM, NO_AREA
    polygon_bounds  float64 (polygons, 4)
    """

    areas: _Array
    bounds: _Array
    faults: _Array
    run_faults: _Array
    polygon_bounds: _Array


def can_draw() -> bool:
    """Whether polygons can be drawn: the library that does it comes with the extra "detection"."""
    return importlib.util.find_spec("faster_coco_eval") is not None


def drawn_area(of: Annotations, polygons: _Array, height: int, width: int) -> int:
    """Pixels of the picture that these polygons cover together."""
    points = [_points(of, at) for at in polygons.tolist()]
    low = np.clip(np.floor([p.min(axis=0) for p in points]).min(axis=0) - 1, 0, (width, height)).astype(int).tolist()
    high = np.clip(np.ceil([p.max(axis=0) for p in points]).max(axis=0) + 2, 0, (width, height)).astype(int).tolist()
    to = max(high[1] - low[1], 0), max(high[0] - low[0], 0)
    return int(rasterise(points, (height, width), offset=(low[1], low[0]), to=to).sum())


def outline(of: Annotations, sizes: _Array) -> Outlines:
    """Looks at every mask.

    sizes  int64 (objects, 2) height, width of the picture of each object; 0 where there is none
    """
    n = len(of.ids)
    owner = np.repeat(np.arange(n), np.diff(of.polygon_starts))
    areas, bounds, faults = _polygons(of)
    if can_draw():
        # One that crosses itself may have as much to the left of its line as to the right.
        flat = np.flatnonzero((faults == SOUND) & (areas < _LEAST_AREA) & (sizes[owner] > 0).all(axis=1))
        for polygon in flat.tolist():
            if drawn_area(of, np.array([polygon]), *sizes[owner[polygon]].tolist()) == 0:
                faults[polygon] = NO_AREA
    sound = faults == SOUND
    reach = np.maximum(sizes.max(axis=1, initial=0), 1)[owner].astype(float)
    with np.errstate(invalid="ignore"):
        far = sound & ((bounds[:, :2] < -reach[:, None]) | (bounds[:, 2:] > 2 * reach[:, None])).any(axis=1)
    faults[far & (sizes[owner, 0] > 0)] = FAR_OUTSIDE
    sound = faults == SOUND
    object_areas = np.where((of.kinds == POLYGONS) & (np.bincount(owner[sound], minlength=n) > 0), 0.0, np.nan)
    object_areas += np.bincount(owner[sound], areas[sound], minlength=n)
    object_bounds = np.full((n, 4), np.nan)
    held, inside = owner[sound], bounds[sound]
    if held.size:
        at = np.flatnonzero(np.diff(held, prepend=-1))
        object_bounds[held[at], :2] = np.minimum.reduceat(inside[:, :2], at)
        object_bounds[held[at], 2:] = np.maximum.reduceat(inside[:, 2:], at)
    run_faults = np.zeros(n, np.uint8)
    with_runs = np.flatnonzero(of.kinds == RUN_LENGTHS)
    for some in _parts(with_runs, np.diff(of.run_starts)[with_runs]):
        lengths = np.diff(of.run_starts)[some]
        content = np.concatenate([of.runs[of.run_starts[at] : of.run_starts[at + 1]] for at in some])
        runs = read_runs(content, np.concatenate(([0], np.cumsum(lengths))))
        whole = runs.sums() == of.run_sizes[some].prod(axis=1)
        fault = np.where(runs.sound, np.where(whole, FINE, WRONG_SUM), BROKEN)
        fault[(fault == FINE) & (runs.areas() == 0)] = NO_AREA
        run_faults[some] = fault
        fine = some[fault == FINE]
        object_areas[fine] = runs.areas()[fault == FINE]
        object_bounds[fine] = runs.bounds(of.run_sizes[some, 0])[fault == FINE]
    return Outlines(object_areas, object_bounds, faults, run_faults, bounds)


def _polygons(of: Annotations) -> tuple[_Array, _Array, _Array]:
    """Area, bounds and fault of each polygon."""
    n = len(of.polygon_faults)
    areas, bounds, faults = np.zeros(n), np.full((n, 4), np.nan), of.polygon_faults.copy()
    lengths = np.diff(of.point_starts)
    for some in _parts(np.flatnonzero(faults == SOUND), lengths[faults == SOUND]):
        first, last = of.point_starts[some[0]], of.point_starts[some[-1] + 1]  # what lies between has no points
        points, starts = of.points[first:last], of.point_starts[some] - first
        following = np.roll(points, -1, axis=0)
        following[starts + lengths[some] - 1] = points[starts]
        with np.errstate(over="ignore", invalid="ignore"):
            # From each polygon's first point: far from the origin the differences of products would lose digits.
            zero = np.repeat(points[starts], lengths[some], axis=0)
            a, b = points - zero, following - zero
            areas[some] = np.abs(np.add.reduceat(a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0], starts)) / 2
            bounds[some, :2] = np.minimum.reduceat(points, starts)
            bounds[some, 2:] = np.maximum.reduceat(points, starts)
        finite = np.logical_and.reduceat(np.isfinite(points).all(axis=1), starts)
        faults[some[~(finite & np.isfinite(areas[some]))]] = NOT_FINITE
        with np.errstate(invalid="ignore"):
            thin = (bounds[some, 2:] <= bounds[some, :2]).any(axis=1)
        faults[some[finite & thin]] = NO_AREA
    return areas, bounds, faults


def _parts(which: _Array, lengths: _Array) -> Iterator[_Array]:
    """`which` in parts of about a million lengths."""
    if which.size:
        number = np.cumsum(lengths) // _AT_ONCE
        yield from np.split(which, np.flatnonzero(np.diff(number)) + 1)


def holes(of: Annotations, outlines: Outlines, rows: _Array, *, most_polygons: int = 50) -> list[int]:
    """Which of these objects have a polygon inside another of theirs, as a hole would be drawn.

    most_polygons  an object of more is not looked at: pairs are compared
    """
    counts = np.diff(of.polygon_starts)[rows]
    found = []
    for row in rows[(counts > 1) & (counts <= most_polygons)].tolist():
        mine = np.arange(of.polygon_starts[row], of.polygon_starts[row + 1])
        mine = mine[outlines.faults[mine] == SOUND]
        edges = outlines.polygon_bounds[mine]
        within = (edges[:, None, :2] >= edges[None, :, :2]).all(-1) & (edges[:, None, 2:] <= edges[None, :, 2:]).all(-1)
        np.fill_diagonal(within, False)
        for inner, outer in np.argwhere(within):
            if _inside(_points(of, mine[inner]), _points(of, mine[outer])):
                found.append(row)
                break
    return found


def _points(of: Annotations, polygon: int) -> _Array:
    return of.points[of.point_starts[polygon] : of.point_starts[polygon + 1]]


def _inside(points: _Array, polygon: _Array) -> bool:
    """Whether all points (at most 32 of them are tried) lie inside the polygon, by the even-odd rule."""
    tried = points[:: max(1, len(points) // 32)]
    x, y = tried[:, :1], tried[:, 1:]
    (x0, y0), (x1, y1) = polygon.T, np.roll(polygon, -1, axis=0).T
    with np.errstate(divide="ignore", invalid="ignore"):
        crossed = ((y0 > y) != (y1 > y)) & (x < (x1 - x0) * (y - y0) / (y1 - y0) + x0)
    return bool((crossed.sum(axis=1) % 2 == 1).all())
