"""Checkpoints that no crash can halve and any layout can read.

A checkpoint is a folder of safetensors and JSON, nothing pickled:

    out/tiny/step_00000500/rank_00000.safetensors     weights, gate biases, moments, averages: one entry per official
                                                      tensor name, prefixed by what it is ("exp_avg/model.layers.3...")
                           state.json                 step, Config, data identity, counters, every file's hash, and in
                                                      which file each tensor is
                           tokenizer.json
             latest                                   the name of the newest whole checkpoint

Tensors go by the name that the released checkpoint gives them, expert by expert, so a file says nothing of how the run
was laid out over ranks: whoever reads it takes the names it owns. (torch.distributed.checkpoint pickles its metadata.)

The order of writing is what makes a crash harmless: everything goes to a temporary folder, is synced to the disk, the
folder is renamed, and only then does `latest` change, by a rename too. The last two are kept. The room knows nothing of
the model.
"""
import hashlib
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from configs import UserError

KEEP = 2


def write_atomic(path, text):
    """Replace the file `path` by `text`; a reader sees the old content or the new, whatever happens in between."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def sync(path):
    """Ask the operating system to put a file, or a folder's list of names, on the disk."""
    if os.name == "nt" and Path(path).is_dir():                                       # Windows syncs no folders
        return
    fd = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def file_hash(path):
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def save_checkpoint(out_dir, step, tensors, state, tokenizer):
    """Write {name: tensor} and the JSON-able `state` as the checkpoint of `step`; returns its folder.

    tokenizer: text of tokenizer.json. Keeps the last KEEP checkpoints. UserError if the disk is full or not writable:
    the checkpoints before this one stay whole.
    """
    out_dir = Path(out_dir)
    final = out_dir / f"step_{step:08d}"
    temporary = out_dir / f"step_{step:08d}.tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        # Views share memory with their parameter, and safetensors wants each tensor in one piece of its own.
        save_file({name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()},
                  temporary / "rank_00000.safetensors")
        (temporary / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
        files = {p.name: file_hash(p) for p in sorted(temporary.iterdir())}
        index = dict.fromkeys(tensors, "rank_00000.safetensors")
        state = {"format": 1, "step": step, "files": files, **state, "index": index}
        write_atomic(temporary / "state.json", json.dumps(state, indent=1))
        for path in [*temporary.iterdir(), temporary]:
            sync(path)
        shutil.rmtree(final, ignore_errors=True)                              # a run that was resumed passes here again
        os.rename(temporary, final)
        write_atomic(out_dir / "latest", final.name + "\n")
        sync(out_dir)
    except (OSError, SafetensorError) as e:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(f"{final}: checkpoint could not be written ({e}); those before it are whole: free some "
                        f"space and go on with --resume") from None
    for old in checkpoints(out_dir)[:-KEEP]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def checkpoints(out_dir):
    """Whole checkpoints in out_dir, oldest first."""
    try:
        os.stat(out_dir)
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as e:
        raise UserError(f"--out_dir={str(out_dir)[:80]}: {e.strerror if isinstance(e, OSError) else e}; give another") \
            from None
    return sorted(p for p in Path(out_dir).glob("step_" + 8 * "[0-9]") if (p / "state.json").is_file())


def latest(out_dir):
    """The newest checkpoint of a run, or `out_dir` itself if it is one. UserError if there is none."""
    out_dir = Path(out_dir)
    if (out_dir / "state.json").is_file():
        return out_dir
    have = checkpoints(out_dir)
    if not have:
        raise UserError(f"{out_dir}: no checkpoint there; train one first (python train.py config/tiny.py)")
    return have[-1]                            # `latest` may name the one before it: a crash between the two renames


def read_state(path):
    """The state.json of a checkpoint folder as a dict. UserError if it is not one or is damaged."""
    path = Path(path) / "state.json"
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        right = all(isinstance(state[key], kind) for key, kind in (("step", int), ("config", dict), ("files", dict)))
        if state["format"] == 1 and right and state["config"] and state["files"]:
            return state
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise UserError(f"{path}: not a checkpoint of this project, or damaged; remove its folder and use the one before")


def load_checkpoint(path, wanted):
    """Copy every tensor of `wanted` {name: tensor} from the checkpoint folder `path`; returns its state.

    UserError if a file is truncated or altered (its hash tells), or a tensor is missing or of another shape.
    """
    path, state, missing = Path(path), read_state(path), dict(wanted)
    for file, digest in state["files"].items():
        if not (path / file).is_file() or file_hash(path / file) != digest:
            raise UserError(f"{path / file}: missing, truncated or altered (its hash differs from state.json's); "
                            f"remove {path} and use the checkpoint before it")
    for file in (f for f in state["files"] if f.endswith(".safetensors")):
        with safe_open(path / file, framework="pt") as f:
            for name in set(missing) & set(f.keys()):
                tensor, target = f.get_tensor(name), missing.pop(name)
                if tensor.shape != target.shape:
                    raise UserError(f"{path / file}: {name} has shape {list(tensor.shape)}, this model "
                                    f"{list(target.shape)}; was the config changed?")
                with torch.no_grad():
                    target.copy_(tensor)
    if missing:
        raise UserError(f"{path}: tensor {sorted(missing)[0]} is missing ({len(missing)} in all); "
                        f"was the config changed?")
    return state
