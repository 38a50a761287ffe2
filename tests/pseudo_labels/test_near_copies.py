"""Copies among labelled pictures: byte for byte, and of held-out pictures by their looks."""

import io

import numpy as np
import pytest
from label_tables import folder_of, source_of
from PIL import Image, ImageDraw

from lambdanets.data.images import Images
from lambdanets.pseudo_labels.hashes import look_hash
from lambdanets.pseudo_labels.near_copies import (
    HASHED,
    MOST_DIFFERENCE,
    Looks,
    copies,
    difference,
    hashed,
    repeated,
    thumbnail,
)

PX = 320, 240


@pytest.fixture(scope="module")
def photographs():
    """200 parts of two photographs."""
    from sklearn.datasets import load_sample_images

    whole = [Image.fromarray(levels) for levels in load_sample_images().images]
    draw = np.random.default_rng(0)
    found = []
    for number in range(200):
        of = whole[number % 2]
        x, y = (int(draw.integers(0, side - px)) for side, px in zip(of.size, PX, strict=True))
        found.append(of.crop((x, y, x + PX[0], y + PX[1])))
    return found


def encoded(picture, quality):
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def known_of(pictures):
    known = np.zeros(len(pictures), HASHED)
    known["look_hash"] = [look_hash(picture) for picture in pictures]
    return known


def found_copies(pictures, others):
    """{position of a picture: those of the others of which it is a copy} by hash and thumbnail."""
    near = Looks(known_of(others), 3).near(np.array([look_hash(picture) for picture in pictures], np.uint64))
    found = {}
    for at, of, _ in near:
        if difference(thumbnail(pictures[at]), thumbnail(others[of])) <= MOST_DIFFERENCE:
            found.setdefault(at, set()).add(of)
    return found


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("JPEG 40", lambda picture: encoded(picture, 40)),
        ("JPEG 95", lambda picture: encoded(picture, 95)),
        ("halved", lambda picture: picture.resize((PX[0] // 2, PX[1] // 2))),
        ("halved, JPEG 75", lambda picture: encoded(picture.resize((PX[0] // 2, PX[1] // 2)), 75)),
        ("0.7", lambda picture: picture.resize((224, 168), Image.Resampling.LANCZOS)),
        ("doubled", lambda picture: picture.resize((PX[0] * 2, PX[1] * 2))),
    ],
)
def test_photographs_encoded_again_or_scaled_are_found(photographs, name, change):
    changed = [change(picture) for picture in photographs]
    found = found_copies(changed, photographs)
    assert sum(number in found.get(number, ()) for number in range(200)) >= 190, name


def test_of_look_alikes_that_show_another_object_next_to_none_is_taken_for_a_copy(photographs):
    draw = np.random.default_rng(1)
    pairs = []
    for picture in photographs:
        side = int(draw.integers(40, 120))
        x, y = int(draw.integers(0, PX[0] - side)), int(draw.integers(0, PX[1] - side))
        pair = picture.copy(), picture.copy()
        for of, shape in zip(pair, ("rectangle", "ellipse"), strict=True):
            colour = tuple(draw.integers(0, 256, 3).tolist())
            getattr(ImageDraw.Draw(of), shape)([x, y, x + side, y + side], fill=colour)
        pairs.append(pair)
    alike = [
        number for number, (one, other) in enumerate(pairs) if (look_hash(one) ^ look_hash(other)).bit_count() <= 3
    ]
    assert len(alike) >= 100  # the hash alone would remove these
    taken = [number for number in alike if found_copies([pairs[number][0]], [pairs[number][1]])]
    assert len(taken) <= 1


def test_crops_and_mirrored_pictures_are_not_found_as_is_documented(photographs):
    crops = [picture.crop((16, 12, 304, 228)) for picture in photographs[:50]]
    mirrored = [picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for picture in photographs[:50]]
    assert not any(at in of for at, of in found_copies(mirrored, photographs).items())
    assert sum(at in of for at, of in found_copies(crops, photographs).items()) <= 2


def test_hashes_within_the_bits_are_all_found_and_no_others():
    draw = np.random.default_rng(2)
    known = np.zeros(3000, HASHED)
    known["look_hash"] = draw.integers(0, 2**64, 3000, dtype=np.uint64)
    for bits in (0, 1, 3, 7):
        looks = draw.integers(0, 2**64, 2000, dtype=np.uint64)
        for at in range(200):  # 100 at the distance, 100 one beyond it
            turned = draw.choice(64, bits + at % 2, replace=False)
            looks[at] = known["look_hash"][at] ^ np.uint64(sum(1 << int(bit) for bit in turned))
        found = {(at, of): n for at, of, n in Looks(known, bits).near(looks)}
        apart = np.bitwise_count(looks[:, None] ^ known["look_hash"])
        assert found == {(at, of): apart[at, of] for at, of in zip(*np.nonzero(apart <= bits), strict=True)}
        assert sum((at, at) in found for at in range(200)) == 100


def test_flat_pictures_are_copies_by_their_bytes_alone():
    known = np.zeros(3, HASHED)
    known["look_hash"] = 0, 2**64 - 1, 0xFFFF0000FFFF0000
    known["bytes_hash"], known["in_a_file"] = (7, 8, 9), (True, True, False)
    looks = Looks(known, 3)
    assert looks.near(known["look_hash"]) == [(2, 2, 0)]
    assert looks.of_bytes(np.array([9, 8, 7, 1], np.uint64)).tolist() == [-1, 1, 0, -1]  # 9 is no file's


def test_pictures_that_repeat_the_bytes_of_an_earlier_one_are_found():
    draw = np.random.default_rng(3)
    for _ in range(50):
        hashes = draw.integers(0, 12, draw.integers(0, 30)).astype(np.uint64)
        readable = draw.random(len(hashes)) < 0.8
        seen, wanted = set(), []
        for at, (value, fine) in enumerate(zip(hashes.tolist(), readable.tolist(), strict=True)):
            if fine and value in seen:
                wanted.append(at)
            if fine:
                seen.add(value)
        assert repeated(hashes, readable).tolist() == wanted


def test_copies_are_found_through_all_files_whatever_the_threads(tmp_path):
    draw = np.random.default_rng(4)
    known = np.zeros(40, HASHED)
    known["look_hash"] = draw.integers(0, 2**64, 40, dtype=np.uint64)
    known["bytes_hash"], known["in_a_file"] = np.arange(1000, 1040), True
    parts = []
    for number in range(4):
        label, own = np.arange(30) % 3, np.arange(30, dtype=np.uint64) + np.uint64(100 * number)
        looks = draw.integers(0, 2**64, 30, dtype=np.uint64)
        own[3] = 1000 + number  # the bytes of a picture held out
        looks[5] = known["look_hash"][20 + number] ^ np.uint64(0b101)
        label[6], looks[6] = -1, known["look_hash"][0]  # cannot be read
        own[7] = 9999  # in all four
        parts.append({"label": label, "doubt": np.full(30, 0.1), "bytes_hash": own, "look_hash": looks})
    labels, shards = folder_of(tmp_path / "labels", parts, 3)
    for threads in (1, 3):
        found = copies(source_of(labels, shards).rows, known, 3, threads)
        assert [(pair.id, pair.known) for pair in found.equal] == [(30 * n + 3, n) for n in range(4)]
        assert [tuple(pair) for pair in found.near] == [(30 * n + 5, 20 + n, 2) for n in range(4)]
        assert found.repeated.tolist() == [37, 67, 97]


class _Squares(Images):
    """Pictures made when they are loaded; every third cannot be decoded."""

    def load(self, index):
        raise AssertionError("its bytes are there")

    def content(self, index):
        file = io.BytesIO()
        levels = np.random.default_rng(index).integers(0, 256, (9, 12, 3), dtype=np.uint8)
        Image.fromarray(levels).save(file, "PNG")
        return b"no picture" if index % 3 == 2 else file.getvalue()


def test_hashes_do_not_depend_on_the_processes_that_read():
    squares = _Squares(("a",), [str(number) for number in range(40)], np.zeros(40, int))
    alone = hashed(squares, 0)
    assert alone["in_a_file"].all()
    assert (alone["look_hash"] == 0).nonzero()[0].tolist() == list(range(2, 40, 3))
    assert (hashed(squares, 2) == alone).all()
