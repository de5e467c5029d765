"""Checkpoints: exact, whole whatever happens while they are written, refused when damaged."""
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import build, tiny
from safetensors.torch import load_file, save_file

import parallel
from configs import UserError
from model import V3, official_tensors
from parallel import checkpoints, latest, load_checkpoint, read_state, write_atomic, write_checkpoint

ROOT = Path(__file__).resolve().parent.parent
STATE = {"config": {"dim": 4}, "data": {}, "updates": 3}


def weights(seed=0):
    """{name: view} of two parameters, as a model's official names give them: halves, a column, a transpose, a
    scalar."""
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(6, 4, generator=generator), torch.randn(3, 4, 5, generator=generator)
    return {"up": a[:3], "down": a[3:], "column": a[:, 1], "turned": b[1].T, "b.0": b[0], "all": b, "one": b[2, 1, 1],
            "bf16": a.to(torch.bfloat16), "count": torch.tensor([7, 2**40])}


def save(out_dir, step=1, tensors=None):
    return write_checkpoint(out_dir, step, parallel.copied(tensors or weights(step)), {**STATE}, "{}")


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def refused(function, *args):
    with pytest.raises(UserError) as e:
        function(*args)
    assert "\n" not in str(e.value)
    return str(e.value)


def snapshot(folder):
    """{relative path: bytes} of every file in it."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


# --- written and read -------------------------------------------------------------------------------------------------

def test_views_of_parameters_come_back_bit_for_bit_into_views_of_others(tmp_path):
    folder, saved, target = save(tmp_path, 7), weights(7), weights(8)
    assert not torch.equal(target["up"], saved["up"])
    state = load_checkpoint(folder, {name: t for name, t in target.items() if name != "all"})
    assert all(torch.equal(target[name], t) for name, t in saved.items() if name != "all")
    assert state["step"] == 7 and all(state[key] == value for key, value in STATE.items())


def test_a_whole_model_comes_back_by_official_names_and_a_reader_may_take_a_part(tmp_path):
    one, other = build().float(), V3(tiny(seed=3))
    folder = save(tmp_path, 1, official_tensors(one))
    load_checkpoint(folder, official_tensors(other))
    assert all(torch.equal(t, other.state_dict()[name]) for name, t in one.state_dict().items())
    third = official_tensors(V3(tiny(seed=4)))
    some = {name: t for name, t in third.items() if ".experts.3." in name}
    load_checkpoint(folder, some)
    assert some and all(torch.equal(t, official_tensors(one)[name]) for name, t in some.items())
    assert not torch.equal(third["lm_head.weight"], one.head.weight)


def test_the_last_two_are_kept_and_latest_names_the_newest(tmp_path):
    for step in (2, 4, 10, 12):
        folder = save(tmp_path, step)
        assert latest(tmp_path) == folder and (tmp_path / "latest").read_text() == f"step_{step:08d}\n"
    assert names(tmp_path) == ["latest", "step_00000010", "step_00000012"]
    assert latest(tmp_path / "step_00000010") == tmp_path / "step_00000010"             # a checkpoint is its own latest


def test_a_step_that_is_passed_again_replaces_its_checkpoint(tmp_path):
    save(tmp_path, 2, {"a": torch.zeros(2)})
    load_checkpoint(save(tmp_path, 2, {"a": torch.ones(2)}), {"a": (a := torch.zeros(2))})
    assert a.tolist() == [1, 1] and names(tmp_path) == ["latest", "step_00000002"]


def test_a_copy_that_the_user_made_is_neither_taken_for_the_newest_nor_thrown_away(tmp_path):
    shutil.copytree(save(tmp_path, 2), tmp_path / "step_00000002_good")
    shutil.copytree(tmp_path / "step_00000002", tmp_path / "step_best")
    for step in (4, 6, 8):
        folder = save(tmp_path, step)
    assert latest(tmp_path) == folder
    assert {"step_00000002_good", "step_best", "step_00000006", "step_00000008"} < set(names(tmp_path))


def test_a_checkpoint_is_safetensors_and_json_and_nothing_is_pickled(tmp_path, monkeypatch):
    for pickler in ("save", "load"):
        monkeypatch.setattr(torch, pickler, None)
    folder = save(tmp_path)
    load_checkpoint(folder, {"up": torch.zeros(3, 4)})
    assert names(folder) == ["rank_00000.safetensors", "state.json", "tokenizer.json"]
    assert load_file(folder / "rank_00000.safetensors").keys() == weights().keys()
    assert json.loads((folder / "state.json").read_text())["files"].keys() == set(names(folder)) - {"state.json"}


def test_writing_a_file_anew_leaves_no_second_one(tmp_path):
    write_atomic(tmp_path / "x", "old")
    write_atomic(tmp_path / "x", "new ä")
    assert (tmp_path / "x").read_text(encoding="utf-8") == "new ä" and names(tmp_path) == ["x"]


# --- damage -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("file", ["rank_00000.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["cut short", "a byte changed", "empty", "gone"])
def test_a_damaged_file_is_named_and_no_tensor_is_touched(file, damage, tmp_path):
    folder, target = save(tmp_path), weights(5)
    path = folder / file
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes({"cut short": raw[:-1], "a byte changed": raw}.get(damage, b""))
    if damage == "gone":
        path.unlink()
    message = refused(load_checkpoint, folder, target)
    assert str(path) in message and f"remove {folder}" in message
    assert all(torch.equal(t, target[name]) for name, t in weights(5).items())


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format": 1}',
                                  '{"format": 2, "files": {"a": 1}, "config": {"a": 1}}',
                                  '{"format": 1, "files": {}, "config": {"a": 1}}'])
def test_a_damaged_or_foreign_state_json_is_named(text, tmp_path):
    folder = save(tmp_path)
    (folder / "state.json").write_text(text)
    for read in (read_state, lambda path: load_checkpoint(path, {})):
        assert str(folder / "state.json") in refused(read, folder)
    (folder / "state.json").write_bytes(b"\xff\xfe")
    assert str(folder / "state.json") in refused(read_state, folder)


def test_a_missing_tensor_is_named_and_counted(tmp_path):
    folder = save(tmp_path)
    message = refused(load_checkpoint, folder, {**weights(), "z": torch.zeros(1), "layer.9": torch.zeros(1)})
    assert f"{folder}: tensor layer.9 is missing (2 in all)" in message


def test_another_shape_is_named_with_both(tmp_path):
    message = refused(load_checkpoint, save(tmp_path), {"up": torch.zeros(4, 3)})
    assert "rank_00000.safetensors: up has shape [3, 4], this model [4, 3]" in message


def test_a_folder_without_a_checkpoint_says_how_to_make_one(tmp_path):
    (tmp_path / "step_00000003.tmp").mkdir()
    (tmp_path / "step_00000004").mkdir()                                                # no state.json in it
    for folder in (tmp_path, tmp_path / "nowhere"):
        assert "python train.py config/tiny.py" in refused(latest, folder) and checkpoints(folder) == []


# --- a full disk, a crash ---------------------------------------------------------------------------------------------

def full(*_, **__):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("where", ["tensors", "tokenizer.json", "state.json", "sync", "rename"])
def test_a_full_disk_leaves_the_previous_checkpoint_whole_and_nothing_half(where, tmp_path, monkeypatch):
    folder = save(tmp_path, 2)
    before, atomic = snapshot(tmp_path), parallel.write_atomic
    with monkeypatch.context() as m:
        if where == "tensors":
            m.setattr(parallel, "save_file", lambda tensors, path: path.write_bytes(b"half") and full())
        elif where == "sync":
            m.setattr(parallel.os, "fsync", full)
        elif where == "rename":
            m.setattr(parallel.os, "rename", full)
        else:
            m.setattr(parallel, "write_atomic", lambda path, text: full() if path.name == where else atomic(path, text))
        message = refused(save, tmp_path, 4)
    assert "step_00000004" in message and "No space left on device" in message and "--resume" in message
    assert snapshot(tmp_path) == before and latest(tmp_path) == folder and "step_00000004.tmp" not in names(tmp_path)
    load_checkpoint(folder, weights())
    assert latest(tmp_path) == folder != save(tmp_path, 4) == latest(tmp_path)          # and then there is room again


LIMITED = """
import resource, sys
import torch, parallel
from configs import UserError
out, state = sys.argv[1], {"config": {"dim": 4}}
parallel.write_checkpoint(out, 2, {"a": torch.ones(10)}, state, "{}")
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
try:
    parallel.write_checkpoint(out, 4, {"a": torch.ones(100_000)}, state, "{}")
except UserError as e:
    print(e)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows limits no file sizes")
def test_a_real_limit_of_the_file_size_leaves_the_previous_checkpoint_whole(tmp_path):
    done = subprocess.run([sys.executable, "-c", LIMITED, tmp_path], cwd=ROOT, text=True, capture_output=True,
                          timeout=60)
    assert done.returncode == 0 and done.stdout.count("\n") == 1, done.stderr
    assert re.search(r"step_00000004: checkpoint could not be written \(.*File too large", done.stdout)
    assert names(tmp_path) == ["latest", "step_00000002"]
    load_checkpoint(latest(tmp_path), {"a": (a := torch.zeros(10))})
    assert a.sum() == 10


class Crash(BaseException):
    """The process is gone: no handler runs."""


@pytest.mark.parametrize("last", ["save_file", "state.json", "rename", "latest"])
def test_after_a_crash_the_newest_whole_checkpoint_is_found_and_the_run_can_save_again(last, tmp_path, monkeypatch):
    old = save(tmp_path, 2)

    def crash(*_):
        raise Crash
    atomic = parallel.write_atomic
    with monkeypatch.context() as m:
        if last == "save_file":
            m.setattr(parallel, "save_file", lambda tensors, path: path.write_bytes(b"half") and crash())
        elif last == "rename":
            m.setattr(parallel.os, "rename", crash)
        else:
            m.setattr(parallel, "write_atomic", lambda path, text: crash() if path.name == last else atomic(path, text))
        with pytest.raises(Crash):
            save(tmp_path, 4)
    whole = tmp_path / "step_00000004" if last == "latest" else old                     # renamed: whole, and the newest
    assert latest(tmp_path) == old and checkpoints(tmp_path)[-1] == whole
    load_checkpoint(whole, weights())
    assert save(tmp_path, 4) == latest(tmp_path)
    assert names(tmp_path) == ["latest", "step_00000002", "step_00000004"]


def test_latest_may_be_missing_or_name_what_is_gone(tmp_path):
    save(tmp_path, 2), save(tmp_path, 4)
    (tmp_path / "latest").unlink()
    assert latest(tmp_path) == tmp_path / "step_00000004"
    (tmp_path / "latest").write_text("step_00000009\n")
    assert latest(tmp_path) == tmp_path / "step_00000004"
    shutil.rmtree(tmp_path / "step_00000004")                                           # as the message on damage says
    assert latest(tmp_path) == tmp_path / "step_00000002"


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    assert "could not be written" in refused(save, tmp_path / "file")
    save_file({"a": torch.zeros(1)}, tmp_path / "ok.safetensors")                       # the disk itself is fine
