"""One run on several ranks: the same numbers in every layout, from any checkpoint, and through faults.

Each run is a few processes on the loopback, forked from this one, that call what torchrun would have them call.
"""
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import agree
from safetensors.torch import load_file

import configs
import model
import moe
import parallel
import sample
import train
from configs import Config, UserError
from model import V3, official_tensors
from tokenizer import tokenizer_json

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="processes are forked, which Windows can't")
ROOT = Path(__file__).resolve().parent.parent
STEPS = 20
SMALL = f"""
dim = 32
n_layers = 3
n_heads = 2
inter_dim = 64
moe_inter_dim = 32
kv_lora_rank = 16
qk_nope_head_dim = 8
qk_rope_head_dim = 8
v_head_dim = 16
vocab_size = 260
tokenizer = "bytes"
data = "text.txt"
seq_len = 16
batch_size = 8
micro_batch_size = 1
max_steps = {STEPS}
warmup_steps = 2
lr = 2e-3
min_lr = 1e-3
init_std = 0.1
bias_update_speed = 0.01
ema_decay = 0.9
eval_interval = 10
save_interval = 10
device = "cpu"
timeout = 30
"""


@pytest.fixture(scope="module", autouse=True)
def world(tmp_path_factory):
    """The folder that all runs start in: a text, a config, the token cache."""
    folder = tmp_path_factory.mktemp("world")
    dice, words = random.Random(0), "the cat sees a dog and some bird near our house".split()
    (folder / "text.txt").write_text("".join(" ".join(dice.choices(words, k=6)) + ".\n" for _ in range(100)))
    (folder / "small.py").write_text(SMALL)
    with pytest.MonkeyPatch.context() as m:
        m.chdir(folder)
        m.setenv("NANOV3_CACHE", str(folder / "cache"))
        m.setattr(train, "draw", lambda path: None)                                     # matplotlib takes a second
        yield folder


def rank_main(rank, world, port, log, argv, fault):
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    sys.argv, out = ["train.py", *argv], os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(out, stream)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
    torch.cuda.is_available = lambda: False              # a fork can't use the GPU that its parent may have looked for
    if fault:
        fault(rank)
    parallel.cli(train.main)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(ranks, out_dir, *flags, fault=None, port=None, config="small.py", **changes):
    """Start `ranks` processes; fault(rank), called first in each, may spoil something. argv may depend on the rank."""
    context = multiprocessing.get_context("fork")
    argv = [config, f"--out_dir={out_dir}", *flags, *(f"--{k}={v}" for k, v in changes.items())]
    log, port = Path(f"{out_dir}.log"), port or free_port()
    log.unlink(missing_ok=True)
    processes = [context.Process(target=rank_main, args=(rank, ranks, port, log, argv, fault)) for rank in range(ranks)]
    for p in processes:
        p.start()
    return processes, log


def finish(processes, log, timeout=60):
    """(exit codes, what they said); whoever hasn't ended by then is killed."""
    until = time.time() + timeout
    for p in processes:
        p.join(max(0, until - time.time()))
        if p.is_alive():
            p.kill()
            p.join()
    return [p.exitcode for p in processes], log.read_text()


def go(ranks, out_dir, *flags, **more):
    codes, said = finish(*start(ranks, out_dir, *flags, **more))
    assert codes == [0] * ranks, said
    return said


def metrics(out_dir):
    rows = [json.loads(line) for line in (Path(out_dir) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("time", "tokens_per_s")} for row in rows]


def tensors(out_dir):
    """{name: tensor} of the newest checkpoint, whoever wrote it. Nothing is written twice."""
    folder, out = parallel.latest(out_dir), {}
    for path in sorted(folder.glob("*.safetensors")):
        part = load_file(path)
        assert part and not part.keys() & out.keys()
        out |= part
    assert out.keys() == parallel.read_state(folder)["index"].keys()
    return out


def same(out_dir, whole):
    """The numbers of two runs agree at every step to 1e-5, and all their tensors in relative Frobenius norm."""
    for ours, theirs in zip(metrics(out_dir), metrics(whole), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-7)
    ours, theirs = tensors(out_dir), tensors(whole)
    assert ours.keys() == theirs.keys()
    for kind in ("model", "lm_head", "ema", "exp_avg/", "exp_avg_sq/"):
        names = [name for name in theirs if name.startswith(kind)]
        difference, size = (torch.stack([f(name).double().norm() for name in names]).norm() for f in (
            lambda name: ours[name] - theirs[name], lambda name: theirs[name]))
        print(f"{kind}: relative Frobenius error {difference / size:.1e}")
        assert difference <= 1e-5 * size, kind


@pytest.fixture(scope="module")
def whole(world):
    """The run in one process."""
    go(1, world / "whole")
    return world / "whole"


# --- the same numbers in every layout ---------------------------------------------------------------------------------

LAYOUTS = {
    "1": (1, {}),
    "dp2, every rank updates all": (2, dict(zero1=False)),
    "dp4": (4, {}),
    "pp2": (2, dict(pp=2)),
    "pp4": (4, dict(pp=4)),
    "pp4, 1F1B": (4, dict(pp=4, pipeline="1f1b")),
    "pp2 x dp2": (4, dict(pp=2)),
    "ep2": (2, dict(ep=2)),
    "ep4": (4, dict(ep=4)),
    "ep4 on two machines": (4, dict(ep=4, nodes=2)),
    "dp4 x ep2, every rank updates all": (4, dict(ep=2, zero1=False)),
    "pp2 x ep2": (4, dict(pp=2, ep=2)),
    "pp2 x dp2, DualPipeV, every rank updates all": (4, dict(pp=2, pipeline="dualpipev", zero1=False)),
}


@pytest.fixture(scope="module")
def ran(world, whole):
    """layout -> its finished run, which happens when first asked for."""
    runs = {"1": whole}

    def run(layout):
        if layout not in runs:
            ranks, changes = LAYOUTS[layout]
            runs[layout] = world / layout.replace(" ", "_")
            said = go(ranks, runs[layout], **changes)
            assert said.count("step 1/20 ") == 1 and said.count("val loss") == 2        # one rank speaks
        return runs[layout]
    return run


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_trains_the_model_that_one_process_trains(layout, whole, ran):
    same(ran(layout), whole)


@pytest.mark.parametrize("before, after", [("1", "dp4"), ("dp4", "1"), ("dp4", "pp2"), ("pp4", "ep2"),
                                           ("pp2 x dp2", "dp4 x ep2, every rank updates all"),
                                           ("pp4, 1F1B", "pp2 x dp2"),
                                           ("ep4", "pp2 x ep2"), ("pp2 x ep2", "1")])
def test_what_one_layout_has_saved_another_continues(before, after, whole, ran, tmp_path):
    run = shutil.copytree(ran(before), tmp_path / "run")
    shutil.rmtree(run / "step_00000020")
    ranks, changes = LAYOUTS[after]
    assert "resumed from" in go(ranks, run, "--resume", **changes)
    same(run, whole)


def test_a_sharded_run_is_sampled_evaluated_and_exported_as_any_other(whole, ran, tmp_path):
    v3, tokenizer, _ = sample.load(str(ran("pp2 x dp2")))
    same_v3 = sample.load(str(whole))[0]
    model.save_hf(v3, tmp_path / "hf", tokenizer_json(tokenizer))
    for name, tensor in official_tensors(model.from_hf(tmp_path / "hf")).items():
        agree(tensor, official_tensors(same_v3)[name], 1e-5, name, least=1e-6)


def test_gradients_may_be_summed_in_bf16(whole, tmp_path):
    go(2, tmp_path / "run", grad_sum="bf16", max_steps=4, eval_interval=0)
    go(2, tmp_path / "fp32", max_steps=4, eval_interval=0)
    ours, theirs = (tensors(tmp_path / run)["exp_avg/lm_head.weight"] for run in ("run", "fp32"))
    assert 1e-5 < (ours - theirs).norm() / theirs.norm() < 1e-2


def test_pipeline_experts_zero1_fp8_recomputing_and_the_average_work_together(tmp_path):
    changes = dict(precision="fp8_reference", moments="bf16", recompute=True, max_steps=6, eval_interval=0)
    go(1, tmp_path / "one", **changes)
    go(4, tmp_path / "four", pp=2, ep=2, **changes)
    for ours, theirs in zip(metrics(tmp_path / "four"), metrics(tmp_path / "one"), strict=True):
        assert ours.get("loss", 0) == pytest.approx(theirs.get("loss", 0), rel=1e-2)    # tokens travel in FP8 too
    ours, theirs = tensors(tmp_path / "four"), tensors(tmp_path / "one")
    assert ours.keys() == theirs.keys() and all(ours[name].dtype == t.dtype for name, t in theirs.items())


def test_nobody_owns_much_more_than_the_others(ran):
    parts = [load_file(path) for path in sorted(parallel.latest(ran("dp4")).glob("*.safetensors"))]
    sizes = [sum(t.numel() for name, t in part.items() if name.startswith("ema/")) for part in parts]
    assert len(sizes) == 4 and max(sizes) - min(sizes) <= 8 * 64 * 32                   # the largest parameter, a stack
    assert sum(sizes) == sum(p.numel() for p in V3(configs.load(["small.py"])).parameters())


def test_a_parameter_goes_to_who_has_least_and_the_largest_choose_first():
    sizes = {"a": 3, "b": 9, "c": 4, "d": 4, "e": 1}
    assert parallel.owners(sizes, 2) == {"b": 0, "c": 1, "d": 1, "a": 1, "e": 0}                  # 10 and 11
    assert set(parallel.owners(sizes, 1).values()) == {0}


# --- faults -----------------------------------------------------------------------------------------------------------

SHORT = dict(max_steps=8, save_interval=2, eval_interval=0)


def at(step, who, do):
    """A fault: rank `who` does something before it works on this step (0 = the first)."""
    def spoil(rank):
        batch = train.Data.batch

        def spoilt(self, now, *more):
            if now == step:
                do()
            return batch(self, now, *more)
        train.Data.batch = spoilt if rank == who else batch
    return spoil


@pytest.fixture(scope="module")
def short(world):
    """An uninterrupted run of two ranks."""
    go(2, world / "short", **SHORT)
    return world / "short"


@pytest.fixture(scope="module")
def short_ep(world):
    """The same with the experts spread."""
    go(2, world / "short_ep", ep=2, **SHORT)
    return world / "short_ep"


def same_bits(out_dir, other):
    assert metrics(out_dir) == metrics(other)
    ours, theirs = tensors(out_dir), tensors(other)
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


def test_a_step_that_one_rank_finds_not_finite_is_skipped_by_all(tmp_path):
    def spoil(rank):
        loss, calls = V3.loss, []

        def spoilt(self, *args, **more):
            calls.append(1)
            total, parts = loss(self, *args, **more)
            return total * (math.nan if rank == 1 and len(calls) == 9 else 1), parts     # 4 micro-batches a step
        V3.loss = spoilt
    said = go(2, tmp_path / "run", fault=spoil, **SHORT)
    assert said.count("step skipped (1 in a row)") == 1 and "step 3: " in said
    assert [row["grad_norm"] is None for row in metrics(tmp_path / "run")[:4]] == [False, False, True, False]
    assert parallel.read_state(parallel.latest(tmp_path / "run"))["updates"] == 7
    assert all(t.isfinite().all() for t in tensors(tmp_path / "run").values() if t.dtype == torch.float32)


@pytest.mark.parametrize("when", ["in backward", "after it"])
def test_a_buckets_sum_sets_off_in_backward_once_its_gradients_are_there_and_that_changes_no_bit(when, short_ep,
                                                                                                 tmp_path):
    def spoil(rank):
        sum_gradients, parallel.Shares.BUCKET = parallel.Shares.sum_gradients, 2**13
        if when == "after it":
            parallel.Shares.arrived = lambda self, p: None

        def tell(self):
            assert len(self.buckets) > 10 and max(len(b.params) for b in self.buckets) > 1
            assert all(len(b.params) == 1 or sum(p.nbytes for p in b.params) <= 2**13 for b in self.buckets)
            print(f"{self.off / len(self.buckets):.0%} under way")
            sum_gradients(self)
        parallel.Shares.sum_gradients = tell
    said = go(2, tmp_path / "run", fault=spoil, ep=2, **SHORT)
    assert said.count({"in backward": "100%", "after it": "0%"}[when] + " under way") == 8
    same_bits(tmp_path / "run", short_ep)


def test_an_error_of_one_rank_ends_all_and_is_told_once_with_the_rank(tmp_path):
    codes, said = finish(*start(2, tmp_path / "run", fault=at(3, 1, lambda: 1 / 0), **SHORT))
    assert codes == [1, 1] and "rank 1 of 2 failed" in said and said.count("ZeroDivisionError") == 1
    assert said.count("Traceback") == 2                                                 # the error, and what it caused


def test_an_error_of_the_thread_that_saves_is_told_as_its_ranks_own(tmp_path):
    def spoil(rank):
        save = parallel.save_file
        parallel.save_file = lambda tensors, path: 1 / 0 if rank and "step_00000004" in str(path) else \
            save(tensors, path)
    codes, said = finish(*start(2, tmp_path / "run", fault=spoil, **{**SHORT, "timeout": 3}))
    assert codes[1] == 1 and "rank 1 of 2 failed" in said and "ZeroDivisionError" in said and "in vain" not in said


def test_a_mistake_that_shows_on_one_rank_is_one_line_with_the_rank(tmp_path):
    def no_disk(*_):
        raise OSError(28, "No space left on device")

    def spoil(rank):
        save = parallel.save_file
        parallel.save_file = lambda tensors, path: no_disk() if rank and "step_00000004" in str(path) else \
            save(tensors, path)
    codes, said = finish(*start(2, tmp_path / "run", fault=spoil, **{**SHORT, "timeout": 3}))
    assert codes == [2, 2] and said.count("error: ") == 1 and "Traceback" not in said
    assert "error: rank 1 of 2: " in said and "No space left on device" in said
    assert parallel.latest(tmp_path / "run").name == "step_00000002"
    parallel.checked(parallel.latest(tmp_path / "run"))


def test_a_rank_that_hangs_is_found_by_the_timeout_and_named(tmp_path):
    processes, log = start(3, tmp_path / "run", fault=at(3, 1, lambda: time.sleep(100)),
                           **{**SHORT, "timeout": 3, "batch_size": 6})
    for p in (processes[0], processes[2]):
        p.join(30)
    assert processes[1].is_alive()
    processes[1].kill()
    codes, said = finish(processes, log)
    assert codes == [1, -9, 1] and "no answer from rank 1: gone, or it hangs" in said


def test_sigterm_on_one_rank_saves_once_and_all_leave(short, tmp_path):
    fault = at(4, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
    codes, said = finish(*start(2, tmp_path / "run", fault=fault, **{**SHORT, "save_interval": 0}))
    assert codes == [143, 143] and said.count("saved ") == 1 and "--resume" in said, said
    assert parallel.latest(tmp_path / "run").name == "step_00000005"
    go(2, tmp_path / "run", "--resume", **SHORT)
    same_bits(tmp_path / "run", short)


@pytest.mark.parametrize("when", ["compute", "all-to-all", "save"])
def test_after_a_rank_is_killed_the_job_ends_and_resumes_to_the_same_bits(when, short_ep, tmp_path):
    die, calls = lambda: os.kill(os.getpid(), signal.SIGKILL), []

    def while_saving(rank):
        save = parallel.save_file
        parallel.save_file = lambda tensors, path: die() if rank and "step_00000004" in str(path) else \
            save(tensors, path)

    def while_sending(rank):
        exchange = moe.Hop.exchange
        moe.Hop.exchange = lambda *args: (calls.append(1), rank and len(calls) == 300 and die(), exchange(*args))[-1]
    fault = {"compute": at(4, 1, die), "all-to-all": while_sending, "save": while_saving}[when]
    codes, said = finish(*start(2, tmp_path / "run", fault=fault, ep=2, **{**SHORT, "timeout": 3}))
    assert codes == [1, -9] and ("no answer from rank 1" in said or "has not written" in said), said
    whole = [folder.name for folder in parallel.checkpoints(tmp_path / "run")]
    assert whole in (["step_00000002", "step_00000004"], ["step_00000002"])
    go(2, tmp_path / "run", "--resume", ep=2, **SHORT)
    same_bits(tmp_path / "run", short_ep)


def test_a_shard_that_is_cut_short_is_refused_by_name_and_the_checkpoint_before_it_is_taken(short, tmp_path):
    run = shutil.copytree(short, tmp_path / "run")
    file = parallel.latest(run) / "rank_00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    said = go(2, run, "--resume", **SHORT)
    assert f"refused: {file}: missing, truncated or altered" in said and "resumed from" in said and "at step 6" in said
    same_bits(run, short)


def test_a_second_run_in_the_same_folder_is_refused_and_harms_nothing(short, tmp_path):
    run = shutil.copytree(short, tmp_path / "run")
    shutil.rmtree(run / "step_00000008")
    with parallel.claimed(run, parallel.Mesh()):
        before = metrics(run)
        codes, said = finish(*start(2, run, "--resume", **SHORT))
        assert codes[0] == 2 and codes[1] and said.count("error: ") == 1 and "another run is at work there" in said
        assert metrics(run) == before
    go(2, run, "--resume", **SHORT)
    same_bits(run, short)


def test_a_second_run_is_refused_before_its_text_is_read_and_a_folder_of_nothing_is_not_left(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "Data", None)
    with parallel.claimed(tmp_path / "run", parallel.Mesh()):
        with pytest.raises(UserError, match="another run is at work there"):
            train.main(["small.py", f"--out_dir={tmp_path / 'run'}"])
        assert (tmp_path / "run" / "lock").exists()
    assert not (tmp_path / "run").exists()


def test_evaluation_on_many_ranks_is_that_of_one(short, tmp_path):
    told = [re.search(r"step_00000008.*: val loss .*", go(ranks, tmp_path / f"{ranks}", eval_only=short)).group()
            for ranks in (1, 2)]
    assert told[0] == told[1] and re.search(r"val loss [0-9.]+ nats per token, [0-9.]+ bits per byte", told[0])
    assert not (tmp_path / "2").exists()


# --- started by torchrun ----------------------------------------------------------------------------------------------

def torchrun(*argv):
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", *map(str, argv)], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})


def ended(*processes):
    """What they said; all of them, and their children, are gone then."""
    try:
        return [p.communicate(timeout=60)[0] for p in processes]
    finally:
        for p in processes:
            if p.poll() is None:
                os.killpg(p.pid, signal.SIGKILL)
                p.wait()


DIES_ONCE = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import parallel, train
batch = train.Data.batch
def once(self, step, *more):
    if step == 5 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return batch(self, step, *more)
train.Data.batch, train.draw = once, lambda path: None
parallel.cli(train.main)
"""


def test_torchrun_restarts_a_job_that_lost_a_rank_and_it_goes_on_by_itself(short, tmp_path):
    (tmp_path / "dies_once.py").write_text(DIES_ONCE)
    p = torchrun("--standalone", "--nproc-per-node=2", "--max-restarts=1", tmp_path / "dies_once.py", "small.py",
                 f"--out_dir={tmp_path / 'run'}", *(f"--{k}={v}" for k, v in SHORT.items()))
    said, = ended(p)
    assert p.returncode == 0 and "resumed from" in said, said
    same_bits(tmp_path / "run", short)


def test_two_agents_are_two_nodes_of_one_job(short, tmp_path):
    port = free_port()
    agents = [torchrun("--nnodes=2", f"--node-rank={node}", "--nproc-per-node=1", "--master-addr=127.0.0.1",
                       f"--master-port={port}", ROOT / "train.py", "small.py", f"--out_dir={tmp_path / 'run'}",
                       *(f"--{k}={v}" for k, v in SHORT.items())) for node in range(2)]
    said = ended(*agents)
    assert [p.returncode for p in agents] == [0, 0], said
    same_bits(tmp_path / "run", short)


# --- mistakes ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("ranks, changes, says", [
    (4, dict(pp=3), "--pp=3: 4 ranks can't be cut into pipelines of so many"),
    (1, dict(pp=2), "--pp=2: 1 rank can't be cut"),
    (4, dict(dp=2), "2 is not 4"),
    (4, dict(ep=3), "--ep=3: does not divide dp = 4"),
    (16, dict(ep=16, batch_size=16), "does not divide n_routed_experts = 8"),
    (3, dict(), "8 sequences can't be shared out evenly over dp = 3"),
    (2, dict(batch_size=20, batch_ramp=6), "--batch_multiple=2"),
    (8, dict(nodes=3), "can't be shared out evenly"),
    (2, dict(pp=2, micro_batch_size=3), "does not divide the 8 sequences"),
    (2, dict(pp=2, batch_size=2), "at least 4 micro-batches are needed"),
    (8, dict(pp=8, batch_size=16), "n_layers = 3 is too few for 8 stages"),
    (3, dict(pp=3), "an even number of ranks is needed"),
], ids=str)
def test_a_layout_that_does_not_fit_is_refused_in_one_line_before_any_work(ranks, changes, says, monkeypatch):
    monkeypatch.setattr(train, "Data", None)
    with pytest.raises(UserError, match=re.escape(says)) as e:
        train.main(["small.py", *(f"--{k}={v}" for k, v in changes.items())], parallel.Mesh(world=ranks))
    assert "\n" not in str(e.value)


def test_ranks_with_different_configs_are_told_apart(tmp_path):
    def other(rank):
        sys.argv += ["--lr=3e-3"] * rank
    codes, said = finish(*start(2, tmp_path / "run", fault=other, **{**SHORT, "timeout": 3}))
    assert codes == [2, 2], said
    assert said.count("error: ") == 1
    assert "config: lr is 0.002 on rank 0 and 0.003 on rank 1; it must be the same on all" in said
    assert not (tmp_path / "run").exists()


def test_a_port_that_is_taken_is_named(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        processes, log = start(2, tmp_path / "run", port=s.getsockname()[1])
        processes[0].join(20)
        assert f"127.0.0.1:{s.getsockname()[1]}: the port is in use" in log.read_text()
        processes[1].kill()
        assert finish(processes, log)[0][0] == 2


def test_a_torch_without_nccl_and_a_device_that_sends_nothing_are_named(monkeypatch):
    monkeypatch.setattr(parallel.dist, "is_nccl_available", lambda: False)
    for device, says in (("cuda", "built without NCCL"), ("mps", "can't send between")):
        with pytest.raises(UserError, match=says):
            parallel.Mesh(world=2, dp=2).connect(torch.device(device))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="number 2 on its machine, which has 1 GPUs"):
        parallel.Mesh(rank=1, world=2, local=1).device(torch.device("cuda"))


def test_ranks_that_nobody_started_are_told_so(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "train.py", "small.py"], text=True, capture_output=True, timeout=60,
                          env={**{k: v for k, v in os.environ.items() if k != "MASTER_ADDR"}, "WORLD_SIZE": "2",
                               "RANK": "0"})
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "error: WORLD_SIZE is 2, but" in done.stderr and "start the ranks with torchrun" in done.stderr


def test_the_layout_of_ranks_is_that_of_the_drawing():
    c = Config(pp=2, ep=2, nodes=2, n_routed_experts=8)
    meshes = [parallel.Mesh(rank, 8).arrange(c, [4]) for rank in range(8)]
    assert [(m.pp_rank, m.dp_rank, m.ep_rank) for m in meshes] == [(r // 4, r % 4, r % 2) for r in range(8)]
    assert [parallel.Mesh(0, 8).arrange(c.replace(ep=ep, pp=1), [8]).ep_nodes for ep in (2, 4, 8)] == [1, 1, 2]


# --- the plan ---------------------------------------------------------------------------------------------------------

def test_the_plan_of_v3_says_what_a_gpu_holds_and_what_each_technique_saves(capsys, monkeypatch):
    monkeypatch.setattr(train, "Data", None)
    assert train.main([str(ROOT / "configs/v3_671b.py"), "--plan"]) == 0
    said = capsys.readouterr().out
    assert "671.026B total" in said and "2,048 GPUs" in said and "experts over 64 ranks on 8 nodes" in said
    number = lambda text: float(text.replace(",", ""))
    most, activations = map(number, re.search(r"fits 80 GB +yes: ([0-9.]+) GB .* ([0-9.]+) GB of act", said).groups())
    places, without = ([[*map(number, re.findall(r" ([0-9,.]+)(?= |B |$)", line)[-8:])] for line in said.splitlines()
                        if re.match(start, line)] for start in ("  rank [0-9]+: ", "    without "))
    assert len(places) == 16 and len(without) == 7
    assert most == max(row[-1] for row in places) < 80 and activations in [row[-3] for row in places]
    assert all(sum(row[1:-1]) == pytest.approx(row[-1], abs=0.4) for row in places)
    assert all(row[-1] > most for row in without), without
    own, = map(number, re.findall(r"all ranks +own ([0-9.]+)B parameters", said))
    assert own == pytest.approx(671.026 + 11.610, abs=0.001)
    tokens_per_s, hours = map(number, re.search(r"([0-9,]+) tokens/s a GPU, .* ([0-9,.]+)K GPU hours", said).groups())
    assert hours == pytest.approx(1e12 / tokens_per_s / 3.6e6, rel=0.01)
    assert all(word in said for word in ("bubble", "to other nodes", "inside its own", "GFLOPs per training token",
                                         "2,788K hours", "head, MTP", "assumed"))


def test_the_parameters_of_all_the_ranks_are_those_of_v3():
    c = configs.load([str(ROOT / "configs/v3_671b.py")])
    with torch.device("meta"):
        stages = model.stages(c, 32, range(32))
    ranks, total = moe.ExpertRanks(8, 8, 63), 0
    for stage in stages:
        moe.spread(stage, ranks)
        total += sum(p.numel() * (64 if p.ndim == 3 else 1) for name, p in stage.named_parameters())
    mtp = sum(p.numel() * (64 if p.ndim == 3 else 1) for p in stages[-1].mtp.parameters())
    assert stages[0].embed is stages[-1].embed
    assert total - mtp - stages[0].embed.weight.numel() == 671_026_404_352 and round(mtp / 1e9, 2) == 11.61
