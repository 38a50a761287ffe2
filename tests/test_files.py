"""A file appears whole or not at all, and never through a link; what others wrote is not trusted; names are shown."""

import errno
import json
import multiprocessing
import os
import signal
import threading
import time

import pytest
from conftest import runs, until
from hypothesis import given
from hypothesis import strategies as st

from lambdanets import files
from lambdanets.errors import printable, some
from lambdanets.files import field, json_object, lock, open_to_append, placed, read_file, sync_folder, write_atomically


@given(st.text() | st.binary().map(os.fsdecode))
def test_whatever_a_name_holds_it_is_shown_on_one_line_that_any_encoder_takes(name):
    shown = printable(name)
    shown.encode("utf-8")
    assert len(shown.splitlines()) <= 1
    assert not any(ord(letter) < 32 or ord(letter) == 127 for letter in shown)
    assert printable(shown) == shown


@pytest.mark.parametrize(
    "name", ["cat.png", "Käse 3.jpg", "猫/1.png", "می\u200cخواهم", "👩\u200d🔬", "a\\b", "a\u00a0b"]
)
def test_a_name_in_any_script_is_shown_as_it_is(name):
    assert printable(name) == name


def test_what_could_drive_a_terminal_or_turn_a_name_around_is_spelled_out():
    assert printable("a\x1b[2J\r\n\x7f") == "a\\x1b[2J\\r\\n\\x7f"
    assert printable("x\u202egpj.exe") == "x\\u202egpj.exe"
    assert printable(os.fsdecode(b"caf\xe9")) == "caf\\xe9"


@pytest.mark.parametrize(
    ("n", "text"), [(0, ""), (1, "0"), (3, "0, 1, 2"), (4, "0, 1, 2 and 1 more"), (1003, "0, 1, 2 and 1,000 more")]
)
def test_a_long_list_of_names_ends_in_its_number(n, text):
    assert some(range(n), 3) == text


def test_a_link_in_the_place_of_a_file_is_replaced_and_its_target_stays(tmp_path):
    (tmp_path / "secret").write_bytes(b"mine")
    run = tmp_path / "run"
    run.mkdir()
    for name in ("report.html", ".report.html.part", ".report.html.00000000.part"):
        (run / name).symlink_to(tmp_path / "secret")
    write_atomically(run / "report.html", b"new")
    assert (tmp_path / "secret").read_bytes() == b"mine"
    assert (run / "report.html").read_bytes() == b"new"
    assert not (run / "report.html").is_symlink()


@pytest.mark.parametrize("kind", ["link", "dangling", "pipe", "folder"])
def test_nothing_is_appended_to_what_is_no_file_of_its_own(kind, tmp_path):
    path, target = tmp_path / "log.jsonl", tmp_path / "target"
    if kind == "link":
        target.write_bytes(b"mine")
    if kind in ("link", "dangling"):
        path.symlink_to(target)
    if kind == "pipe":
        os.mkfifo(path)
    if kind == "folder":
        path.mkdir()
    with pytest.raises(OSError, match=r"log\.jsonl"):
        open_to_append(path)
    assert target.exists() == (kind == "link")


def test_what_a_killed_writer_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path):
    (tmp_path / ".a.0123abcd.part").write_bytes(b"left")
    (tmp_path / ".b.0123abcd.part").write_bytes(b"another file's")
    with placed(tmp_path / "a") as slow:
        slow.write(b"slow")
        write_atomically(tmp_path / "a", b"fast")
        assert (tmp_path / "a").read_bytes() == b"fast"
        held = sorted(p.name for p in tmp_path.iterdir())
        assert len(held) == 3  # a, b's part, the slow writer's
    assert (tmp_path / "a").read_bytes() == b"slow"
    assert sorted(p.name for p in tmp_path.iterdir()) == [".b.0123abcd.part", "a"]


def test_a_writer_whose_file_another_takes_for_a_leftover_begins_again(tmp_path, monkeypatch):
    real, tidied = files.fcntl.flock, []

    def slow(file, how):
        if not tidied:  # between the new file and its lock another writer comes and tidies up
            tidied.append(len(list(tmp_path.iterdir())))
            files._tidy(os.open(tmp_path, os.O_RDONLY), "a")
            assert not list(tmp_path.iterdir())
        real(file, how)

    monkeypatch.setattr(files.fcntl, "flock", slow)
    write_atomically(tmp_path / "a", b"whole")
    assert tidied == [1]
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"a": b"whole"}


def test_of_many_writers_of_one_file_each_leaves_a_whole_one(tmp_path):
    def write(letter):
        for _ in range(40):
            write_atomically(tmp_path / "a", letter * 5000)

    threads = [threading.Thread(target=write, args=(letter,)) for letter in (b"x", b"y", b"z")]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        if (tmp_path / "a").exists():
            content = (tmp_path / "a").read_bytes()
            assert len(content) == 5000
            assert len(set(content)) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_a_disk_that_synchronises_no_folders_is_lived_with_and_named_once(code, tmp_path, monkeypatch, capsys):
    real = os.fsync

    def refuses(fd):
        if os.path.isdir(f"/proc/self/fd/{fd}"):
            raise OSError(code, os.strerror(code))
        real(fd)

    monkeypatch.setattr(os, "fsync", refuses)
    for content in (b"1", b"2"):
        write_atomically(tmp_path / "a", content)
        assert (tmp_path / "a").read_bytes() == content
    assert capsys.readouterr().err.count("synchronises no folders") == 1


def test_a_disk_in_trouble_is_not_lived_with(tmp_path, monkeypatch):
    def fails(fd):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="Input/output"):
        sync_folder(tmp_path)


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_a_disk_without_locks_is_lived_with_and_named_once(code, tmp_path, monkeypatch, capsys):
    def refuses(file, how):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files.fcntl, "flock", refuses)
    for _ in range(2):
        with open_to_append(tmp_path / "a") as file:
            lock(file, tmp_path)
    write_atomically(tmp_path / "b", b"")
    assert capsys.readouterr().err.count("without locks") == 1


def _hold(path, held, over):
    with open_to_append(path) as file:
        lock(file, path.parent)
        held.set()
        over.wait(30)


def test_what_another_process_holds_is_refused_and_free_after_its_end(tmp_path):
    context = multiprocessing.get_context("fork")
    held, over = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(tmp_path / "a", held, over))
    process.start()
    assert held.wait(30)
    with open_to_append(tmp_path / "a") as file:
        with pytest.raises(BlockingIOError):
            lock(file, tmp_path)
        over.set()
        lock(file, tmp_path, wait=True)
    process.join()


def test_a_pipe_is_not_waited_for_and_a_large_file_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="a pipe or a device"):
        read_file(tmp_path / "pipe")
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(OSError, match="more than 1,000 bytes"):
        read_file(tmp_path / "sparse", 1000)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b'"a"', b"{", b'{"a": NaN}', b"\xff\xfe{}", b"[" * 100_000, b'{"a":' * 100_000, b"1" * 5000]
)
def test_json_of_unknown_origin_is_an_object_or_refused(content):
    with pytest.raises(ValueError, match=r"\S"):
        json_object(content)


_ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)


@given(_ANY, st.sampled_from([int, float, str, bool, list, dict, (str, type(None))]))
def test_a_field_is_of_the_kind_that_was_asked_for_or_refused(value, kind):
    held = json.loads(json.dumps({"key": value}))
    try:
        found = field(held, "key", kind)
    except ValueError as error:
        assert "'key'" in str(error)
        assert type(value) not in (kind if isinstance(kind, tuple) else (kind,))
        assert not (kind is float and type(value) is int)
    else:
        assert found == value
        assert type(found) in (kind if isinstance(kind, tuple) else (kind,))


def _reading(place, ignores_signals):
    if ignores_signals:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    files.end_with_parent()
    (place / str(os.getpid())).touch()
    time.sleep(300)


def _a_program(kind, place):
    """Starts three processes that read, the last of them in a thread that ends."""
    context = multiprocessing.get_context(kind)
    readers = [context.Process(target=_reading, args=(place, number == 1)) for number in range(3)]
    starter = threading.Thread(target=readers[2].start)
    for start in (readers[0].start, readers[1].start, starter.start, starter.join):
        start()
    time.sleep(300)


@pytest.mark.parametrize("kind", ["fork", "spawn", "forkserver"])
def test_a_process_that_reads_is_gone_soon_after_a_kill_of_the_one_that_started_it(kind, children, tmp_path):
    program = children.start(_a_program, kind, tmp_path)
    until(lambda: len(list(tmp_path.glob("[0-9]*"))) == 3)
    pids = [path.name for path in tmp_path.glob("[0-9]*")]
    time.sleep(1.5)
    assert all(map(runs, pids))
    os.kill(program.pid, signal.SIGKILL)
    until(lambda: not any(map(runs, pids)), timeout_s=10)
