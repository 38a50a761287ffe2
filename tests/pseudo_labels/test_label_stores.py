"""Labels and shards on an object store: listed once, faults waited out, nothing half there, no other plan over ours."""

import os
import random

import fsspec
import pytest
from labelling import Store, contents, manifest, wishes, write_shards, write_teacher

from lambdanets.data import archive
from lambdanets.errors import BadData
from lambdanets.pseudo_labels import label_files
from lambdanets.pseudo_labels.label_files import finished, read_file_of, read_labels
from lambdanets.pseudo_labels.label_shards import label
from lambdanets.pseudo_labels.verify import verify

fsspec.register_implementation("faulty", Store)
OUT = "faulty://bucket/labels"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return write_teacher(tmp_path_factory.mktemp("teacher") / "run")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def made(teacher, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("labels") / "labels"
    label(wishes(teacher, data, out))
    return out


@pytest.fixture
def store(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(archive, "FIRST_PAUSE_S", 0.0)
    Store.store.clear()
    Store.asked.clear()
    Store.pseudo_dirs[:] = [""]
    Store.faults = staticmethod(lambda what, path: None)
    yield Store
    Store.store.clear()
    Store.faults = staticmethod(lambda what, path: None)


def uploaded(data) -> str:
    store = fsspec.filesystem("faulty")
    for path in data.iterdir():
        store.pipe_file(f"/bucket/data/{path.name}", path.read_bytes())
    Store.asked.clear()
    return "faulty://bucket/data"


def stored() -> dict[str, bytes]:
    objects = {path.rpartition("/")[2]: of.getvalue() for path, of in Store.store.items() if "/labels/" in path}
    return {name: objects[name] for name in sorted(objects) if name.endswith(".parquet")}


@pytest.mark.parametrize("workers", [0, 2])
def test_labels_on_a_store_of_shards_on_a_store_are_the_same_bytes(workers, store, made, data, teacher):
    where = uploaded(data)
    label(wishes(teacher, where, OUT, workers=workers))
    assert stored() == contents(made)
    fetched = [name for what, name in Store.asked if what == "read" and name.endswith(".tar")]
    assert sorted(fetched) == sorted(shard["name"] for shard in manifest(data))  # each copied once, and once opened
    assert verify(OUT, where).pictures == 60
    with pytest.raises(BadData, match="names another place, faulty://bucket/data"):
        verify(OUT)
    assert verify(OUT, allow_sources=[where]).pictures == 60
    assert label(wishes(teacher, f"stream:{where}", OUT)).did == {}  # a store without parts is read so in any case


def test_shards_that_changed_on_the_store_fail_and_the_copies_leave_nothing(
    store, data, teacher, tmp_path, monkeypatch
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    where = uploaded(data)
    content = bytearray(Store.store["/bucket/data/unlabelled-00002.tar"].getvalue())
    content[1500] ^= 1
    fsspec.filesystem("faulty").pipe_file("/bucket/data/unlabelled-00002.tar", bytes(content))
    del Store.store["/bucket/data/unlabelled-00004.tar"]
    found = label(wishes(teacher, where, OUT))
    assert set(found.failed) == {"unlabelled-00002.tar", "unlabelled-00004.tar"}
    assert "has the sha256" in found.failed["unlabelled-00002.tar"]
    assert len(stored()) == 4
    assert not [name for name in os.listdir(tmp_path) if name != "cache"]


def test_thirteen_thousand_finished_shards_are_found_by_one_listing_and_no_read(store):
    content = b"PAR1" + bytes(20)
    names = {f"train-{number:05d}.parquet" for number in range(13_000)}
    for name in names:
        fsspec.filesystem("faulty").pipe_file(f"/bucket/labels/{name}", content)
    fsspec.filesystem("faulty").pipe_file("/bucket/labels/empty.parquet", b"")
    fsspec.filesystem("faulty").pipe_file("/bucket/labels/labels.json", b"{}")
    Store.asked.clear()
    assert finished(OUT) == names
    assert Store.asked == [("list", "labels")]


def test_a_start_where_all_is_done_lists_once_and_reads_no_label_and_no_picture(store, data, teacher):
    where = uploaded(data)
    label(wishes(teacher, where, OUT))
    Store.asked.clear()
    assert label(wishes(teacher, where, OUT)).did == {}
    assert [ask for ask in Store.asked if ask[0] == "list"] == [("list", "labels")]
    read = {name for what, name in Store.asked if what == "read"}
    assert not [name for name in read if name.endswith((".parquet", ".tar"))]


def test_a_local_start_opens_no_label_file_either(made, data, teacher, monkeypatch):
    opened = []
    sys_open = os.open

    def counting(path, *args, **how):
        opened.append(str(path))
        return sys_open(path, *args, **how)

    monkeypatch.setattr(os, "open", counting)
    assert label(wishes(teacher, data, made)).did == {}
    assert any("labels.json" in path for path in opened)
    assert not [path for path in opened if path.endswith((".parquet", ".tar"))]


def test_failed_and_late_puts_are_tried_again_and_leave_nothing_half_written(store, made, data, teacher):
    draw = random.Random(3)
    sizes = []

    def faults(what, path):
        if what == "write" and draw.random() < 0.3:
            raise ConnectionError("refused")
        if what == "written":
            sizes.append(min(len(of.getvalue()) for at, of in Store.store.items() if "/labels/" in at))
            if draw.random() < 0.3:
                raise TimeoutError("it arrived, and the answer did not")
        if what in ("read", "list") and draw.random() < 0.1:
            raise ConnectionError("reset")

    Store.faults = staticmethod(faults)
    found = label(wishes(teacher, data, OUT))
    Store.faults = staticmethod(lambda what, path: None)
    assert (len(found.did), found.failed) == (6, {})
    assert stored() == contents(made)
    assert min(sizes) > 100  # never an empty object
    asked = [ask for ask in Store.asked if ask[0] == "write"]
    assert len(asked) > 7  # some were tried again


def test_a_store_that_takes_nothing_ends_the_command_with_path_and_reason(store, data, teacher):
    def refuse(what, path):
        if what == "write" and path.endswith(".parquet"):
            raise OSError(28, "No space left on device")

    Store.faults = staticmethod(refuse)
    with pytest.raises(BadData, match=r"bucket/labels/unlabelled-00000\.parquet.*No space left"):
        label(wishes(teacher, data, OUT))
    assert stored() == {}


def test_a_job_whose_plan_was_overwritten_ends_within_one_shard(store, data, teacher):
    written = []

    def another_job(what, path):
        if what == "written" and path.endswith(".parquet"):
            written.append(path)
            if len(written) == 2:
                other = read_labels(OUT)
                plan = {**other.plan, "batch_images": 9}
                theirs = label_files.Labels(OUT, plan, other.places, other.versions)
                Store.faults = staticmethod(lambda what, path: None)
                fsspec.filesystem("faulty").pipe_file("/bucket/labels/labels.json", theirs.json())

    Store.faults = staticmethod(another_job)
    with pytest.raises(BadData, match="labels of another plan: batch_images was 9, and is 4"):
        label(wishes(teacher, data, OUT))
    assert len(stored()) == 2


def test_of_two_that_begin_at_once_one_writes_and_both_read_the_same(store, made, tmp_path):
    held = read_labels(made)
    first = label_files.Labels(OUT, held.plan, {"teacher": "a"}, held.versions)
    second = label_files.Labels(OUT, held.plan, {"teacher": "b"}, held.versions)
    there = label_files._is_there
    label_files._is_there = lambda home: False  # as both see it
    try:
        assert label_files.begin(first).places == {"teacher": "a"}
        assert label_files.begin(second).places == {"teacher": "a"}
        here = label_files.Labels(str(tmp_path / "new"), held.plan, {"teacher": "a"}, held.versions)
        also = label_files.Labels(str(tmp_path / "new"), held.plan, {"teacher": "b"}, held.versions)
        assert label_files.begin(here).places == {"teacher": "a"}
        assert label_files.begin(also).places == {"teacher": "a"}
        another = label_files.Labels(str(tmp_path / "new"), {**held.plan, "top": 3}, {}, held.versions)
        with pytest.raises(BadData, match="top was 5, and is 3"):
            label_files.check_plan(label_files.begin(another), another)
    finally:
        label_files._is_there = there
    assert os.listdir(tmp_path / "new") == ["labels.json"]


def test_a_remote_label_file_is_read_and_compared_as_a_local_one(store, data, teacher, made):
    label(wishes(teacher, data, OUT))
    labels = read_labels(OUT)
    name = next(iter(stored()))
    rows, footer = read_file_of(labels, name)
    assert label_files.read_footer(labels, name) == footer
    assert rows.equals(read_file_of(read_labels(made), name)[0])
    content = stored()[name]
    fsspec.filesystem("faulty").pipe_file(f"/bucket/labels/{name}", content[:-30])
    for read in (read_file_of, label_files.read_footer):
        with pytest.raises(BadData, match=f"{name} is damaged"):
            read(labels, name)
