"""A teacher's labels: right, each picture once, the same whoever made them and however often they were killed."""

import pytest
from labelling import CLASSES, contents, manifest, table, wishes, write_shards, write_teacher

from lambdanets.pseudo_labels.label_shards import label


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return write_teacher(tmp_path_factory.mktemp("teacher") / "run")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def made(teacher, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("labels") / "labels"
    print(label(wishes(teacher, data, out)))
    return out


def test_every_picture_has_a_row_in_its_place(made, data):
    assert set(contents(made)) == {shard["name"].replace(".tar", ".parquet") for shard in manifest(data)}
    for shard in manifest(data):
        rows = table(made, shard["name"])
        assert rows.column("sample").to_pylist() == list(range(shard["samples"]))
        assert rows.column("error").null_count == shard["samples"]
        assert set(rows.column("class").to_pylist()) <= set(range(len(CLASSES)))
        print(rows.column("class").to_pylist())
