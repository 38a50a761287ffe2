"""Masks: run lengths as pycocotools writes them, polygons under scale and crop, pasting in little memory."""

import resource
import tracemalloc

import numpy as np
import pycocotools.mask as reference
import pytest
import torch
from torchvision.models.detection.roi_heads import paste_masks_in_image

from lambdanets.detection.masks import decode, encode, paste, paste_runs, rasterise


def random_mask(seed):
    """Noise, blobs, rings, full and empty masks, of any shape, also 1 pixel high or wide."""
    draw = np.random.default_rng(seed)
    height, width = (1 if draw.random() < 0.15 else int(draw.integers(1, 90)) for _ in range(2))
    kind = seed % 5
    if kind == 0:
        return draw.random((height, width)) < draw.random()
    if kind == 1:
        return np.full((height, width), draw.random() < 0.5)
    y, x = np.mgrid[:height, :width]
    far = np.hypot((y - height * draw.random()) / (height / 2), (x - width * draw.random()) / (width / 2))
    return (far < 0.8) & (far > (0.4 if kind == 2 else 0))


def as_theirs(mask):
    return reference.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"]


def test_run_lengths_of_1000_masks_are_those_of_pycocotools_byte_for_byte_and_come_back():
    shapes = set()
    for seed in range(1000):
        mask = random_mask(seed)
        counts = encode(mask)
        assert counts == as_theirs(mask), seed
        assert np.array_equal(decode(counts, *mask.shape), mask), seed
        shapes.add(mask.shape)
    assert min(h for h, _ in shapes) == 1 == min(w for _, w in shapes)


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int64, np.float32])
def test_a_mask_is_where_it_is_not_0_whatever_its_type_and_memory_order(dtype):
    mask = (random_mask(2) * 255).astype(dtype)
    assert encode(mask) == encode(np.asfortranarray(mask)) == as_theirs(mask != 0)


@pytest.mark.parametrize("shape", [(3,), (2, 3, 4), (0, 4)])
def test_what_is_no_mask_is_refused_by_its_shape(shape):
    with pytest.raises(ValueError, match="a mask is"):
        encode(np.zeros(shape))


@pytest.mark.parametrize("counts", [b"", b"zzz", b"1" * 50, b"\xff\xff"])
def test_run_lengths_of_another_size_are_refused(counts):
    with pytest.raises(ValueError, match="RLE"):
        decode(counts, 5, 5)


# ---- polygons


def star(seed, height, width, corners=9):
    """A polygon inside the picture, with concave corners."""
    draw = np.random.default_rng(seed)
    angle = np.sort(draw.random(corners)) * 2 * np.pi
    radius = draw.uniform(0.2, 0.95, corners)
    return np.stack((width / 2 * (1 + radius * np.cos(angle)), height / 2 * (1 + radius * np.sin(angle))), 1)


def theirs(polygons, height, width):
    flat = [polygon.ravel().tolist() for polygon in polygons]
    return reference.merge(reference.frPyObjects(flat, height, width))["counts"]


@pytest.mark.parametrize("seed", range(20))
def test_a_polygon_inside_the_picture_is_drawn_as_pycocotools_draws_it(seed):
    size = 40 + seed, 70 - seed
    polygons = [star(seed, *size), star(seed + 100, *size) * 0.5]
    assert encode(rasterise(polygons, size)) == theirs(polygons, *size)


@pytest.mark.parametrize("seed", range(10))
def test_a_crop_of_a_scaled_polygon_is_the_crop_of_the_whole_one(seed):
    draw = np.random.default_rng(seed)
    size, scale = (50, 60), (draw.uniform(0.3, 2), draw.uniform(0.3, 2))
    polygons = [star(seed, *size), star(seed + 50, *size) * 0.6]
    whole = rasterise(polygons, size, scale=scale)
    assert whole.shape == (round(50 * scale[0]), round(60 * scale[1]))
    assert encode(whole) == theirs([p * scale[::-1] for p in polygons], *whole.shape)
    top, left = int(draw.integers(whole.shape[0])), int(draw.integers(whole.shape[1]))
    crop = rasterise(polygons, size, scale=scale, offset=(top, left), to=(40, 30))
    expected = np.zeros((40, 30), np.uint8)
    part = whole[top : top + 40, left : left + 30]
    expected[: part.shape[0], : part.shape[1]] = part
    assert np.array_equal(crop, expected)


def test_run_lengths_are_resized_to_the_nearest_pixel_and_cropped():
    mask = random_mask(7)
    counts, size = encode(mask), mask.shape
    assert np.array_equal(rasterise(counts, size), mask)
    twice = mask.repeat(2, 0).repeat(3, 1)
    assert np.array_equal(rasterise(counts, size, scale=(2, 3)), twice)
    assert np.array_equal(rasterise(counts, size, scale=(2, 3), offset=(5, 4), to=(9, 8)), twice[5:14, 4:12])
    half = rasterise(counts, size, scale=(0.5, 0.5))
    assert abs(half.mean() - mask.mean()) < 0.05
    beyond = rasterise(counts, size, to=(size[0] + 5, size[1] + 2))
    assert np.array_equal(beyond[: size[0], : size[1]], mask)
    assert not beyond[size[0] :].any()
    assert not beyond[:, size[1] :].any()


def test_corners_far_outside_the_picture_cost_no_memory_and_fill_what_they_cover():
    huge = np.array([[-1e9, -1e9], [1e9, -1e9], [1e9, 1e9], [-1e9, 1e9]])
    assert rasterise([huge], (30, 40)).all()
    assert not rasterise([huge + 4e9], (30, 40)).any()
    assert not rasterise([star(0, 30, 40)], (30, 40), offset=(29, 39), to=(5, 5)).any()
    assert not rasterise([np.zeros((2, 2))], (30, 40)).any()  # a line is no polygon


def test_an_object_with_only_a_box_is_refused_and_so_is_a_crop_from_outside():
    with pytest.raises(ValueError, match="only a box"):
        rasterise(None, (5, 5))
    with pytest.raises(ValueError, match="offset"):
        rasterise([], (5, 5), offset=(-1, 0))


# ---- pasting


def objects(n, height, width, side, seed=0):
    """Blurred noise as masks; boxes that also reach over every border of the picture."""
    g = torch.Generator().manual_seed(seed)
    at = torch.rand(n, 2, generator=g) * torch.tensor([width, height]) - side / 4
    boxes = torch.cat((at, at + torch.rand(n, 2, generator=g) * side), 1)
    masks = torch.nn.functional.interpolate(torch.rand(n, 1, 5, 5, generator=g), size=(28, 28), mode="bilinear")[:, 0]
    return masks, boxes


def from_torchvision(masks, boxes, size):
    return (paste_masks_in_image(masks[:, None], boxes, size)[:, 0] > 0.5).numpy()


@pytest.mark.parametrize(("size", "side"), [((48, 64), 40), ((64, 48), 6), ((30, 31), 200), ((1, 50), 30)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pasted_bits_are_torchvisions_and_their_run_lengths_are_pycocotools(size, side, dtype):
    masks, boxes = (t.to(dtype) for t in objects(60, *size, side))
    meets = ((boxes + torch.tensor([-1, -1, 1, 1])).clamp(min=0)[:, :2] < torch.tensor(size[::-1])).all(1)
    meets &= (boxes[:, 2:] > 1).all(1)
    masks, boxes = masks[meets], boxes[meets]
    assert len(boxes) > 20
    boxes[0] = torch.tensor([0, 0, size[1], size[0]])
    boxes[1] = torch.tensor([0, 3, size[1], 3])
    masks[:3] = 1
    expected = from_torchvision(masks, boxes, size)
    found = list(paste(masks, boxes, size))
    assert np.array_equal(found, expected)
    assert list(paste_runs(masks, boxes, size)) == [as_theirs(mask) for mask in expected]


LARGE = ((0, 0, 3e4, 3e4), (-4e3, -9e3, 4e3, 9e3), (-500, 5, 9e5, 45), (20, -8e4, 30, 300))


def test_a_box_much_larger_than_the_picture_costs_what_is_seen_of_it_and_gives_torchvisions_bits():
    masks = torch.rand(len(LARGE), 28, 28, generator=torch.Generator().manual_seed(1))
    tracemalloc.start()
    ours = list(paste(masks, torch.tensor(LARGE), (50, 60)))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 2**20
    for bits, mask, (x0, y0, x1, y1) in zip(ours, masks, LARGE, strict=True):
        # Only what torchvision can hold: the same rule for each axis by itself, since bilinear is one after the other.
        grow = 30 / 28 / 2
        left, right = (int((x0 + x1) / 2 + s * (x1 - x0) * grow) for s in (-1, 1))
        top, bottom = (int((y0 + y1) / 2 + s * (y1 - y0) * grow) for s in (-1, 1))
        padded = torch.nn.functional.pad(mask, (1, 1, 1, 1))[None, None].double()
        kind = {"mode": "bilinear", "align_corners": False}
        rows = torch.nn.functional.interpolate(padded, size=(bottom - top + 1, 30), **kind)
        rows = rows[:, :, max(-top, 0) : 50 - top]
        both = torch.nn.functional.interpolate(rows, size=(rows.shape[2], right - left + 1), **kind)
        part = both[0, 0, :, max(-left, 0) : 60 - left]
        sure = (part - 0.5).abs() > 1e-3  # at a million pixels float32 has places to 0.06 of a pixel
        y, x = max(top, 0), max(left, 0)
        inside = torch.from_numpy(bits[y : y + part.shape[0], x : x + part.shape[1]])
        assert torch.equal(inside[sure], part[sure] > 0.5)
        assert sure.float().mean() > 0.95
        assert bits.sum() == inside.sum()


@pytest.mark.parametrize("side", [1e9, 1e18, 1e30, 3e38])
def test_any_finite_box_is_pasted(side):
    boxes = torch.tensor(
        [[-side, -side, side, side], [side / 50, side / 50, side, side], [-side, 3, side, 9], [side, side, side, side]]
    )
    whole, corner, stripe, outside = paste(torch.ones(4, 28, 28), boxes, (50, 60))
    assert whole.all()
    assert not corner.any()
    (short,) = paste(torch.ones(1, 28, 28), torch.tensor([[-60.0, 3, 120, 9]]), (50, 60))
    assert np.array_equal(stripe, short)
    assert not outside.any()
    assert len(list(paste_runs(torch.ones(4, 28, 28), boxes, (50, 60)))) == 4


def test_no_objects_and_objects_outside_the_picture_paste_nothing():
    none = torch.zeros(0, 28, 28), torch.zeros(0, 4)
    assert list(paste(*none, (5, 6))) == list(paste_runs(*none, (5, 6))) == []
    outside = torch.ones(2, 28, 28), torch.tensor([[90.0, 90, 99, 99], [-30, -30, -20, -20]])
    assert not any(mask.any() for mask in paste(*outside, (5, 6)))
    assert list(paste_runs(*outside, (5, 6))) == [as_theirs(np.zeros((5, 6)))] * 2


def test_shapes_that_do_not_fit_and_boxes_that_are_no_numbers_are_refused():
    with pytest.raises(ValueError, match=r"not \(2, 1, 28, 28\)"):
        next(paste(torch.zeros(2, 1, 28, 28), torch.zeros(2, 4), (5, 5)))
    boxes = torch.zeros(3, 4)
    boxes[2, 1] = torch.nan
    with pytest.raises(ValueError, match="box 2 is not finite"):
        next(paste_runs(torch.zeros(3, 28, 28), boxes, (5, 5)))


def many_large():
    masks, boxes = objects(300, 3000, 4000, 300)
    boxes[::75] = torch.tensor([0.0, 0, 4000, 3000])
    return masks, boxes


def grown_mib(paste_all):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    paste_all()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def pasted_here():
    masks, boxes = many_large()
    first = list(paste_runs(masks[:1], boxes[1:2], (3000, 4000)))  # what the libraries take once
    assert first
    return [
        grown_mib(lambda: sum(map(len, paste_runs(masks, boxes, (3000, 4000))))),
        grown_mib(lambda: sum(int(mask[0, 0]) for mask in paste(masks[:20], boxes[:20], (3000, 4000)))),
        grown_mib(lambda: paste_masks_in_image(masks[:8, None], boxes[:8], (3000, 4000))),
    ]


def test_300_objects_in_12_million_pixels_take_under_200_mb(children):
    runs, pixels, whole = children.start(pasted_here).gave()
    assert runs < 190, runs
    assert pixels < 190, pixels
    assert whole > 300, f"8 whole pictures took {whole} MiB: this test cannot see memory"


def test_pasting_in_12_million_pixels_is_torchvisions_too():
    masks, boxes = (t[73:77] for t in many_large())
    expected = from_torchvision(masks, boxes, (3000, 4000))
    for mask, counts, right in zip(
        paste(masks, boxes, (3000, 4000)), paste_runs(masks, boxes, (3000, 4000)), expected, strict=True
    ):
        assert np.array_equal(mask, right)
        assert np.array_equal(decode(counts, 3000, 4000), right)
