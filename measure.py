"""What every section of bench.py measures with: commands run, kernels timed, results recorded."""
import datetime
import gc
import json
import multiprocessing
import os
import platform
import re
import statistics
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import backend
from configs import UserError
from parallel import write_atomic

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"


# --- running and recording --------------------------------------------------------------------------------------------

def processor():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def here():
    """The machine, its software and the day: what a figure holds for."""
    return {"date": datetime.date.today().isoformat(), "python": platform.python_version(), "torch": torch.__version__,
            "cpu": f"{processor()}, {os.cpu_count()} cores",
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None}


def kept(section, *parts):
    """{part: what results/<section>.json has of it}, of those that were measured here today: a run of some parts leaves
    the others as they are, and one on another machine leaves none."""
    old = load(section) or {}
    same = all(old.get(key) == value for key, value in here().items())
    return {part: old[part] for part in parts if same and part in old}


def record(section, command, **numbers):
    """Write results/<section>.json: the numbers and where they come from."""
    where = {"command": command, **here()}
    if "data" in numbers:
        numbers["data"]["source"] = Path(numbers["data"]["source"]).name            # not where it lies on this machine
    RESULTS.mkdir(exist_ok=True)
    write_atomic(RESULTS / f"{section}.json", json.dumps({**where, **numbers}, indent=1) + "\n")
    print(f"wrote results/{section}.json")


def chosen(options, key, there):
    """The names in --KEY=A,B,..., in their order; without it all that are `there`. UserError names what is not. A comma
    before a blank is part of a name."""
    names = re.split(r",(?! )", options[key]) if key in options else list(there)
    wrong = next((name for name in names if name not in there), None)
    if wrong is not None:
        raise UserError(f"--{key}={options[key]}: there are {', '.join(there)}, and no {wrong!r}")
    return names


def lines(out_dir):
    """metrics.jsonl -> (train lines, eval lines)."""
    rows = [json.loads(line) for line in (Path(out_dir) / "metrics.jsonl").read_text().splitlines()]
    return [r for r in rows if "loss" in r], [r for r in rows if "val_loss" in r]


def train(*args, limit=1800, **env):
    """python train.py ARGS in a process of its own, for up to `limit` seconds. UserError if it fails."""
    run = subprocess.run([sys.executable, "train.py", *args], cwd=HERE, timeout=limit, env={**os.environ, **env},
                         stdout=subprocess.DEVNULL if env else None)
    if run.returncode:
        raise UserError(f"train.py {' '.join(args)} ended with exit code {run.returncode}")


def call(arguments, folder):
    """The standard output of python ARGUMENTS, run in `folder`. UserError with its last line if it fails."""
    run = subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True, timeout=1800)
    if run.returncode:
        raise UserError(f"{' '.join(arguments)[:60]} ended with exit code {run.returncode}: "
                        f"{(run.stderr.strip().splitlines() or ['no message'])[-1]}")
    return run.stdout


def checkpoints_of(rows, steps=(100, 200, 400, 500, 1000)):
    """Training loss around each of `steps`, the mean of the ten steps up to it."""
    return {step: statistics.mean(r["loss"] for r in rows[step - 10:step]) for step in steps if step <= len(rows)}


# --- time on a GPU ----------------------------------------------------------------------------------------------------

def compiled_beside(prepare, jobs):
    """prepare(*job) of each job, all at once in processes of their own: what they compile is then in the caches on
    disk, from which this process takes it. One after the other, compiling would take longer than measuring."""
    with ProcessPoolExecutor(min(len(jobs), os.cpu_count()), multiprocessing.get_context("spawn")) as pool:
        for done in [pool.submit(prepare, *job) for job in jobs]:
            done.result(timeout=300)


def replayed(run, times=1):
    """run(), so many times in a row, as a CUDA graph -> a function that replays it: the GPU's time alone, without the
    host's launches."""
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            run()
    return lambda run=run: graph.replay()                      # run: holds what the graph reads


def seconds(function, *args, graph=True):
    """Median seconds of function(*args), L2 cold. With graph captured once and replayed, as generation does it: without
    the host's launches, which are most of the time where the work is small."""
    from triton.testing import do_bench
    run = lambda: function(*args)
    return do_bench(replayed(run) if graph else run, warmup=20, rep=100, return_mode="median") / 1e3


def milliseconds(run, rep=100):
    """Median time of run() on the GPU, L2 cold, in ms; measured for `rep` ms."""
    from triton.testing import do_bench
    return do_bench(run, warmup=rep // 4, rep=rep, return_mode="median")


def in_turn(runs, rounds=5):
    """{name: median time of run(), in ms} of {name: run}: in rounds, so that a GPU that grows warm and slow does so to
    all of them."""
    times = [{name: milliseconds(run, 20) for name, run in runs.items()} for _ in range(rounds)]
    return {name: statistics.median(row[name] for row in times) for name in runs}


def replayed_in_turn(runs, rounds=3, times=4):
    """in_turn of graphs that hold run() so many times: starting a graph takes as long as a short kernel."""
    graphs = {name: replayed(run, times) for name, run in runs.items()}
    return {name: ms / times for name, ms in in_turn(graphs, rounds).items()}


def copy_rate():
    """Bytes per second, read and written, of a copy on this GPU: what a kernel that waits for memory could reach."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target, times = torch.empty_like(source), []
    for _ in range(200):                                       # the first ones find the memory's clock asleep
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return 2 * len(source) / statistics.median(times[100:])


def needs_fp8(section):
    path, why = backend.fp8_kernels(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if path != "Triton":
        raise UserError(f"bench.py {section}: a Hopper GPU with Triton is needed ({why})")


def load(section):
    path = RESULTS / f"{section}.json"
    return json.loads(path.read_text()) if path.exists() else None


def error(y, exact):
    """Relative Frobenius error."""
    return ((y.double() - exact).norm() / exact.norm()).item()


# --- bytes ------------------------------------------------------------------------------------------------------------

class Allocated(TorchDispatchMode):
    """`with Allocated() as memory: ...`: memory.alive() is the bytes that torch has allocated since, and that somebody
    still holds. On a CPU, whose allocator doesn't tell; parameters made before don't count, nor do views of them."""

    def __init__(self):
        super().__init__()
        self.made = {}                                         # where its storage object is: (weak reference, bytes)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)}
        for t in tree_iter(out):
            if isinstance(t, torch.Tensor) and not t.is_meta and (at := t.untyped_storage())._cdata not in given:
                self.made[at._cdata] = StorageWeakRef(at), at.nbytes()
        return out

    def alive(self):
        gc.collect()
        return sum(n for reference, n in self.made.values() if not reference.expired())
