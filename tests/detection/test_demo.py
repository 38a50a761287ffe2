"""The demonstration of detectors: the data set cut from one picture, what is drawn, and what the recipe comes to."""

import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lambdanets.cli import main
from lambdanets.detection import demo
from lambdanets.detection.layouts import open_coco
from lambdanets.detection.masks import decode, rasterise
from lambdanets.detection.precision import Detected, average_precision
from lambdanets.errors import BadData
from lambdanets.recipes.coco import nuclei

WHEELS = sorted((Path(__file__).parents[2] / "build" / "stardist").glob("stardist-0.9.2-*.whl"))

# Number: top, left, bottom, right, in a picture of 512 x 512.
OBJECTS = {
    1: (10, 20, 30, 50),
    2: (100, 340, 120, 372),  # 12 columns to train on, 20 held out
    3: (200, 344, 220, 354),  # 8 to train on, 2 held out: a small piece
    4: (165, 400, 190, 420),  # 5 of its 25 rows in the first held-out view
    7: (500, 480, 512, 512),  # and no 5 or 6
}


@pytest.fixture(scope="module")
def made_up():
    labels, draw = np.zeros((512, 512), np.uint16), np.random.default_rng(0)
    for number, (top, left, bottom, right) in OBJECTS.items():
        labels[top:bottom, left:right] = number
    pixels = draw.integers(0, 100, labels.shape).astype(np.uint16)
    pixels[labels > 0] += 100
    pixels[:, demo.TRAIN_COLUMNS :] *= 300  # which must not decide what becomes white
    return pixels, labels


@pytest.fixture(scope="module")
def data(made_up, tmp_path_factory):
    return open_coco(demo.write(*made_up, tmp_path_factory.mktemp("demo") / "set"))


def test_held_out_views_have_each_pixel_once_and_training_views_none_of_them(made_up):
    pixels = made_up[0]
    count = np.zeros(pixels.shape, int)
    for view in demo.held_out_views(*pixels.shape):
        view.of(count)[:] += 1
    assert (count == (np.arange(512) >= demo.TRAIN_COLUMNS)).all()
    trained = np.zeros(pixels.shape, int)
    for view in demo.training_views(len(pixels)):
        assert view.of(trained).shape == (demo.VIEW_PX, demo.VIEW_PX)
        view.of(trained)[:] += 1
    assert ((trained > 0) == (np.arange(512) < demo.TRAIN_COLUMNS)).all()


def test_the_data_set_has_the_right_objects_and_small_held_out_pieces_are_crowds(data, made_up):
    labels = made_up[1]
    seen = {}
    for i in range(len(data.val)):
        objects = data.val.objects(i)
        for box, crowd, area in zip(objects.boxes.tolist(), objects.crowd, objects.areas, strict=True):
            seen[i, tuple(box)] = bool(crowd), int(area)
    assert seen == {
        (0, (0, 100, 20, 120)): (False, 400),
        (1, (0, 30, 2, 50)): (True, 40),
        (0, (48, 165, 68, 170)): (True, 100),
        (1, (48, 0, 68, 20)): (False, 400),
        (2, (128, 159, 160, 171)): (False, 384),
    }
    views = demo.training_views(512)
    assert len(data.train) == len(views)
    for i, view in enumerate(views):
        objects, own = data.train.objects(i), view.of(labels)
        assert not objects.crowd.any()
        assert len(objects.ids) == len(np.unique(own)) - bool((own == 0).any())
        masks = [rasterise(s, own.shape).astype(bool) for s in objects.segmentations]
        for mask in masks:
            assert len(np.unique(own[mask])) == 1
        assert (sum(masks, np.zeros(own.shape, int)) == (own > 0)).all()


def test_grey_values_are_scaled_by_the_training_columns_alone(data, made_up):
    low, high = np.percentile(made_up[0][:, : demo.TRAIN_COLUMNS], (1, 99))
    view = demo.training_views(512)[0]
    wanted = np.clip((view.of(made_up[0]) - low) / (high - low), 0, 1) * 255
    found = np.asarray(data.train.load(0).convert("L"))
    assert np.abs(found - wanted).max() <= 0.5
    assert found.min() == 0


def test_nothing_is_written_over_and_another_file_is_refused_with_the_command_that_fetches_the_right_one(
    made_up, tmp_path
):
    with zipfile.ZipFile(tmp_path / "other.whl", "w") as archive:
        archive.writestr("other/img.tif", b"")
    for wheel in (tmp_path / "other.whl", tmp_path / "missing.whl", tmp_path):
        with pytest.raises(BadData, match=r"pip download --no-deps stardist==0\.9\.2"):
            demo.nuclei(wheel, tmp_path / "set")
    assert not (tmp_path / "set").exists()
    demo.write(*made_up, tmp_path / "set")
    with pytest.raises(BadData, match=r"has train\.json already"):
        demo.write(*made_up, tmp_path / "set")
    with pytest.raises(BadData, match="352 are for training"):
        demo.write(made_up[0][:, :300], made_up[1][:, :300], tmp_path / "narrow")


def perfect(images):
    found = []
    for i in range(len(images)):
        objects, size = images.objects(i), images.sizes[i].tolist()
        assert all(decode(s, *size).any() for s in objects.segmentations)
        ones = np.ones(len(objects.labels))
        found.append(
            Detected(int(images.image_ids[i]), objects.boxes, objects.labels, ones, list(objects.segmentations))
        )
    return found


def test_the_picture_shows_truth_and_found_alike_where_all_is_found_and_nothing_where_nothing_is(data):
    def panels(detected):
        sheet = np.asarray(demo.side_by_side(data.val, detected))
        third = len(sheet) // 3
        return [sheet[i * third :][third - 320 : third] for i in range(3)]

    assert average_precision(data.val, perfect(data.val), "segm").ap == 1
    seen, truth, found = panels(perfect(data.val))
    assert seen.shape == (320, 1024, 3)
    assert (truth == found).all()
    assert (seen != truth).any()
    low = [one._replace(scores=one.scores * 0.4) for one in perfect(data.val)]
    seen, truth, found = panels(low)
    assert (seen == found).all()


@pytest.mark.slow
@pytest.mark.skipif(not WHEELS, reason="make demo-detection downloads the picture")
@pytest.mark.timeout(1800)
def test_nuclei_are_found_and_outlined(tmp_path, capsys):
    run = demo.demo(WHEELS[0], tmp_path / "run", data=tmp_path / "nuclei", device="cpu")
    said = capsys.readouterr().out
    box, mask = (float(said.split(f"{kind} AP50 ")[-1][:5]) for kind in ("box", "mask"))
    assert box > 0.80
    assert mask > 0.75
    with Image.open(run / demo.PICTURE) as picture:
        assert picture.width == 1024


def test_the_demonstration_reads_the_wheel_trains_judges_and_draws(made_up, tmp_path, capsys):
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as archive:
        for name, pixels in zip(("img2d", "mask2d"), made_up, strict=True):
            Image.fromarray(pixels).save(tmp_path / "one.tif")
            archive.write(tmp_path / "one.tif", f"stardist/data/images/{name}.tif")
    run = demo.demo(tmp_path / "a.whl", tmp_path / "run", device="cpu", recipe=nuclei(small=True))
    said = capsys.readouterr().out
    assert "Of 3 nuclei in columns that training did not see: box AP50 0." in said
    with Image.open(run / demo.PICTURE) as picture:
        assert picture.width == 1024
    whole = open_coco(tmp_path / "nuclei")
    assert (len(whole.val), whole.val.n_objects) == (3, 3)


def test_the_command_passes_its_arguments_on(monkeypatch):
    given = []
    monkeypatch.setattr(demo, "demo", lambda *args, **kwargs: given.append((args, kwargs)))
    assert main(["demo", "--nuclei", "a.whl", "--out", "x", "--seed", "3", "--device", "cpu"]) == 0
    assert given == [(("a.whl", "x"), {"seed": 3, "device": "cpu"})]
