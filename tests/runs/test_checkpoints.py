"""Checkpoints: exact, never half there, found by number, verified; what a kill, a full disk or a flipped bit leaves."""

import errno
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import safetensors.torch
import timm.optim
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lambdanets
import lambdanets.runs.checkpoints
from lambdanets.errors import BadRun, NonFiniteState
from lambdanets.runs.checkpoints import Checkpoints, newest_checkpoint, read_checkpoint
from lambdanets.runs.nested_state import DTYPES, flatten, unflatten
from lambdanets.runs.weights import read_weights


def state_of(step):
    """A state that says of which step it is."""
    return {"step": step, "model": {"w": torch.full((300,), float(step)), "n": torch.tensor(step)}}


def is_of(step, state):
    wanted = state_of(step)["model"]
    return state["step"] == step and all(torch.equal(state["model"][k], wanted[k]) for k in wanted)


def save(folder, *steps, **how):
    with Checkpoints(folder, keep_last=how.pop("keep_last", 99)) as store:
        for step in steps:
            store.save(step, state_of(step), **how)


def steps_in(folder):
    return sorted(int(p.name.removeprefix("step-")) for p in folder.glob("step-*") if p.suffix != ".bad")


def hidden_in(folder):
    return sorted(p.name for p in folder.iterdir() if p.name.startswith(".step"))


# --- exactness --------------------------------------------------------------------------------------------------------


def same(a, b):
    """Equal to the bit, the types of containers and the memory formats too."""
    if isinstance(a, torch.Tensor):
        bits = torch.uint8 if a.dtype.itemsize == 1 else {2: torch.int16, 4: torch.int32, 8: torch.int64}
        if not isinstance(bits, torch.dtype):
            bits = bits[a.dtype.itemsize]
        return (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride()) and torch.equal(
            a.view(bits), b.view(bits)
        )
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or (a != a and b != b))


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "lamb": lambda p: timm.optim.Lamb(p, lr=0.01),
}


def model_and_optimizer(name):
    torch.manual_seed(1)
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 36, 2)
    model = nn.Sequential(*layers).to(memory_format=torch.channels_last)
    return model, OPTIMIZERS[name]([{"params": model[:2].parameters(), "lr": 0.02}, {"params": model[3].parameters()}])


def steps(model, optimizer, first, last):
    for step in range(first, last):
        images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(images.to(memory_format=torch.channels_last)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimiser_goes_on_from_its_checkpoint_to_the_bit(name, tmp_path):
    model, optimizer = model_and_optimizer(name)
    steps(model, optimizer, 0, 3)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}
    with Checkpoints(tmp_path) as store:
        store.save(3, state)
        store.wait()
        loaded = store.newest().load()
    assert same(loaded["optimizer"], state["optimizer"])
    assert same(loaded["rng"], state["rng"])
    assert loaded["model"]["0.weight"].is_contiguous(memory_format=torch.channels_last)

    other, its_optimizer = model_and_optimizer(name)
    steps(other, its_optimizer, 7, 9)  # elsewhere, so that loading is what makes them equal
    other.load_state_dict(loaded["model"])
    its_optimizer.load_state_dict(loaded["optimizer"])
    steps(model, optimizer, 3, 6)
    steps(other, its_optimizer, 3, 6)
    assert same(dict(other.state_dict()), dict(model.state_dict()))
    assert same(its_optimizer.state_dict(), optimizer.state_dict())


LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(),
    st.sampled_from(
        [
            torch.tensor(3),
            torch.tensor([True, False]),
            torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
            torch.randn(3, 4).t(),
            torch.zeros(0, 3),
            torch.randn(5).bfloat16(),
            torch.randn(2, dtype=torch.float64),
        ]
    ),
)
KEYS = st.one_of(st.text(), st.integers(), st.sampled_from(["$tensor", "$items", "__metadata__", "a/b", ""]))
STATES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner), st.lists(inner).map(tuple), st.dictionaries(KEYS, inner), st.dictionaries(st.text(), inner)
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(STATES)
def test_any_nested_state_survives_being_taken_apart(state):
    tensors, tree = flatten(state)
    tensors = {name: value.contiguous() for name, value in tensors.items()}  # as a file holds them
    assert same(unflatten(tensors, json.loads(json.dumps(tree, allow_nan=False))), state)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a": [1, {"f": print}]}, "a/1/f is a builtin_function_or_method"),
        ({"a": {(1, 2): 3}}, r"a has the key \(1, 2\)"),
        ({"s": torch.eye(2).to_sparse()}, "s is a tensor of torch.float32, torch.sparse_coo"),
        ({"b": b"x"}, "b is a bytes"),
    ],
)
def test_what_a_checkpoint_cannot_hold_is_named_by_its_path(state, message, tmp_path):
    with Checkpoints(tmp_path) as store, pytest.raises(TypeError, match=message):
        store.save(1, state)
    assert not steps_in(tmp_path)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_kind_of_tensor_is_read_back_by_the_library(dtype, tmp_path):
    wide = torch.arange(15).view(3, 5) % 2 if dtype == torch.bool else torch.arange(15).view(3, 5)
    state = {"odd": torch.arange(3, dtype=torch.uint8), "x": wide.to(dtype), "no": torch.zeros(0, dtype=dtype)}
    state |= {"number": wide[1, 2].to(dtype), "turned": wide.to(dtype).t()}
    with Checkpoints(tmp_path) as store:
        store.save(1, state)
    assert same(newest_checkpoint(tmp_path).load(), state)
    library = safetensors.torch.load((tmp_path / "step-1" / "tensors.safetensors").read_bytes())
    assert all(same(library[name], value.contiguous()) for name, value in state.items())


def test_a_save_holds_the_values_of_its_moment_and_a_loaded_state_is_its_own(tmp_path):
    weight = torch.ones(10_000)
    with Checkpoints(tmp_path) as store:
        for _ in range(5):
            store.save(1, {"w": weight})
            weight.add_(1)
        store.wait()
        first = store.newest().load()["w"]
        assert torch.equal(first, torch.full_like(first, 5))
        first.zero_()
        assert torch.equal(store.newest().load()["w"], weight - 1)


def test_a_save_stalls_for_at_most_twice_the_copy_of_the_state(tmp_path, monkeypatch):
    state = {str(i): torch.ones(2**20) for i in range(8)}  # 32 MiB
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (time.sleep(0.05), sync(fd)))  # a slow disk
    copies, saves, writes = [], [], []
    with Checkpoints(tmp_path) as store:
        for step in range(5):
            start = time.perf_counter()
            kept = [value.clone() for value in state.values()]
            copies.append(time.perf_counter() - start)
            del kept
            start = time.perf_counter()
            store.save(step, state)
            saves.append(time.perf_counter() - start)
            store.wait()
            writes.append(time.perf_counter() - start)
    assert min(saves) <= 2 * min(copies) + 0.002
    assert min(writes) > 0.2  # the rest was done beside it


# --- which one is the newest, which ones are kept ------------------------------------------------------------------


def test_the_newest_is_the_highest_number(tmp_path):
    save(tmp_path, 9, 10, 2)
    (tmp_path / "step-0011").mkdir()  # not a name that a save gives
    assert newest_checkpoint(tmp_path).step == 10
    assert is_of(10, newest_checkpoint(tmp_path).load())


def test_no_checkpoint_is_none(tmp_path):
    assert newest_checkpoint(tmp_path / "missing") is None
    with Checkpoints(tmp_path / "new" / "run") as store:
        assert store.newest() is None


def test_the_last_k_the_best_and_the_milestones_are_kept_across_restarts(tmp_path):
    save(tmp_path, 1, keep_last=2, milestone=True)
    save(tmp_path, 2, keep_last=2, best=True)
    save(tmp_path, 3, 4, 5, keep_last=2)
    assert steps_in(tmp_path) == [1, 2, 4, 5]
    save(tmp_path, 6, keep_last=2, best=True)  # the better one is in place, the best before goes
    save(tmp_path, 7, 8, keep_last=2)
    assert steps_in(tmp_path) == [1, 6, 7, 8]
    assert not hidden_in(tmp_path)


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path):
    with Checkpoints(tmp_path) as store:
        store.save(4, {"epoch": 1})
        store.save(4, {"epoch": 2})
    assert newest_checkpoint(tmp_path).load() == {"epoch": 2}
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "step-4"]


MARKED = st.lists(st.tuples(st.integers(1, 3), st.booleans(), st.booleans(), st.booleans()), min_size=1, max_size=10)


@settings(max_examples=40, deadline=None)
@given(MARKED)
def test_what_a_step_is_kept_for_only_grows_whoever_saves_it_again(saves):
    """Saves of a few steps, with marks and without, in one process or after a restart."""
    want = {}
    with tempfile.TemporaryDirectory() as folder:
        store = Checkpoints(folder, keep_last=99)
        for step, best, milestone, restart in saves:
            if restart:
                store.close()
                store = Checkpoints(folder, keep_last=99)
            store.save(step, state_of(step), best=best, milestone=milestone)
            before = want.get(step, (False, False))
            want[step] = best or before[0], milestone or before[1]
        store.close()
        for step, marks in want.items():
            found = json.loads((Path(folder) / f"step-{step}" / "manifest.json").read_text())
            assert (found["best"], found["milestone"]) == marks


def no_space():
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(("fails", "restart"), [(False, False), (False, True), (True, False)])
def test_a_milestone_and_the_best_outlive_a_save_of_the_same_step_without_a_mark(fails, restart, tmp_path, monkeypatch):
    store = Checkpoints(tmp_path, keep_last=1, say=lambda line: None)
    with monkeypatch.context() as patched:
        if fails:
            patched.setattr(lambdanets.runs.checkpoints, "written", lambda *rest: no_space())
        store.save(3, state_of(3), milestone=True)
        store._join()
    if restart:
        store.close()
        store = Checkpoints(tmp_path, keep_last=1)
    store.save(3, state_of(3))
    store.save(4, state_of(4), best=True)
    store.save(4, state_of(4))
    store.save(5, state_of(5))
    store.save(6, state_of(6))
    store.close()
    assert steps_in(tmp_path) == [3, 4, 6]
    kept = [json.loads((tmp_path / f"step-{n}" / "manifest.json").read_text()) for n in (3, 4, 6)]
    assert [(m["best"], m["milestone"]) for m in kept] == [(False, True), (True, False), (False, False)]


# --- whose they are ---------------------------------------------------------------------------------------------------


def manifest_of(folder, number, changes):
    """Rewrite a manifest, with its own sha256 right; None takes a field out."""
    path = folder / f"step-{number}" / "manifest.json"
    manifest = {**json.loads(path.read_text()), **changes}
    del manifest["sha256"]
    manifest = {name: value for name, value in manifest.items() if value is not None or name == "run"}
    path.write_bytes(lambdanets.runs.checkpoints._manifest_bytes(manifest))


@pytest.mark.parametrize("step", [1, 9], ids=["older", "newer"])
@pytest.mark.parametrize(("ours", "theirs"), [("a" * 16, "b" * 16), ("a" * 16, None), (None, "b" * 16)])
def test_a_checkpoint_of_another_run_is_refused_neither_used_nor_passed_over(ours, theirs, step, tmp_path):
    for name, run, number in (("mine", ours, 5), ("other", theirs, step)):
        with Checkpoints(tmp_path / name, run=run) as store:
            store.save(number, state_of(number))
    shutil.move(tmp_path / "other" / f"step-{step}", tmp_path / "mine")
    with Checkpoints(tmp_path / "mine", run=ours) as store, pytest.raises(BadRun) as caught:
        store.newest()
    assert f"step-{step} is a checkpoint of another run" in str(caught.value)
    assert "move it out of" in str(caught.value)
    assert steps_in(tmp_path / "mine") == sorted([5, step])
    shutil.rmtree(tmp_path / "mine" / f"step-{step}")
    shutil.copytree(tmp_path / "mine", tmp_path / "copy")  # a copied run is that run
    with Checkpoints(tmp_path / "copy", run=ours) as store:
        assert store.newest().step == 5
        assert store.newest().run == ours


def test_a_checkpoint_from_before_runs_had_a_name_is_read(tmp_path):
    save(tmp_path, 4)
    path = tmp_path / "step-4" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["sha256"], manifest["run"]
    path.write_bytes(lambdanets.runs.checkpoints._manifest_bytes(manifest))
    with Checkpoints(tmp_path) as store:
        assert is_of(4, store.newest().load())


def test_a_checkpoint_of_a_newer_version_is_no_damage(tmp_path, capsys):
    save(tmp_path, 4, 5)
    manifest_of(tmp_path, 5, {"format": 2})
    for read in (newest_checkpoint, lambda folder: read_checkpoint(folder / "step-5")):
        with pytest.raises(
            BadRun, match=r"step-5 was written by a newer lambdanets: its format is 2, this one reads 1"
        ):
            read(tmp_path)
    with Checkpoints(tmp_path) as store, pytest.raises(BadRun, match="newer lambdanets"):
        store.newest()
    assert steps_in(tmp_path) == [4, 5]
    assert "damaged" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes",
    [
        {"step": "5"}, {"step": True}, {"files": []}, {"files": {"state.json": 3}}, {"files": {}}, {"format": "1"},
        {"files": {"state.json": {"bytes": "2", "sha256": ""}}}, {"format": 0}, {"step": None},
    ],
    ids=str,
)  # fmt: skip
def test_a_manifest_of_wrong_types_is_damage(changes, tmp_path):
    save(tmp_path, 4, 5)
    manifest_of(tmp_path, 5, changes)
    said = []
    assert newest_checkpoint(tmp_path, said.append).step == 4
    assert "step-5 is damaged (manifest.json" in said[0]


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "tensors.safetensors"])
def test_a_pipe_in_a_checkpoint_is_not_waited_for(name, tmp_path):
    save(tmp_path, 4, 5)
    (tmp_path / "step-5" / name).unlink()
    os.mkfifo(tmp_path / "step-5" / name)
    assert newest_checkpoint(tmp_path, lambda line: None).step == 4


# --- links of strangers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["part", "old", "gone", ""])
@pytest.mark.parametrize("dangling", [False, True])
def test_a_link_where_a_checkpoint_goes_is_replaced_and_its_target_stays(suffix, dangling, tmp_path):
    run, outside = tmp_path / "run", tmp_path / "outside"
    run.mkdir()
    if not dangling:
        outside.mkdir()
        (outside / "precious").write_text("mine")
    (run / (f".step-5.{suffix}" if suffix else "step-5")).symlink_to(outside)
    with Checkpoints(run) as store:
        for step in (5, 6, 5, 7, 8, 9):
            store.save(step, state_of(step))
    assert steps_in(run) == [7, 8, 9]
    assert not hidden_in(run)
    assert [p.name for p in tmp_path.iterdir() if p != run] == ([] if dangling else ["outside"])
    if not dangling:
        assert [p.read_text() for p in outside.iterdir()] == ["mine"]


def test_a_lock_that_is_a_link_is_refused_and_its_target_stays(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(BadRun, match=r"cannot be written .*links"):
        Checkpoints(tmp_path / "run")
    assert (tmp_path / "precious").read_text() == "mine"


# --- damage -----------------------------------------------------------------------------------------------------------


def damages(path):
    """Ways to damage a file: (what, a function); flips cover each of its regions."""
    size, draw = path.stat().st_size, random.Random(path.name)

    def flip(bit):
        content = bytearray(path.read_bytes())
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)

    bits = [0, 8 * size - 1, *(draw.randrange(8 * size) for _ in range(25))]
    yield from ((f"bit {bit}", lambda bit=bit: flip(bit)) for bit in bits)
    yield from ((f"cut to {n}", lambda n=n: os.truncate(path, n)) for n in (0, size // 2, size - 1))
    yield "grown", lambda: path.write_bytes(path.read_bytes() + b"\n")
    yield "missing", path.unlink


def test_any_flipped_bit_or_cut_byte_is_found_and_the_one_before_is_used(tmp_path):
    save(tmp_path, 9, 10)
    newest = tmp_path / "step-10"
    files = sorted(newest.iterdir())
    assert [p.name for p in files] == ["manifest.json", "state.json", "tensors.safetensors"]
    tried = 0
    for path in files:
        whole = path.read_bytes()
        for what, damage in damages(path):
            damage()
            said = []
            found = newest_checkpoint(tmp_path, said.append)
            assert found.step == 9, (path.name, what)
            assert len(said) == 1
            assert str(newest) in said[0]
            assert path.name in said[0]
            path.write_bytes(whole)
            tried += 1
        assert newest_checkpoint(tmp_path, pytest.fail).step == 10
    assert tried == 3 * 32


def test_a_damaged_checkpoint_is_put_aside_and_cannot_displace_a_good_one(tmp_path, capsys):
    save(tmp_path, 1, 8, 9)
    for step in (8, 9):
        (tmp_path / f"step-{step}" / "state.json").write_bytes(b"{}")
    with Checkpoints(tmp_path, keep_last=1) as store:
        assert store.newest().step == 1
        assert capsys.readouterr().err.count("is damaged (state.json has 2 bytes") == 2
        for step in (2, 3):
            store.save(step, state_of(step))
            store.wait()
            assert is_of(step, store.newest().load())
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-3", "step-8.bad", "step-9.bad"]


def test_a_folder_that_is_not_the_steps_own_is_found(tmp_path):
    save(tmp_path, 1, 2)
    (tmp_path / "step-2").rename(tmp_path / "step-3")
    assert newest_checkpoint(tmp_path, lambda line: None).step == 1


def test_no_good_checkpoint_is_an_error_and_never_a_start_from_scratch(tmp_path):
    save(tmp_path, *range(1, 13))
    for step in range(1, 13):
        (tmp_path / f"step-{step}" / "tensors.safetensors").unlink()
    with pytest.raises(BadRun, match="12 checkpoints and none can be read") as caught:
        newest_checkpoint(tmp_path)
    assert "step-12: tensors.safetensors is missing" in str(caught.value)
    assert "and 2 more" in str(caught.value)
    with Checkpoints(tmp_path) as store, pytest.raises(BadRun, match="none can be read"):
        store.newest()
    assert steps_in(tmp_path) == list(range(1, 13))  # still there to be looked at


def test_a_manifest_cannot_name_a_file_elsewhere(tmp_path):
    from lambdanets.runs.checkpoints import _manifest_bytes

    save(tmp_path, 1)
    path = tmp_path / "step-1" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["sha256"]
    manifest["files"]["../x"] = manifest["files"].pop("state.json")
    path.write_bytes(_manifest_bytes(manifest))
    with pytest.raises(BadRun, match="outside the folder"):
        newest_checkpoint(tmp_path)


def test_a_state_with_a_nan_is_refused_and_the_one_before_stays(tmp_path):
    save(tmp_path, 1)
    broken = state_of(2)
    broken["model"]["w"][7] = math.nan
    store = Checkpoints(tmp_path)
    store.save(2, broken)
    with pytest.raises(NonFiniteState, match="step 2 was not written: 1 tensors are not finite: model/w"):
        store.wait()
    with pytest.raises(NonFiniteState):
        store.check()
    store.close()
    assert is_of(1, newest_checkpoint(tmp_path).load())
    assert not hidden_in(tmp_path)


# --- faults of the disk -----------------------------------------------------------------------------------------------

CALLS = ("open", "write", "fsync", "close", "mkdir", "rename", "replace", "unlink", "rmdir", "listdir", "scandir")


class Disk:
    """os's calls, counted; the ones that `fails` says fail. `before` is called before each."""

    def __init__(self, monkeypatch, fails=lambda number: False, before=lambda: None):
        self.number, self.inside = 0, False
        for name in CALLS:
            monkeypatch.setattr(os, name, self.wrapped(name, getattr(os, name), fails, before))

    def wrapped(self, name, call, fails, before):
        def counted(*args, **kwargs):
            if self.inside:
                return call(*args, **kwargs)
            self.number += 1
            self.inside = True
            try:
                before()
            finally:
                self.inside = False
            if fails(self.number):
                if name == "close":
                    call(*args, **kwargs)  # a failing close frees the number all the same
                raise OSError(errno.EIO, f"injected into {name}, call {self.number}")
            return call(*args, **kwargs)

        return counted


def a_save(store, step):
    store.save(step, {**state_of(3), "step": step})
    store._join()  # not wait: its error is expected here


@pytest.mark.parametrize("step", [3, 2], ids=["a new step", "the same step again"])
@pytest.mark.parametrize("broken_for_good", [False, True], ids=["one call", "every call from there"])
def test_after_a_fault_at_any_call_of_a_save_a_complete_checkpoint_loads(step, broken_for_good, tmp_path, monkeypatch):
    lines = []
    faults = 0
    for number in range(1, 1_000):
        folder = tmp_path / str(number)
        save(folder, 1, 2)
        store = Checkpoints(folder, keep_last=1, say=lines.append)
        with monkeypatch.context() as patched:
            disk = Disk(patched, fails=lambda n, at=number: n >= at if broken_for_good else n == at)
            a_save(store, step)
        store.close()
        assert newest_or_after_tidying(folder) >= 2
        save(folder, 4, keep_last=1)  # the fault is over
        assert is_of(4, newest_checkpoint(folder).load())
        assert steps_in(folder) == [4]
        assert not hidden_in(folder)
        faults += disk.number >= number
        if disk.number < number:  # no call was left to fail
            break
        assert lines or not broken_for_good
        lines.clear()
    assert faults >= 25


def newest_or_after_tidying(folder):
    """The step that a restart would go on from; what it loads is whole."""
    with Checkpoints(folder, say=pytest.fail) as store:
        found = store.newest()
        state = found.load()
    assert torch.equal(state["model"]["w"], torch.full((300,), 3.0 if is_of(3, {**state, "step": 3}) else 2.0))
    assert state["step"] == found.step
    assert not hidden_in(folder)
    return found.step


@pytest.mark.parametrize("step", [3, 2], ids=["a new step", "the same step again"])
def test_before_every_call_of_a_save_the_folder_holds_a_complete_checkpoint(step, tmp_path, monkeypatch):
    folder, snapshots = tmp_path / "run", []

    def snapshot():
        snapshots.append(tmp_path / f"at-{len(snapshots)}")
        shutil.copytree(folder, snapshots[-1])

    save(folder, 1, 2)
    with Checkpoints(folder, keep_last=1) as store, monkeypatch.context() as patched:
        Disk(patched, before=snapshot)
        a_save(store, step)
    assert len(snapshots) > 25
    assert {newest_or_after_tidying(at) for at in snapshots} == {2, step}


def test_a_full_disk_keeps_the_last_good_one_and_is_tried_again(tmp_path, monkeypatch):
    said, full = [], False
    write = os.write

    def limited(fd, content):
        if full and len(content) > 100:
            write(fd, content[:100])  # a part is written before the disk is full
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(fd, content)

    monkeypatch.setattr(os, "write", limited)
    store = Checkpoints(tmp_path, say=said.append)
    store.save(1, state_of(1))
    store.wait()
    full = True
    for step in (2, 3):
        store.save(step, state_of(step))
        with pytest.raises(BadRun, match=r"was not written.*No space left"):
            store.wait()
        assert steps_in(tmp_path) == [1]
        assert not hidden_in(tmp_path)
        store.check()  # training goes on
    assert len(said) == 2
    for part in (str(tmp_path / "step-2"), "No space left", "needs 1,208 bytes", "free", "step-1", "1 of 3"):
        assert part in said[0]
    full = False
    store.save(4, state_of(4))
    store.wait()
    assert is_of(4, store.newest().load())

    full = True
    for step in (5, 6, 7):
        store.save(step, state_of(step))
        store._join()
    assert "3 of 3" in said[-1]
    with pytest.raises(BadRun, match=r"3 checkpoints in a row could not be written.*last one is step-4"):
        store.check()
    with pytest.raises(BadRun, match="3 checkpoints in a row"):
        store.save(8, state_of(8))
    store.close()
    assert steps_in(tmp_path) == [1, 4]
    assert not hidden_in(tmp_path)


def test_a_limit_of_the_system_is_met_as_a_full_disk_is(tmp_path, largest_file):
    said = []
    state = {"w": torch.ones(2**18)}  # 1 MiB
    with Checkpoints(tmp_path, say=said.append) as store:
        store.save(1, state)
        store.wait()
        with largest_file(2**19):
            store.save(2, state)
            store._join()
        assert "File too large" in said[0]
        assert steps_in(tmp_path) == [1]
        assert not hidden_in(tmp_path)
        store.save(3, state)
    assert newest_checkpoint(tmp_path).step == 3


def test_a_file_system_of_4_megabytes(tmp_path):
    disk, said = tmp_path / "disk", []
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", disk], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    try:
        with Checkpoints(disk, say=said.append) as store:
            state = {"w": torch.ones(3 * 2**18)}  # 3 MiB
            store.save(1, state)
            store.save(2, state)
            store._join()
            assert "No space left" in said[0]
            assert "1,0" in said[0]  # about a million bytes are free
            assert steps_in(disk) == [1]
            assert not hidden_in(disk)
            store.save(3, {"w": torch.ones(2**10)})
        assert newest_checkpoint(disk).step == 3
    finally:
        subprocess.run(["umount", disk], check=True)


# --- one job a folder -------------------------------------------------------------------------------------------------


def test_a_second_job_in_the_folder_is_refused_until_the_first_ends(tmp_path):
    holder = rf"in use by process {os.getpid()} on .*: wait until it ends"
    with Checkpoints(tmp_path), pytest.raises(BadRun, match=holder):
        Checkpoints(tmp_path)
    Checkpoints(tmp_path).close()


def test_a_folder_that_cannot_be_written_is_an_error_before_anything_is_done(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadRun, match="cannot be written"):
        Checkpoints(tmp_path / "file" / "run")

    folder = Path(tempfile.mkdtemp())  # not below tmp_path, which another user may not enter
    user = os.geteuid()
    try:
        save(folder, 1)
        os.chmod(folder / ".lock", 0o666)  # of an earlier job: that one can be opened still
        os.chmod(folder, 0o555)
        if user == 0:  # root may write anywhere
            os.seteuid(65534)
        with pytest.raises(BadRun, match=r"cannot be written \(.*Permission denied"):
            Checkpoints(folder)
    finally:
        os.seteuid(user)
        os.chmod(folder, 0o755)
        shutil.rmtree(folder)


KILLS = """
import os, random, signal, sys, time
import torch
from pathlib import Path
from lambdanets.runs.checkpoints import Checkpoints

torch.set_num_threads(1)
folder, kills = Path(sys.argv[1]), int(sys.argv[2])
draw = random.Random(kills)

def child(out):
    with Checkpoints(folder, keep_last=2) as store:
        if os.fork() == 0:  # as a loader worker does, it outlives its parent
            os.close(out)
            time.sleep(1)
            os._exit(0)
        found = store.newest()
        step = 0 if found is None else found.step
        os.write(out, b"started\\n")
        while True:
            step += 1
            store.save(step, {"step": step, "w": [torch.full((50_000,), float(step)) for _ in range(3)]})
            if step % 3:
                store.wait()
                os.write(out, f"{step}\\n".encode())

saved = debris = 0
for kill in range(kills):
    back, out = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(back)
        try:
            child(out)
        except BaseException as error:
            print(repr(error), flush=True)
        os._exit(1)
    os.close(out)
    said = os.read(back, 8)
    assert said == b"started\\n", said
    time.sleep(draw.uniform(0, 0.1))
    os.kill(pid, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    said = b""
    while more := os.read(back, 65536):
        said += more
    os.close(back)
    returned = max([saved, *map(int, said.decode().split())])
    debris += any(p.name.startswith(".step") for p in folder.iterdir())
    with Checkpoints(folder, say=lambda line: sys.exit(line)) as store:  # the lock of the killed one is free
        assert not any(p.name.startswith(".step") for p in folder.iterdir())
        found = store.newest()
        if found is None:
            assert returned == 0
            continue
        assert found.step >= returned, (found.step, returned)
        state = found.load()
        assert state["step"] == found.step and len(state["w"]) == 3
        assert all(bool((w == found.step).all()) and len(w) == 50_000 for w in state["w"])
        saved = found.step
print(f"kills {kills} saved {saved} debris {debris}")
"""


def killed(tmp_path, kills):
    code = tmp_path / "kills.py"
    code.write_text(KILLS)
    run = tmp_path / "run"
    run.mkdir()
    done = subprocess.run(
        [sys.executable, code, run, str(kills)], capture_output=True, text=True, cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    words = done.stdout.split()
    assert words[0::2] == ["kills", "saved", "debris"]
    return [int(word) for word in words[1::2]]


def test_kill_9_while_saving_leaves_a_readable_checkpoint_no_older_than_the_last_that_returned(tmp_path):
    kills, saved, _ = killed(tmp_path, 5)
    assert kills == 5
    assert saved > 5  # they did get somewhere


@pytest.mark.slow
def test_kill_9_while_saving_50_times(tmp_path):
    kills, saved, debris = killed(tmp_path, 50)
    assert kills == 50
    assert saved > 50
    assert debris > 10  # many of them hit a save half done


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_ranks_end_with_the_bits_of_a_quiet_run_after_all_faults(tmp_path):
    command = [sys.executable, "-m", "benchmarks.soak", "--minutes", "1", "--every-s", "1", "--out", tmp_path / "soak"]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["weights_equal"], done.stdout
    assert result["history_equal"]
    assert result["bad_images_equal"]
    assert sum(bool(count) for count in result["faults"].values()) >= 4  # more of them in 30 minutes: make soak


# --- weights from elsewhere -------------------------------------------------------------------------------------------


def test_weights_that_do_not_fit_are_told_in_ten_keys_and_with_the_remedy(tmp_path):
    model = lambdanets.create_model("lambda_resnet_tiny", num_classes=3)
    good = {name: value.clone() for name, value in model.state_dict().items()}

    def refusal(tensors):
        safetensors.torch.save_file(tensors, tmp_path / "w.safetensors")
        with pytest.raises((BadRun, RuntimeError)) as caught:
            model.load_state_dict(read_weights(tmp_path / "w.safetensors"))
        assert len(str(caught.value)) < 2_000
        return str(caught.value)

    nans = {name: v * math.nan if v.is_floating_point() else v for name, v in good.items()}
    told = refusal(nans)
    assert str(tmp_path / "w.safetensors") in told
    assert told.count(", ") == 9
    assert f"and {sum(v.is_floating_point() for v in good.values()) - 10} more; take older weights" in told

    other = lambdanets.create_model("lambda_resnet_tiny", num_classes=5).state_dict()
    told = refusal({name: value.clone() for name, value in other.items()})
    assert "fc.bias is (5,), the model's (3,)" in told
    assert "another class count: build the model with that num_classes" in told

    told = refusal({f"module.{name}": value for name, value in good.items()})
    assert f"{len(good)} keys missing" in told
    assert told.count("module.") <= 12
    assert "a prefix such as 'module.'" in told
    assert model.load_state_dict(good)


@pytest.mark.parametrize("old_format", [False, True])
def test_a_pickle_is_refused_unread(old_format, tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    path = tmp_path / "w.safetensors"
    torch.save({"w": Bomb()}, path, _use_new_zipfile_serialization=not old_format)
    with pytest.raises(BadRun, match="is a pickle, and reading one runs what is in it"):
        read_weights(path)
    assert not (tmp_path / "ran").exists()


def test_weights_are_no_pickle_however_long_their_header_is(tmp_path):
    begins = set()
    for letters in range(1, 300):
        path = tmp_path / f"{letters}.safetensors"
        safetensors.torch.save_file({"a" * letters: torch.ones(2)}, path)
        assert torch.equal(read_weights(path)["a" * letters], torch.ones(2))
        begins.add(path.read_bytes()[0])
    assert 0x80 in begins  # as a pickle does


def test_weights_are_found_by_the_folder_of_their_run(tmp_path):
    safetensors.torch.save_file({"a": torch.ones(2)}, tmp_path / "weights.safetensors")
    assert torch.equal(read_weights(tmp_path)["a"], torch.ones(2))
    with pytest.raises(BadRun, match="none does not exist"):
        read_weights(tmp_path / "none")
