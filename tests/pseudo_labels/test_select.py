"""Which pictures are selected, how often, and what is refused: from folders of labels without pictures."""

import dataclasses
import os
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from label_tables import by_class, folder_of, labels_of, mix, read, reference, source_of, table, write

from lambdanets.errors import BadData, BadRun
from lambdanets.pseudo_labels import select_page
from lambdanets.pseudo_labels.label_rows import label_rows, verified
from lambdanets.pseudo_labels.near_copies import HASHED, copies
from lambdanets.pseudo_labels.query import choose
from lambdanets.pseudo_labels.select import Asked, select_from
from lambdanets.pseudo_labels.write_selection import copies_of, written_columns

SEVEN_TENTHS = float(np.float32(0.7))


@pytest.fixture(autouse=True)
def _undrawn(request, monkeypatch):
    """The picture takes longest of all, and is the same in every test."""
    if "drawn" not in request.keywords:
        monkeypatch.setattr(select_page, "classes_png", lambda held: b"")


def selected(tmp_path, parts, classes, asked, name="selection", **how):
    labels, shards = folder_of(tmp_path / f"labels of {name}", parts, classes, **how)
    select_from(source_of(labels, shards), tmp_path / name, asked)
    return read(tmp_path / name)


def random_parts(seed, files, rows, classes):
    """(label, doubt): many equal doubts, a class that is rare, one in twenty unreadable."""
    draw = np.random.default_rng(seed)
    share = 1 / np.arange(1, classes + 1)
    parts = []
    for _ in range(files):
        label = draw.choice(classes, rows, p=share / share.sum())
        label[draw.random(rows) < 0.05] = -1
        parts.append((label, draw.choice([0, 1e-9, 1e-4, 0.2, 0.4, 0.6999, 0.7, 0.71, 0.99], rows)))
    return parts


def columns_of(parts):
    label = np.concatenate([part[0] for part in parts]).tolist()
    return label, np.concatenate([part[1] for part in parts]).astype(np.float32).tolist()


def draws(held):
    return held["counts"]["classes"]["draws"]


# ---- what is selected


@pytest.mark.parametrize(
    ("rows", "per_class", "copies"),
    [(2, 3, [1, 2]), (3, 7, [2, 2, 3]), (5, 5, [1] * 5), (1, 4, [4])],
)
def test_copies_are_floor_and_ceil_in_the_order_of_ids(rows, per_class, copies):
    assert copies_of(np.arange(rows), rows, per_class).tolist() == copies


def test_copies_sum_to_the_draws_of_a_class_for_every_number_of_rows():
    for per_class in range(1, 201):
        for rows in range(1, per_class + 1):
            copies = copies_of(np.arange(rows), rows, per_class)
            assert copies.sum() == per_class
            assert set(copies.tolist()) <= {per_class // rows, -(-per_class // rows)}


_TABLES = st.tuples(st.integers(1, 6), st.integers(1, 9), st.integers(0, 3)).flatmap(
    lambda how: st.tuples(
        st.just(how),
        st.lists(
            st.tuples(st.integers(-1, how[0] - 1), st.sampled_from([0.0, 1e-9, 0.1, 0.5, 0.7, 0.70001, 1.0])),
            min_size=1,
            max_size=40,
        ),
        st.sets(st.integers(0, 39), max_size=4),
    )
)


def check_table(folder, given):
    (classes, per_class, max_copies), rows, excluded = given
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    label, doubt = (list(column) for column in zip(*rows, strict=True))
    doubt = np.array(doubt, np.float32).tolist()
    half = len(rows) // 2
    parts = [(label[:half], doubt[:half]), (label[half:], doubt[half:])] if half else [(label, doubt)]
    labels, shards = folder_of(folder / "labels", parts, max(2, classes))
    source = source_of(labels, shards)
    excluded = sorted(i for i in excluded if i < len(rows))
    how = {"rule": "label", "most_doubt": SEVEN_TENTHS, "per_class": per_class, "threads": 1, "memory_gb": 1}
    wanted = reference(
        label, doubt, most_doubt=SEVEN_TENTHS, per_class=per_class, excluded=excluded, max_copies=max_copies
    )
    try:
        choice = choose(source.rows, np.array(excluded, np.int64), spill=folder / "spill", **how)
    except BadData as error:
        assert not wanted
        assert "nothing can be selected" in str(error)
        return
    written = written_columns(source.rows, choice, folder, "label", max_copies, 1)
    columns = {name: np.load(folder / f"{name}.npy") for name in written.sha256}
    assert by_class(columns) == wanted
    assert (np.diff(columns["id"].astype(np.int64)) > 0).all()
    assert (np.diff(columns["row"].astype(np.int64)) >= 0).all()
    assert written.unreadable == sum(c < 0 for c in label)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(given=_TABLES)
def test_a_selection_is_that_of_a_plain_sort(tmp_path_factory, given):
    check_table(tmp_path_factory.getbasetemp() / "tables", given)


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(given=_TABLES)
def test_500_selections_are_those_of_a_plain_sort(tmp_path_factory, given):
    check_table(tmp_path_factory.getbasetemp() / "500 tables", given)


def test_every_class_has_exactly_the_draws_and_the_columns_are_those_of_the_labels(tmp_path):
    parts = random_parts(0, 5, 200, 12)
    held, columns = selected(tmp_path, parts, 12, Asked(per_class=25), top=4)
    label, doubt = columns_of(parts)
    assert by_class(columns) == reference(label, doubt, most_doubt=SEVEN_TENTHS, per_class=25)
    assert (np.bincount(columns["label"][columns["row"]], minlength=12) == 25).all()
    assert {name: of.dtype.str for name, of in columns.items()} == {
        "id": "<u8", "label": "<i4", "confidence": "<f4", "top_class": "<i2", "top_prob": "<f2", "row": "<u4"
    }  # fmt: skip
    ids = columns["id"].astype(int)
    assert (columns["confidence"] == 1 - np.array(doubt, np.float32)[ids]).all()
    assert (columns["top_class"] == (np.array(label)[ids][:, None] + np.arange(4)) % 12).all()
    assert columns["top_prob"].shape == (len(ids), 4)
    assert (columns["top_prob"][:, 0] == columns["confidence"].astype(np.float16)).all()
    counts = held["counts"]
    assert (held["rows"], held["draws"], held["top"]) == (len(ids), 12 * 25, 4)
    assert sum(counts["confidence"]) == held["rows"] == sum(counts["copies"].values())
    assert sum(int(n) * rows for n, rows in counts["copies"].items()) == held["draws"]
    assert counts["labelled"] == 1000 == sum(held["excluded"].values()) + counts["candidates"]
    assert held["excluded"]["unreadable"] == sum(c < 0 for c in label)
    for c in range(12):
        of = {key: values[c] for key, values in counts["classes"].items()}
        mine = [d for k, d in zip(label, doubt, strict=True) if k == c and d <= SEVEN_TENTHS]
        assert of["candidates"] == len(mine)
        assert of["rows"] == min(25, len(mine))
        middle = sorted(mine)[: of["rows"]][(of["rows"] - 1) // 2]
        assert of["median_doubt"] == pytest.approx(middle, rel=0.13, abs=1e-9)


def test_pictures_whose_confidence_is_exactly_1_are_ranked_by_their_doubt(tmp_path):
    """10,000 logits (gap, 0, 0): from a gap of 17 on float32 knows the confidence as 1, float16 from 9 on."""
    gap = np.random.default_rng(5).permutation(np.linspace(5, 60, 10_000))
    doubt = 2 * np.exp(-gap) / (1 + 2 * np.exp(-gap))
    assert doubt[np.argmin(abs(gap - 20))] == pytest.approx(2 * np.exp(-20), rel=0.05)
    held, columns = selected(tmp_path, [(np.zeros(10_000, int), doubt)], 3, Asked(per_class=4_000))
    assert (columns["confidence"] == 1).all()
    assert columns["id"].tolist() == sorted(np.argsort(-gap)[:4_000].tolist())
    assert held["counts"]["classes"]["candidates"] == [10_000, 0, 0]


def test_equal_doubts_are_taken_from_all_shards_alike_and_by_nothing_but_the_id(tmp_path):
    parts = [(np.zeros(100, int), np.full(100, 0.25)) for _ in range(10)]
    _, columns = selected(tmp_path, parts, 2, Asked(per_class=100))
    order = np.argsort(mix(range(1000)))
    assert columns["id"].tolist() == sorted(order[:100].tolist())
    of_shard = np.bincount(columns["id"].astype(int) // 100)
    assert of_shard.min() >= 8
    assert of_shard.max() <= 12


def test_the_numbers_of_a_class_that_has_none_one_or_enough_rows(tmp_path):
    label = [0] * 9 + [2] + [3] * 4
    held, columns = selected(tmp_path, [(label, [0.1] * 14)], 4, Asked(per_class=4))
    assert (held["counts"]["classes"]["rows"], draws(held)) == ([4, 0, 1, 4], [4, 0, 4, 4])
    assert "1 classes have no picture, and so no draws: class 1" in held["warnings"]
    assert columns["row"].tolist() == [0, 1, 2, 3, 4, 4, 4, 4, 5, 6, 7, 8]
    held, _ = selected(tmp_path, [(label, [0.1] * 14)], 4, Asked(per_class=4, max_copies=3), "few copies")
    assert draws(held) == [4, 0, 3, 4]
    held, _ = selected(tmp_path, [(label, [0.1] * 14)], 4, Asked(per_class=1), "one")
    assert draws(held) == [1, 0, 1, 1]
    held, _ = selected(tmp_path, [(label, [0.1] * 14)], 4, Asked(), "as many as there are in the mean")
    assert held["per_class"] == 4  # 14 / 4, rounded to even
    held, _ = selected(tmp_path, [(label, [0.1] * 14)], 4, Asked(per_class=1000), "more than there are")
    assert (held["rows"], held["draws"]) == (14, 3000)


def test_the_threshold_is_a_float32_and_equality_is_kept(tmp_path):
    label, doubt = [0, 0, 0, 1], [0.7, np.nextafter(np.float32(0.7), np.float32(1)), 0.0, 0.0]
    _, columns = selected(tmp_path, [(label, doubt)], 2, Asked(per_class=3))
    assert columns["id"].tolist() == [0, 2, 3]
    _, columns = selected(tmp_path, [(label, doubt)], 2, Asked(per_class=3, confidence=1.0), "sure")
    assert columns["id"].tolist() == [2, 3]
    with pytest.raises(BadData, match=r"nothing can be selected: of 2 labelled pictures .* a lower --confidence"):
        selected(tmp_path, [([0, 1], [0.1, 0.2])], 2, Asked(confidence=1.0), "unsure")
    with pytest.raises(BadData, match="nothing can be selected"):
        selected(tmp_path, [([-1, -1], [1, 1])], 2, Asked(), "unreadable")


def test_more_than_32767_classes_are_counted_with_32_bits(tmp_path):
    held, columns = selected(tmp_path, [([40_000, 32_768, 0], [0.1] * 3)], 40_001, Asked(per_class=1))
    assert columns["label"].tolist() == [40_000, 32_768, 0]
    assert columns["top_class"].dtype == np.dtype("<i4")
    assert columns["top_class"][:, 0].tolist() == [40_000, 32_768, 0]
    assert len(held["warnings"][0]) < 400  # of 39,998 classes ten are named


def test_the_rule_rank_takes_a_picture_for_every_class_that_was_kept_of_it(tmp_path):
    draw = np.random.default_rng(6)
    n, classes, top = 120, 12, 9  # more than eight places
    order = np.stack([draw.permutation(classes)[:top] for _ in range(n)])
    prob = -np.sort(-draw.choice([0.5, 0.25, 0.125, 0.0625], (n, top)), axis=1)
    label = order[:, 0].copy()
    label[::10] = -1
    parts = [
        {"label": label[at], "doubt": np.full(40, 0.9), "top_class": order[at], "top_prob": prob[at]}
        for at in (slice(0, 40), slice(40, 80), slice(80, 120))
    ]
    held, columns = selected(tmp_path, parts, classes, Asked(per_class=30, rule="rank"), top=top)
    wanted = {}
    for c in range(classes):
        mine = [(-np.float16(prob[i, k]), mix([i])[0], i) for i in range(n) for k in range(top) if order[i, k] == c]
        kept = sorted(i for *_, i in sorted(one for one in mine if label[one[2]] >= 0)[:30])
        copies = copies_of(np.arange(len(kept)), len(kept), 30).tolist()
        wanted[c] = list(zip(kept, copies, strict=True))
    assert by_class(columns) == wanted
    assert (np.diff(columns["id"].astype(int)) >= 0).all()
    place = [order[i].tolist().index(c) for i, c in zip(columns["id"].tolist(), columns["label"].tolist(), strict=True)]
    assert (columns["confidence"] == prob[columns["id"].astype(int), place]).all()
    assert held["rule"] == "rank"
    assert "doubtful" not in held["excluded"]


# ---- the same bytes, whatever the order, threads, chunks


def contents(out):
    return {name: (out / name).read_bytes() for name in sorted(os.listdir(out)) if name != ".lock"}


def test_the_bytes_do_not_depend_on_files_order_threads_memory_or_row_groups(tmp_path):
    parts = random_parts(7, 12, 500, 20)
    labels, shards = folder_of(tmp_path / "labels", parts, 20)
    asked = Asked(per_class=100)
    wanted = None
    for number, (threads, memory_gb) in enumerate([(1, 1), (2, 0.05), (5, 2)]):
        out = tmp_path / f"selection {number}"
        select_from(source_of(labels, shards), out, asked, threads=threads, memory_gb=memory_gb)
        wanted = wanted or contents(out)
        assert contents(out) == wanted
    for name in os.listdir(labels.home):  # the same values in groups of 77 rows, the files made in another order
        if name.endswith(".parquet"):
            path = os.path.join(labels.home, name)
            held = pa.parquet.read_table(path)
            os.unlink(path)
            pa.parquet.write_table(held, path, row_group_size=77, compression="snappy")
    select_from(source_of(labels, shards), tmp_path / "rewritten", asked, threads=2)
    assert contents(tmp_path / "rewritten") == wanted

    rows = source_of(labels, shards).rows
    turned = dataclasses.replace(rows, files=rows.files[::-1])
    how = {"rule": "label", "most_doubt": SEVEN_TENTHS, "per_class": 100, "threads": 2, "memory_gb": 1}
    one, other = (choose(of, np.zeros(0, int), spill=tmp_path / "spill", **how) for of in (rows, turned))
    assert (one.picked == other.picked).all()


def test_the_benchmarks_labels_are_labels_and_hold_what_it_says(tmp_path):
    from benchmarks import pseudo

    shards = pseudo.shards_of(12_000)
    labels = pseudo.labels_of(tmp_path, shards)
    pseudo.make(str(tmp_path), shards, 0, 1)
    rows = label_rows(labels, shards, 1)
    tables = [verified(rows.labels, file) for file in rows.files]
    assert [held.num_rows for held in tables] == [10_000, 2_000]
    assert 5 <= sum(held.num_rows - held.column("error").null_count for held in tables) <= 30
    found = copies(rows, np.zeros(0, HASHED), 3, 1)
    assert found.repeated.tolist() == list(range(10_000, 10_020))  # 20 of the first file are in the second, too


@pytest.mark.slow
def test_a_million_rows_give_the_same_bytes_for_two_orders_of_files_within_200_mb(tmp_path):
    from benchmarks import pseudo

    pseudo.fill(tmp_path / "labels", 1_000_000, 2)
    one, other = pseudo.runs(tmp_path / "labels", tmp_path, 2, 1.0)
    assert one["digest"] == other["digest"]
    assert one["classes_with_all_draws"] == 1000
    assert max(run["peak_mb"] - run["imports_mb"] for run in (one, other)) <= 200


def test_a_selection_that_is_done_is_not_made_again_and_another_one_is_refused(tmp_path):
    labels, shards = folder_of(tmp_path / "labels", random_parts(8, 2, 50, 3), 3)
    said = str(select_from(source_of(labels, shards), tmp_path / "out", Asked(per_class=20)))
    before = {name: os.stat(tmp_path / "out" / name).st_mtime_ns for name in contents(tmp_path / "out")}
    assert str(select_from(source_of(labels, shards), tmp_path / "out", Asked(per_class=20))) == said
    assert said.startswith(f"{tmp_path / 'out'}: 60 draws of ")
    assert {name: os.stat(tmp_path / "out" / name).st_mtime_ns for name in before} == before
    with pytest.raises(BadData, match=r"another selection \(per_class 20, not 30\): name a new folder"):
        select_from(source_of(labels, shards), tmp_path / "out", Asked(per_class=30))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(BadData, match=r"is not empty \(it holds notes.txt\)"):
        select_from(source_of(labels, shards), tmp_path / "full", Asked(per_class=30))
    with pytest.raises(BadData, match=r"notes.txt is a file: name a new folder"):
        select_from(source_of(labels, shards), tmp_path / "full" / "notes.txt", Asked(per_class=30))
    with pytest.raises(BadData, match=r"--per-class is 10{30}: 1 to 1,000,000,000"):
        Asked(per_class=10**30)


def test_a_run_is_not_overwritten_though_it_has_a_lock_as_a_selection_has(tmp_path):
    labels, shards = folder_of(tmp_path / "labels", random_parts(8, 2, 50, 3), 3)
    (tmp_path / "run").mkdir()
    for name in (".lock", "report.html", "run.json"):
        (tmp_path / "run" / name).write_text("a run's")
    with pytest.raises(BadData, match=r"run is not empty \(it holds run.json\): name a new folder"):
        select_from(source_of(labels, shards), tmp_path / "run", Asked(per_class=30))
    assert {path.read_text() for path in (tmp_path / "run").iterdir()} == {"a run's"}


# ---- killed, a full disk


def dies_at(place, number, parts_seed):
    """`select_from` in a process that ends, as by SIGKILL, before the file of that number appears."""
    import contextlib
    from pathlib import Path

    from lambdanets import files
    from lambdanets.pseudo_labels import select as selecting
    from lambdanets.pseudo_labels import write_selection

    select_page.classes_png = lambda held: b""
    whole, left = files.placed, [number]

    @contextlib.contextmanager
    def placed(path):
        with whole(path) as file:
            yield file
            left[0] -= 1
            if left[0] < 0:
                os._exit(9)

    for module in (files, selecting, write_selection):
        module.placed = placed
    shards = folder_of(Path(place) / f"again {number}", random_parts(parts_seed, 3, 60, 4), 4)[1]
    labels = labels_of(Path(place) / "labels", 4, shards)
    select_from(source_of(labels, shards), Path(place) / "out", Asked(per_class=40))


def check_kills(tmp_path, children, numbers):
    """Kills before each of these files; gives whether the last one was reached."""
    labels, shards = folder_of(tmp_path / "labels", random_parts(9, 3, 60, 4), 4)
    select_from(source_of(labels, shards), tmp_path / "undisturbed", Asked(per_class=40))
    wanted = contents(tmp_path / "undisturbed")
    for number in numbers:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        child = children.start(dies_at, str(tmp_path), number, 9)
        if child.wait() == 0:
            return False
        assert child.wait() == 9, child.said()
        assert not (tmp_path / "out" / "selection.json").exists()
        select_from(source_of(labels, shards), tmp_path / "out", Asked(per_class=40))
        assert contents(tmp_path / "out") == wanted
    return True


def test_whenever_it_is_killed_the_same_command_ends_with_the_same_bytes(tmp_path, children):
    # 0 is the list of copies, 1 the choice, 2 to 7 are the columns, then excluded.jsonl, the page, selection.json
    assert check_kills(tmp_path, children, (1, 9))


@pytest.mark.slow
def test_killed_before_any_of_its_files_it_ends_with_the_same_bytes(tmp_path, children):
    assert check_kills(tmp_path, children, range(12))
    (tmp_path / "more").mkdir()
    assert not check_kills(tmp_path / "more", children, (12,))


def test_a_full_disk_is_one_error_and_the_same_command_goes_on(tmp_path, largest_file, monkeypatch):
    labels, shards = folder_of(tmp_path / "labels", random_parts(10, 4, 500, 4), 4)
    select_from(source_of(labels, shards), tmp_path / "undisturbed", Asked(per_class=900))
    for most in (500, 3_000, 9_000):  # the choice has 2,000 bytes, the largest column 14,400
        with largest_file(most), pytest.raises(BadData) as refused:
            select_from(source_of(labels, shards), tmp_path / "out", Asked(per_class=900))
        assert str(refused.value).startswith(str(tmp_path / "out"))
        assert "bytes are free there; free space or choose another place, and give the same command" in str(
            refused.value
        )
        assert not [name for name in os.listdir(tmp_path / "out") if name.endswith((".part", ".json"))]
    select_from(source_of(labels, shards), tmp_path / "out", Asked(per_class=900))
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")


def test_too_little_memory_is_an_error_that_says_what_to_give(tmp_path, monkeypatch):
    labels, shards = folder_of(tmp_path / "labels", random_parts(10, 2, 50, 4), 4)
    with pytest.raises(BadData, match=r"DuckDB could not select: .*larger --memory-gb than 1e-05"):
        select_from(source_of(labels, shards), tmp_path / "out", Asked(per_class=9), memory_gb=0.00001)


def test_two_commands_do_not_write_to_one_folder(tmp_path):
    from lambdanets.runs.lock import locked, unlock

    labels, shards = folder_of(tmp_path / "labels", random_parts(10, 2, 50, 4), 4)
    (tmp_path / "out").mkdir()
    held = locked(tmp_path / "out")
    with pytest.raises(BadRun, match="is in use by process"):
        select_from(source_of(labels, shards), tmp_path / "out", Asked(per_class=9))
    unlock(held)


# ---- label files that must not be used


def test_a_cut_file_is_refused_by_name_with_what_to_do(tmp_path):
    labels, shards = folder_of(tmp_path / "labels", random_parts(11, 3, 40, 4), 4)
    path = tmp_path / "labels" / "unlabelled-00001.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(BadData, match=r"unlabelled-00001.parquet is damaged.* remove it, and label again"):
        source_of(labels, shards)


def test_a_turned_bit_anywhere_is_found_before_a_selection_appears(tmp_path):
    labels, shards = folder_of(tmp_path / "labels", random_parts(11, 2, 400, 4), 4)
    path = tmp_path / "labels" / "unlabelled-00001.parquet"
    good = path.read_bytes()
    wrong = 0
    for at in np.linspace(4, len(good) - 9, 25).astype(int):
        path.write_bytes(good[:at] + bytes([good[at] ^ 16]) + good[at + 1 :])
        out = tmp_path / f"out {at}"
        try:
            select_from(source_of(labels, shards), out, Asked(per_class=30))
        except BadData as error:
            wrong += 1
            assert "unlabelled-00001.parquet" in str(error)
            assert "label again" in str(error)
            assert not (out / "selection.json").exists()
    assert wrong >= 20  # what is left tells nobody of anything: names of who wrote it, unused sizes
    path.write_bytes(good)
    select_from(source_of(labels, shards), tmp_path / "good", Asked(per_class=30))
    assert contents(tmp_path / "good")["id.npy"]


def test_after_a_damaged_file_was_labelled_again_nothing_of_it_is_left(tmp_path):
    labels, shards = folder_of(tmp_path / "labels", random_parts(12, 2, 400, 4), 4)
    select_from(source_of(labels, shards), tmp_path / "undisturbed", Asked(per_class=30))
    path = tmp_path / "labels" / "unlabelled-00000.parquet"
    good, held = path.read_bytes(), pa.parquet.read_table(path)
    changed = held.set_column(3, "doubt", pa.array(held.column("doubt").to_numpy()[::-1]))
    pa.parquet.write_table(changed.replace_schema_metadata(held.schema.metadata), path)  # the footer tells of the good
    with pytest.raises(BadData, match="is damaged: its values have the sha256"):
        select_from(source_of(labels, shards), tmp_path / "out", Asked(per_class=30))
    path.write_bytes(good)
    select_from(source_of(labels, shards), tmp_path / "out", Asked(per_class=30))
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")


def test_a_shard_without_labels_is_named_or_counted_where_incomplete_was_given(tmp_path):
    parts = random_parts(13, 4, 50, 3)
    labels, shards = folder_of(tmp_path / "labels", parts, 3)
    (tmp_path / "labels" / "unlabelled-00001.parquet").unlink()
    (tmp_path / "labels" / "unlabelled-00002.parquet").write_bytes(b"PAR1")  # never finished
    with pytest.raises(BadData, match=r"2 of 4 shards have no labels yet: unlabelled-00001.tar, unlabelled-00002.tar"):
        select_from(source_of(labels, shards), tmp_path / "out", Asked(per_class=10))
    said = select_from(source_of(labels, shards), tmp_path / "out", Asked(per_class=10, incomplete=True))
    held, columns = read(tmp_path / "out")
    assert held["incomplete"] == {"shards": 2, "pictures": 100}
    assert "2 shards with 100 pictures have no labels yet" in str(said)
    label, doubt = columns_of(parts)
    there = [-1 if 50 <= i < 150 else c for i, c in enumerate(label)]
    assert by_class(columns) == reference(there, doubt, most_doubt=SEVEN_TENTHS, per_class=10)
    shutil.rmtree(tmp_path / "labels")
    labels = labels_of(tmp_path / "labels", 3, shards)
    with pytest.raises(BadData, match="no shard is labelled yet"):
        select_from(source_of(labels, shards), tmp_path / "none", Asked(incomplete=True))


def test_files_of_another_plan_shard_or_stranger_are_refused_by_name(tmp_path):
    parts = random_parts(14, 2, 30, 3)
    labels, shards = folder_of(tmp_path / "labels", parts, 3)
    good = table(labels.schema, *parts[1], classes=3)
    path = tmp_path / "labels" / "unlabelled-00001.parquet"

    def refused(match):
        with pytest.raises(BadData, match=match) as error:
            select_from(source_of(labels, shards), tmp_path / "out", Asked(per_class=5))
        assert "unlabelled-00001" in str(error.value)

    foreign = dataclasses.replace(labels, plan=labels.plan | {"batch_images": 16})
    write(foreign, shards[1], good)
    (tmp_path / "labels" / "unlabelled-00001.parquet").write_bytes(path.read_bytes())
    refused("is of another plan than labels.json")
    write(labels, shards[1]._replace(sha256="0" * 64), good)
    refused("of a shard of 30 pictures with the sha256 0000")
    write(labels, shards[1], good.slice(0, 29))
    refused("it is of a shard of 29 pictures")
    write(labels, shards[1], good.append_column("note", pa.array(["x"] * 30)))
    refused(r"its columns are not those of its plan: note \(string\) is unknown")
    write(labels, shards[1], good.drop_columns(["look_hash"]))
    refused("look_hash is missing, not uint64")
    write(labels, shards[1], good.set_column(3, "doubt", good.column("doubt").cast(pa.float64())))
    refused("doubt is double, not float")
    pa.parquet.write_table(good, path)  # without our footer
    refused("no label file")
    write(labels, shards[1], good.set_column(0, "sample", pa.array(np.arange(30)[::-1].astype(np.int32))))
    refused("its rows are not the pictures of the shard")
    for name, values, match in (
        ("class", np.full(30, 7, np.int16), "outside 0 to 2|class 7, and the teacher has 3"),
        ("doubt", np.full(30, np.nan, np.float32), "a doubt outside 0 to 1"),
        ("doubt", np.full(30, -1, np.float32), "a doubt outside 0 to 1"),
    ):
        at = good.schema.names.index(name)
        write(labels, shards[1], good.set_column(at, name, pa.array(values)))
        with pytest.raises(BadData, match=match):
            select_from(source_of(labels, shards), tmp_path / "out", Asked(per_class=5))
    write(labels, shards[1], good)
    shutil.copy(path, tmp_path / "labels" / "unlabelled-00007.parquet")
    with pytest.raises(BadData, match=r"labels of no shard of the data set: unlabelled-00007.parquet; remove them"):
        source_of(labels, shards)


def test_what_cannot_be_asked_for_is_refused(tmp_path):
    for wrong, match in (
        ({"per_class": 0}, "--per-class is 0"),
        ({"confidence": 1.5}, "--confidence is 1.5"),
        ({"rule": "dice"}, "--rule is 'dice': one of label, rank"),
        ({"near_bits": 8}, "--near 8: 0 or more, and 0 to 7"),
        ({"max_copies": -1}, "--max-copies is -1"),
    ):
        with pytest.raises(BadData, match=match):
            Asked(**wrong)


# ---- warnings


def test_a_teacher_that_sees_one_class_everywhere_is_warned_of_with_its_share(tmp_path):
    held, _ = selected(tmp_path, [(np.zeros(500, int), np.full(500, 0.01))], 10, Asked(per_class=20))
    assert any("class 0 (100.0%); the teacher may be broken" in warning for warning in held["warnings"])
    label = np.concatenate([np.zeros(300, int), np.arange(700) % 10])  # a third and a little
    held, _ = selected(tmp_path, [(label, np.full(1000, 0.01))], 10, Asked(per_class=20), "a third")
    assert any("class 0 (37.0%)" in warning for warning in held["warnings"])
    held, _ = selected(tmp_path, [(np.arange(1000) % 10, np.full(1000, 0.01))], 10, Asked(per_class=20), "even")
    assert held["warnings"] == []
    held, _ = selected(tmp_path, [(np.arange(1000) % 2, np.full(1000, 0.01))], 2, Asked(per_class=20), "two")
    assert held["warnings"] == []


def test_few_candidates_many_copies_and_doubtful_classes_are_warned_of(tmp_path):
    doubt = np.full(1000, 0.9)
    doubt[:90] = 0.1
    held, _ = selected(tmp_path, [(np.arange(1000) % 9, doubt)], 9, Asked(per_class=10))
    assert any("only 90 of 1,000 pictures (9.0%) may be taken" in warning for warning in held["warnings"])
    label = np.array([0] * 50 + [1] * 50 + [2] * 50 + [3] * 4)
    doubt = np.where(label == 2, 0.25, 0.1)
    held, _ = selected(tmp_path, [(label, doubt)], 4, Asked(per_class=50), "copies")
    assert any("class 3 (13); --max-copies" in warning for warning in held["warnings"])
    assert any("1 classes are taken with twice the doubt" in warning for warning in held["warnings"])
    assert any("class 2 (0.27)" in warning for warning in held["warnings"])


def test_the_teachers_names_reach_a_terminal_harmless(tmp_path):
    names = ["a", "b\x1b[31m\n", "c"]
    label = np.zeros(40, int)
    held, _ = selected(tmp_path, [(label, np.full(40, 0.1))], names, Asked(per_class=5))
    assert any(r"b\x1b[31m\n" in warning for warning in held["warnings"])
