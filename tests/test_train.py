"""The run: schedules, micro-batches, resuming to the same bits, skipped steps, the numbers it leaves, mistakes."""
import contextlib
import dataclasses
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import GPU, agree, random_tokens, save_tokenizer, tiny
from safetensors.torch import load_file

import backend
import bench
import configs
import data
import fp8
import parallel
import ranks
import train
from configs import Config, UserError
from data import Data
from fp8_tiles import quantize_torch
from model import V3, official_tensors, save_hf
from tokenizer import get_tokenizer, load_tokenizer
from train import bias_update_speed, learning_rate, mtp_weight

ROOT = Path(__file__).resolve().parent.parent
STEPS = 16
SMALL = f"""
dim = 32
n_layers = 2
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
seq_len = 32
batch_size = 8
micro_batch_size = 2
max_steps = {STEPS}
warmup_steps = 2
lr = 1e-2
min_lr = 1e-3
ema_decay = 0.9
eval_interval = 4
save_interval = 2
device = "cpu"
"""
TRAIN_KEYS = {"step", "time", "loss", "mtp_loss", "balance_loss", "max_vio", "lr", "grad_norm", "tokens_per_s"}
EVAL_KEYS = {"step", "time", "val_loss", "val_bpb"}


def text(seed):
    """Lines of a few words in random order: something to learn, and no two seeds alike."""
    dice, words = random.Random(seed), "the cat sees a dog and some bird near our house".split()
    return "".join(" ".join(dice.choices(words, k=6)) + ".\n" for _ in range(500))


@pytest.fixture(scope="module", autouse=True)
def world(tmp_path_factory):
    """The folder that all runs start in: a text, a config, the token cache."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "text.txt").write_text(text(0))
    (folder / "small.py").write_text(SMALL)
    with pytest.MonkeyPatch.context() as m:
        m.chdir(folder)
        m.setenv("NANOV3_CACHE", str(folder / "cache"))
        m.setattr(train, "draw", lambda path: None)                                     # matplotlib takes a second
        yield folder


def go(out_dir, *flags, **changes):
    return train.main(["small.py", f"--out_dir={out_dir}", *flags, *(f"--{k}={v}" for k, v in changes.items())])


def refused(*args, **changes):
    with pytest.raises(UserError) as e:
        go(*args, **changes)
    assert "\n" not in str(e.value)
    return str(e.value)


def config(**changes):
    return configs.load(["small.py", *(f"--{k}={v}" for k, v in changes.items())])


def metrics(out_dir):
    """(train lines, eval lines), every line strict JSON with exactly the contract's keys."""
    def never(name):
        raise AssertionError(f"{name} is no JSON")
    lines = (Path(out_dir) / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_constant=never) for line in lines]
    assert all(row.keys() in (TRAIN_KEYS, EVAL_KEYS) for row in rows)
    return [row for row in rows if "loss" in row], [row for row in rows if "val_loss" in row]


def numbers(out_dir):
    """The metrics without what a clock measured."""
    rows = [row for rows in metrics(out_dir) for row in rows]
    return [{k: v for k, v in row.items() if k not in ("time", "tokens_per_s")} for row in rows]


def tensors(out_dir, step=None):
    folder = parallel.latest(out_dir) if step is None else Path(out_dir) / f"step_{step:08d}"
    return load_file(folder / "rank_00000.safetensors")


def same_bits(a, b):
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def interrupted(monkeypatch, out_dir, after, number=signal.SIGTERM, **changes):
    """A run that is sent a signal while it works on step `after`; returns main's exit code."""
    write = train.Log.write

    def writing(self, **row):
        write(self, **row)
        if row["step"] == after and "loss" in row:
            signal.raise_signal(number)
    with monkeypatch.context() as m:
        m.setattr(train.Log, "write", writing)
        return go(out_dir, **changes)


@pytest.fixture(scope="module")
def whole(world):
    """A run that nobody interrupted."""
    assert go(world / "whole") == 0
    return world / "whole"


@pytest.fixture(scope="module")
def half(world):
    """A run that SIGTERM stopped after step 7."""
    with pytest.MonkeyPatch.context() as m:
        assert interrupted(m, world / "half", 7) == 143
    return world / "half"


@pytest.fixture
def again(half, tmp_path):
    """A copy of it to go on with."""
    return shutil.copytree(half, tmp_path / "again")


# --- the schedules ----------------------------------------------------------------------------------------------------

def test_the_learning_rate_warms_up_stays_falls_along_a_cosine_and_ends_on_two_steps():
    c = Config(lr=1.0, min_lr=0.1, final_lr=0.01, warmup_steps=4, decay_start=10, decay_end=20, max_steps=26)
    at = [learning_rate(c, step) for step in range(26)]
    assert at[:4] == [0.25, 0.5, 0.75, 1.0] and at[3:11] == [1.0] * 8
    assert at[10:20] == pytest.approx([0.1 + 0.9 * (1 + math.cos(math.pi * i / 10)) / 2 for i in range(10)])
    assert at[15] == pytest.approx(0.55) and at[20:24] == [0.1] * 4 and at[24:] == [0.01] * 2


def test_without_decay_steps_the_cosine_spans_the_run_and_nothing_else_changes():
    c = Config(lr=1.0, min_lr=0.1, warmup_steps=2, max_steps=20)
    assert learning_rate(c, 1) == learning_rate(c, 2) == 1.0                       # no step between warmup and cosine
    assert learning_rate(c, 11) == pytest.approx(0.55) and 0.1 < learning_rate(c, 19) < 0.11
    assert mtp_weight(c, 0) == mtp_weight(c, 19) == 0.3 and bias_update_speed(c, 19) == 0.001


def test_the_mtp_weight_falls_to_a_third_with_the_cosine_and_the_bias_stops_after_it():
    c = Config(mtp_weight=0.3, bias_update_speed=0.5, decay_start=10, decay_end=20, max_steps=26)
    assert [mtp_weight(c, step) for step in (0, 9)] == [0.3, 0.3]
    assert [mtp_weight(c, step) for step in (10, 25)] == pytest.approx([0.1, 0.1])
    assert [bias_update_speed(c, step) for step in (0, 19, 20, 25)] == [0.5, 0.5, 0, 0]


def test_the_loop_follows_the_schedules(tmp_path, monkeypatch):
    seen, loss, changes = [], V3.loss, dict(save_interval=1, decay_start=2, decay_end=4, max_steps=6, batch_ramp=2,
                                            warmup_steps=1, final_lr=5e-4, eval_interval=0, micro_batch_size=8)
    monkeypatch.setattr(parallel, "KEEP", 99)
    monkeypatch.setattr(V3, "loss", lambda self, tokens, **more: seen.append((len(tokens), more["mtp_weight"]))
                        or loss(self, tokens, **more))
    rates, make = [], train.make_optimizer

    def making(c, params):
        optimizer = make(c, params)
        optimizer.register_step_pre_hook(lambda o, *_: rates.append([group["lr"] for group in o.param_groups]))
        return optimizer
    monkeypatch.setattr(train, "make_optimizer", making)
    go(tmp_path / "run", **changes)
    c = config(**changes)
    assert seen == [(data.batch_size_at(c, step), mtp_weight(c, step)) for step in range(6)]
    assert seen[0] == (1, 0.3) and seen[-1] == (8, 0.3 / 3)
    assert rates == [[learning_rate(c, step)] * 2 for step in range(6)]                 # matrices, norms
    assert [row["lr"] for row in metrics(tmp_path / "run")[0]] == pytest.approx([learning_rate(c, s) for s in range(6)])
    bias = [tensors(tmp_path / "run", step)["model.layers.1.mlp.gate.e_score_correction_bias"] for step in range(1, 7)]
    assert not torch.equal(bias[2], bias[3]) and torch.equal(bias[3], bias[5])          # steps 0-3 move it


def test_what_bench_py_trains_has_the_bits_of_train_pys_run(whole):
    v3, _ = bench.trained_here(config())
    trained = official_tensors(v3)
    same_bits(trained, {name: t for name, t in tensors(whole).items() if name in trained})


# --- one step ---------------------------------------------------------------------------------------------------------

def test_weight_decay_falls_on_matrices_only_embedding_and_head_included():
    c = config()
    v3 = V3(c)
    optimizer = train.make_optimizer(c, v3.parameters())
    groups = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert groups.keys() == {id(p) for p in v3.parameters()}
    for name, p in v3.named_parameters():
        assert groups[id(p)] == (0.0 if "norm" in name else c.weight_decay), name
        assert (p.ndim == 1) == ("norm" in name), name


def test_any_cut_into_micro_batches_trains_the_same_model(tmp_path, monkeypatch):
    monkeypatch.setattr(ranks, "V3", lambda *args: V3(*args).double())                  # no rounding to hide behind
    for size in (2, 3, 8):
        go(tmp_path / str(size), micro_batch_size=size, max_steps=4, save_interval=0)
    whole = tensors(tmp_path / "8")
    for size in (2, 3):
        cut = tensors(tmp_path / str(size))
        assert cut.keys() == whole.keys()
        for name, t in whole.items():
            agree(cut[name], t, 1e-9, name, least=1e-12)
        for ours, theirs in zip(numbers(tmp_path / str(size)), numbers(tmp_path / "8")):
            assert ours == pytest.approx(theirs, rel=1e-6)


def test_in_float32_micro_batches_give_the_same_losses_to_rounding(tmp_path, whole):
    go(tmp_path / "8", micro_batch_size=8, max_steps=STEPS, eval_interval=0, save_interval=0)
    for ours, theirs in zip(metrics(tmp_path / "8")[0][:4], metrics(whole)[0]):
        assert ours.keys() == theirs.keys()
        assert [ours[k] for k in ("loss", "mtp_loss", "grad_norm")] \
            == pytest.approx([theirs[k] for k in ("loss", "mtp_loss", "grad_norm")], rel=1e-4)


def test_recomputing_the_activations_changes_no_number(tmp_path, whole):
    go(tmp_path / "run", recompute=True)
    assert numbers(tmp_path / "run") == numbers(whole)
    same_bits(tensors(tmp_path / "run"), tensors(whole))


def test_the_average_of_the_weights_is_the_one_worked_out_by_hand(tmp_path, monkeypatch):
    monkeypatch.setattr(parallel, "KEEP", 99)
    go(tmp_path / "run", max_steps=4, save_interval=1, ema_decay=0.75)
    average = {name: t.clone() for name, t in official_tensors(V3(config())).items() if not name.endswith("_bias")}
    for step in (1, 2, 3, 4):
        now = tensors(tmp_path / "run", step)
        assert {name for name in now if name.startswith("ema/")} == {f"ema/{name}" for name in average}
        for name in average:
            average[name] = 0.75 * average[name] + 0.25 * now[name]
            agree(now[f"ema/{name}"], average[name], 1e-5, name)
    assert not any(torch.equal(now[f"ema/{name}"], now[name]) for name in average)


def spoil(monkeypatch, steps, how="loss"):
    """V3.loss goes wrong in the second micro-batch of these steps (1 = the first); returns the list of models seen."""
    loss, calls = V3.loss, []

    def spoilt(self, tokens, **more):
        total, parts = loss(self, tokens, **more)
        calls.append(self)
        if (len(calls) - 1) // 4 + 1 in steps and len(calls) % 4 == 2:                  # 4 micro-batches a step
            if how == "gradient":
                total = total + (total - total.detach()).abs().sqrt()                   # adds 0 with an infinite slope
            else:
                total, parts = total * math.nan, {**parts, "loss": parts["loss"] * math.nan}
        return total, parts
    monkeypatch.setattr(V3, "loss", spoilt)
    return calls


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_skipped_and_changes_nothing(how, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(parallel, "KEEP", 99)
    models, write, loads = spoil(monkeypatch, {3}, how), train.Log.write, []

    def writing(self, **row):
        loads.append(int(sum(gate.load.sum() for gate in models[-1].gates())))
        write(self, **row)
    monkeypatch.setattr(train.Log, "write", writing)
    go(tmp_path / "run", max_steps=5, save_interval=1, eval_interval=0)
    same_bits(tensors(tmp_path / "run", 3), tensors(tmp_path / "run", 2))               # weights, biases, moments, EMA
    three, four = (tensors(tmp_path / "run", step)["lm_head.weight"] for step in (3, 4))
    assert not torch.equal(three, four)
    updates = [parallel.read_state(tmp_path / "run" / f"step_{step:08d}")["updates"] for step in range(1, 6)]
    assert updates == [1, 2, 2, 3, 4] and set(loads) == {0}
    rows, _ = metrics(tmp_path / "run")                                                 # strict JSON, nan is null
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5] and rows[2]["grad_norm"] is None
    assert (rows[2]["loss"] is None) == (how == "loss")
    assert "step 3: " in (out := capsys.readouterr().out) and "step skipped (1 in a row)" in out


def test_a_run_goes_on_after_four_bad_steps_in_a_row_and_gives_up_after_five(tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        spoil(m, {1, 2, 3, 4, 6, 7})
        assert go(tmp_path / "four", max_steps=8) == 0
    spoil(monkeypatch, {4, 5, 6, 7, 8})
    message = refused(tmp_path / "five", max_steps=12)
    assert "5 steps in a row" in message and "--lr (now 0.01)" in message
    assert parallel.latest(tmp_path / "five").name == "step_00000006"


# --- what a run leaves ------------------------------------------------------------------------------------------------

def test_metrics_have_the_contracts_keys_and_every_step_once(whole):
    rows, evals = metrics(whole)
    assert [row["step"] for row in rows] == [*range(1, STEPS + 1)] and [row["step"] for row in evals] == [4, 8, 12, 16]
    times = [row["time"] for row in rows]
    assert times == sorted(times) and all(row["tokens_per_s"] > 0 and row["max_vio"] >= 0 for row in rows)
    assert rows[0]["lr"] == 5e-3 and rows[1]["lr"] == 1e-2


def test_the_load_of_every_expert_is_logged_where_that_is_asked_for(tmp_path):
    go(tmp_path / "out", "--log_load=True", max_steps=2)
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    for row in (row for row in rows if "loss" in row):
        assert [len(load) for load in row["load"]] == [8, 8]                              # one mixture, and that of MTP
        assert [sum(load) for load in row["load"]] == [2 * 8 * 32] * 2                    # K * sequences * tokens
        assert row["max_vio"] == pytest.approx(sum(max(load) / 64 - 1 for load in row["load"]) / 2, rel=1e-5)


def test_a_small_learning_rate_and_a_small_loss_keep_their_digits_in_the_metrics():
    assert train.number(7.3e-6) == 7.3e-6 and train.number(2.2e-4 / 2000) == pytest.approx(1.1e-7, rel=1e-6)
    assert train.number(123456.75) == 123456.8 and train.number(math.nan) is train.number(-math.inf) is None


def test_the_loss_falls_from_ln_vocab_on_a_text_that_can_be_learnt(whole):
    rows, evals = metrics(whole)
    assert rows[0]["loss"] == pytest.approx(math.log(260), abs=0.1)
    assert rows[-1]["loss"] < 3.5 and evals[-1]["val_loss"] < evals[0]["val_loss"] < 5


def test_a_checkpoint_holds_config_data_tokenizer_weights_moments_averages_and_biases(whole):
    folder = parallel.latest(whole)
    state = parallel.read_state(folder)
    assert state["step"] == state["updates"] == STEPS and Config(**state["config"]) == config(out_dir=whole)
    assert state["data"]["corpus_sha256"] and state["data"]["source"] == "text.txt"
    official = official_tensors(V3(config()))
    weights = {name for name in official if not name.endswith("_bias")}
    assert tensors(whole).keys() == official.keys() | {f"{kind}/{name}" for kind in ("exp_avg", "exp_avg_sq", "ema")
                                                       for name in weights}
    assert load_tokenizer(folder).n_vocab == 260
    assert [path.name for path in parallel.checkpoints(whole)] == ["step_00000014", "step_00000016"]


def test_the_same_command_gives_the_same_bits(whole, tmp_path):
    go(tmp_path / "run")
    assert numbers(tmp_path / "run") == numbers(whole)
    same_bits(tensors(tmp_path / "run"), tensors(whole))


def test_the_run_ends_with_measured_numbers_a_sample_and_the_next_command(tmp_path, capsys):
    go(tmp_path / "run", max_steps=2)
    out = capsys.readouterr().out
    assert "parameters " in out and "measured: 0:0" in out and "--- sample ---" in out
    assert out.splitlines()[-1] == f"next: python sample.py --out_dir={tmp_path / 'run'}"


def test_the_figure_is_drawn_where_matplotlib_is_installed(whole, tmp_path):
    pytest.importorskip("matplotlib", reason="pip install -r requirements-extra.txt")
    import importlib.util
    spec = importlib.util.spec_from_file_location("train_whole", ROOT / "train.py")     # `draw` is replaced in ours
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    shutil.copy(whole / "metrics.jsonl", tmp_path)
    with open(tmp_path / "metrics.jsonl", "a") as f:                                    # as a skipped step leaves it
        f.write(json.dumps({**metrics(whole)[0][-1], "step": STEPS + 1, "loss": None, "mtp_loss": None}) + "\n")
    assert module.draw(tmp_path / "metrics.jsonl") == tmp_path / "metrics.png"
    assert (tmp_path / "metrics.png").read_bytes().startswith(b"\x89PNG")


# --- evaluation -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("windows", [1, 5, 1000])
def test_evaluation_is_the_loss_of_the_full_logits_over_the_whole_validation_stream(windows, monkeypatch):
    c = config(init_std=0.3, seq_len=31)
    v3, d = V3(c).double(), Data(c)
    eval_windows = d.eval_windows
    monkeypatch.setattr(d, "eval_windows", lambda _, *ranks: eval_windows(windows, *ranks))
    stream, total = torch.from_numpy(d.val.astype("int64")), 0.0
    with torch.no_grad():
        for start in range(0, len(stream) - 1, 31):
            window = stream[start:start + 32]
            total += F.cross_entropy(v3(window[None, :-1])[0], window[1:], reduction="sum").item()
    loss, bpb = train.evaluate(v3, d, parallel.Mesh())
    assert loss == pytest.approx(total / (len(stream) - 1), rel=1e-12) and loss > 5.6
    assert bpb == pytest.approx(total / math.log(2) / len(text(0)[len(text(0)) * 9 // 10:].encode()), rel=1e-12)
    assert v3.training and all(gate.load.sum() == 0 for gate in v3.gates())


def test_eval_only_prints_what_the_runs_last_evaluation_printed(tmp_path, capsys):
    go(tmp_path / "run", max_steps=2)
    printed = lambda: [line[line.index("val loss"):line.index("bits per byte")]
                       for line in capsys.readouterr().out.splitlines() if "val loss" in line][-1]
    last = printed()
    assert last.startswith("val loss ") and "nats per token, " in last
    before = sorted(tmp_path.rglob("*"))
    for folder in (tmp_path / "run", tmp_path / "run" / "step_00000002"):
        assert go(tmp_path / "other", eval_only=folder) == 0
        assert printed() == last
    assert sorted(tmp_path.rglob("*")) == before                                        # and writes nothing
    assert "nowhere: no checkpoint" in refused(tmp_path / "other", eval_only="nowhere")


def test_eval_only_takes_a_folder_whose_tokenizer_knows_no_filling_in(tmp_path, capsys):
    save_hf(V3(config()), tmp_path / "hf")
    plain = get_tokenizer("bytes")
    specials = {"<|endoftext|>": 256}
    save_tokenizer(type(plain)("t", pat_str=plain._pat_str, mergeable_ranks=plain._mergeable_ranks,
                                    special_tokens=specials), tmp_path / "hf")
    assert "--fim_rate=0" in refused(tmp_path / "run", eval_only=tmp_path / "hf")
    assert go(tmp_path / "run", eval_only=tmp_path / "hf", fim_rate=0) == 0
    assert f"{tmp_path / 'hf'}: val loss 5." in capsys.readouterr().out


def test_init_from_starts_at_the_loss_of_the_folder_and_can_be_resumed(whole, tmp_path, monkeypatch, request):
    c = config()
    v3 = V3(c)
    parallel.load_checkpoint(parallel.latest(whole), official_tensors(v3))
    save_hf(v3, tmp_path / "hf")
    save_tokenizer(get_tokenizer("bytes"), tmp_path / "hf")
    expected = v3.loss(Data(c).batch(0))[1]
    assert expected["loss"] < 4
    Path("small.py").rename("kept.py")
    Path("small.py").write_text(SMALL.replace("dim = 32", "dim = 48", 1))                  # the folder's dims win
    request.addfinalizer(lambda: Path("kept.py").replace("small.py"))
    more = dict(init_from=tmp_path / "hf", max_steps=4)
    for key, value in dict(dim=48, n_routed_experts=4, tokenizer="bpe").items():
        assert f"--{key}: model and tokenizer are those of" in refused(tmp_path / "no", **more, **{key: value})
    assert interrupted(monkeypatch, tmp_path / "run", 2, **more) == 143
    first = metrics(tmp_path / "run")[0][0]
    for key in ("loss", "mtp_loss"):
        assert first[key] == pytest.approx(expected[key].item(), rel=1e-5)
    shutil.copytree(tmp_path / "run", tmp_path / "resumed")
    assert go(tmp_path / "resumed", "--resume", **more) == 0
    assert [row["step"] for row in metrics(tmp_path / "resumed")[0]] == [1, 2, 3, 4]
    assert "no config.json there" in refused(tmp_path / "no", init_from=tmp_path)
    assert not (tmp_path / "no").exists()


def test_plan_prints_the_arithmetic_and_neither_reads_data_nor_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "Data", None)
    assert go(tmp_path / "run", "--plan", data="nowhere.txt", batch_ramp=20) == 0
    out = capsys.readouterr().out
    c = config(batch_ramp=20)
    tokens = 32 * sum(data.batch_size_at(c, step) for step in range(STEPS))             # the ramp outlasts the run
    assert f"{STEPS} steps, {train.human(tokens)} tokens" in out
    assert all(word in out for word in ("parameters", "active per token", "memory", "latent cache", "AdamW"))
    assert list(tmp_path.iterdir()) == []


def test_profile_leaves_a_trace_and_spares_a_run_that_is_there(whole, tmp_path):
    assert go(tmp_path / "run", "--profile", save_interval=0, batch_size=1, n_mtp=0) == 0
    assert len(json.loads((tmp_path / "run" / "trace.json").read_text())["traceEvents"]) > 100
    assert parallel.checkpoints(tmp_path / "run") == []
    before = (whole / "metrics.jsonl").read_text()
    assert "holds a run" in refused(whole, "--profile") and (whole / "metrics.jsonl").read_text() == before


# --- stopping and going on --------------------------------------------------------------------------------------------

SLOWLY = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
import configs, train
write = train.Log.write
train.Log.write = lambda self, **row: (write(self, **row), time.sleep(0.05))
configs.cli(train.main)
"""


def process(*argv):
    """python train.py, with a pause after each line of metrics: on a busy machine a signal could else come too late."""
    return subprocess.Popen([sys.executable, "-c", SLOWLY, *argv], text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"})


def until_step(p, out_dir, step):
    """Wait until the run in process `p` has written this step."""
    for _ in range(12000):
        lines = (out_dir / "metrics.jsonl").read_text().splitlines() if (out_dir / "metrics.jsonl").exists() else []
        if lines and lines[-1].endswith("}") and json.loads(lines[-1])["step"] >= step:
            return
        assert p.poll() is None, p.communicate(timeout=10)[0]
        time.sleep(0.005)
    raise AssertionError("a minute has passed")


@pytest.mark.skipif(sys.platform == "win32", reason="a process on Windows gets no signals from outside")
@pytest.mark.parametrize("number, code", [(signal.SIGKILL, -9), (signal.SIGTERM, 143)], ids=["SIGKILL", "SIGTERM"])
def test_a_process_that_is_killed_and_resumed_passes_through_the_same_bits(number, code, whole, tmp_path):
    run = tmp_path / "run"
    p = process("small.py", f"--out_dir={run}")
    try:
        until_step(p, run, 5)
        p.send_signal(number)
        out = p.communicate(timeout=60)[0]
    finally:
        p.kill()
        p.wait()
    assert p.returncode == code, out
    stopped = metrics(run)[0][-1]["step"]
    at = int(parallel.latest(run).name[5:])
    # The checkpoint of step 4 may still have been on its way to the disk.
    assert 2 <= at <= stopped < STEPS and (at == stopped if code == 143 else at % 2 == 0)
    if code == 143:
        assert f"go on with: python train.py small.py --resume --out_dir={run}" in out and "Traceback" not in out
    assert go(run, "--resume") == 0
    assert numbers(run) == numbers(whole)                                               # no gap, no repetition either
    same_bits(tensors(run), tensors(whole))


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"])
def test_ctrl_c_and_sigterm_save_after_the_step_and_leave_with_their_code(number, code, whole, tmp_path, monkeypatch,
                                                                          capsys):
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    assert interrupted(monkeypatch, tmp_path / "run", 3, number) == code
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert parallel.latest(tmp_path / "run").name == "step_00000003"                    # no multiple of save_interval
    assert f"go on with: python train.py small.py --resume --out_dir={tmp_path / 'run'}" in capsys.readouterr().out
    assert go(tmp_path / "run", "--resume") == 0
    assert numbers(tmp_path / "run") == numbers(whole)
    same_bits(tensors(tmp_path / "run"), tensors(whole))


def test_a_second_ctrl_c_is_not_waited_for():
    with pytest.raises(KeyboardInterrupt), train.Interrupt():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)


def test_a_run_with_skipped_steps_resumes_to_the_same_bits(tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        spoil(m, {2})
        go(tmp_path / "whole", max_steps=6)
    with monkeypatch.context() as m:
        spoil(m, {2})
        assert interrupted(m, tmp_path / "run", 3, max_steps=6) == 143
    assert go(tmp_path / "run", "--resume", max_steps=6) == 0
    same_bits(tensors(tmp_path / "run"), tensors(tmp_path / "whole"))                   # AdamW counts updates


def test_a_run_in_fp8_with_bf16_moments_resumes_to_the_same_bits(tmp_path, monkeypatch):
    low = dict(precision="fp8_reference", moments="bf16", max_steps=6)
    assert go(tmp_path / "whole", **low) == 0
    assert interrupted(monkeypatch, tmp_path / "run", 3, **low) == 143
    assert "moments was 'bf16' and is now 'fp32'" in refused(tmp_path / "run", "--resume", **{**low, "moments": "fp32"})
    assert go(tmp_path / "run", "--resume", **low) == 0
    found = tensors(tmp_path / "run")
    same_bits(found, tensors(tmp_path / "whole"))
    kinds = {name.partition("/")[0] if "/" in name else "weight": t.dtype for name, t in found.items()
             if t.dtype.is_floating_point}
    high, low = torch.float32, torch.bfloat16
    assert kinds == {"weight": high, "ema": high, "exp_avg": low, "exp_avg_sq": low}


def test_the_plan_counts_the_bytes_of_moments_and_of_fp8_weights(capsys):
    cpu = torch.device("cpu")
    size = lambda **changes: train.plan(config(**changes), cpu, parallel.Mesh())
    plain, low = size(), size(precision="fp8_reference", moments="bf16")
    everything = plain["total"] + plain["mtp"]
    states = lambda a: sum(a["memory"][what] for what in ("weights", "copies", "gradients", "moments"))
    assert states(plain) == 16 * everything and "16.0 bytes per parameter" in capsys.readouterr().out
    v3 = V3(config(precision="fp8_reference"))
    eight = [p for name, p in v3.named_parameters()
             if name.removesuffix(".weight") in v3.converted[0] or name.endswith(("ffn.w13", "ffn.w2"))]
    assert low["fp8"] == sum(p.numel() for p in eight) < everything
    scales = sum(4 * q.scale.numel() for q in (quantize_torch(p.detach(), 128) for p in eight))
    assert states(low) == 12 * everything + low["fp8"] + scales


def test_where_and_how_a_run_runs_may_change_on_resume(again, whole):
    assert go(again, "--resume", micro_batch_size=8, eval_interval=3, save_interval=0, recompute=True) == 0
    rows, evals = metrics(again)
    assert [row["step"] for row in rows] == [*range(1, STEPS + 1)]
    assert [row["step"] for row in evals] == [4, 9, 12, 15, 16]
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in metrics(whole)[0]], rel=1e-3)


@pytest.mark.parametrize("change", [dict(lr=2e-2), dict(seed=1), dict(batch_size=4), dict(max_steps=20), dict(dim=48),
                                    dict(data="small.py"), dict(ema_decay=0.5), dict(precision="bf16")], ids=str)
def test_what_a_run_computes_may_not_and_the_message_names_it(change, again, half, monkeypatch):
    monkeypatch.setattr(train, "Data", None)                                            # it is seen before any work
    (key, value), = change.items()
    then = getattr(config(), key)
    assert f"--resume: {key} was {then!r} and is now {value!r}" in refused(again, "--resume", **change)
    assert (again / "metrics.jsonl").read_text() == (half / "metrics.jsonl").read_text()


def test_another_corpus_under_the_same_name_is_refused(again, tmp_path, monkeypatch, world):
    shutil.copy(world / "small.py", tmp_path)
    (tmp_path / "text.txt").write_text(text(1))
    monkeypatch.chdir(tmp_path)
    before = (again / "metrics.jsonl").read_text()
    message = refused(again, "--resume")
    assert "corpus" in message and "--data" in message and (again / "metrics.jsonl").read_text() == before


def test_a_folder_that_holds_a_run_is_refused_without_resume_and_one_without_a_run_with_it(again, half, tmp_path):
    message = refused(again)
    assert "holds a run, at step_00000007" in message and "--resume" in message
    assert (again / "metrics.jsonl").read_text() == (half / "metrics.jsonl").read_text()
    assert "no checkpoint" in refused(tmp_path / "empty", "--resume") and not (tmp_path / "empty").exists()


def test_where_the_micro_batch_is_the_balance_losss_batch_it_may_not_differ_on_resume():
    for scope, free in (("sequence", True), ("batch", False)):
        saved = {"config": dataclasses.asdict(config(balance_scope=scope))}
        with contextlib.nullcontext() if free else pytest.raises(UserError, match="micro_batch_size was 2 and"):
            train.check_resume(config(balance_scope=scope, micro_batch_size=8), saved)


@pytest.mark.parametrize("key, value", dict(updates=None, data=[], config=[1], files="a", step="x").items())
def test_state_jsons_with_a_wrong_field_are_named_one_after_the_other(again, key, value, capsys):
    older, newest = (folder / "state.json" for folder in parallel.checkpoints(again))
    for path in (older, newest):
        path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    assert str(older) in refused(again, "--resume")
    assert f"refused: {newest}" in capsys.readouterr().out


@pytest.mark.parametrize("line", [b"garbage}\n", b"\xff\xfe\0\n", b"[1]\n", b'{"step": "x"}\n'])
def test_lines_of_metrics_that_are_not_ours_are_dropped_on_resume(again, whole, line):
    path = again / "metrics.jsonl"
    path.write_bytes(line + path.read_bytes() + line)
    assert go(again, "--resume") == 0
    assert numbers(again) == numbers(whole)


def test_eval_only_scores_in_the_windows_that_it_is_given(whole, capsys):
    losses = []
    for stride in (0, 1, 32):
        assert go("unused", eval_only=whole, eval_stride=stride) == 0
        losses.append(capsys.readouterr().out.split("val loss ")[1])
    assert losses[0] == losses[2] != losses[1]


def test_a_finished_run_that_is_resumed_repeats_no_line(whole, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run")
    assert go(run, "--resume") == 0
    assert numbers(run) == numbers(whole)
    assert {path.name for path in run.iterdir()} == {path.name for path in whole.iterdir()}


def test_a_line_of_metrics_that_a_crash_cut_is_written_again(again, whole):
    with open(again / "metrics.jsonl", "a") as f:
        f.write('{"step": 8, "time": 1.2, "lo')
    assert go(again, "--resume") == 0
    assert numbers(again) == numbers(whole)


def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_takes_the_run_to_the_same_bits(again, whole, capsys):
    older, newest = parallel.checkpoints(again)
    file = newest / "rank_00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert go(again, "--resume") == 0
    out = capsys.readouterr().out
    assert f"refused: {file}: missing, truncated or altered" in out and f"resumed from {older} at step" in out
    assert numbers(again) == numbers(whole)
    same_bits(tensors(again), tensors(whole))


# --- mistakes ---------------------------------------------------------------------------------------------------------

MISTAKES = {
    "no such data": (dict(data="nowhere.txt"), "data 'nowhere.txt': no such file or folder"),
    "not UTF-8": (dict(data="latin1.txt"), "not UTF-8 at byte offset 3"),
    "empty data": (dict(data="empty.txt"), "empty"),
    "data too short": (dict(data="short.txt"), "too short for one sequence"),
    "no such tokenizer": (dict(tokenizer="byte"), "did you mean 'bytes'?"),
    "vocabulary too small": (dict(vocab_size=100), "vocab_size"),
    "no such model": (dict(init_from="nowhere"), "nowhere: no config.json there"),
    "no such model, and a tokenizer": (dict(init_from="nowhere", tokenizer="bytes"), "nowhere: no config.json there"),
    "nothing to resume": (dict(resume=True), "no checkpoint"),
    "nothing to evaluate": (dict(eval_only="nowhere"), "no checkpoint"),
    "not a file": (dict(data=os.devnull), "neither a file nor a folder"),
    "a batch beyond all memory": (dict(batch_size=10**13), "at most 10000000"),
    "an impossible folder": (dict(out_dir="x" * 5000), "give another"),
    "RoPE without frequencies": (dict(rope_theta=1), "rope_theta = 1.0 must be above 1"),
    "no such device": (dict(device="mps"), "--device=cpu"),
}


@pytest.mark.parametrize("changes, says", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_exit_code_2_and_nothing_is_written(changes, says, tmp_path, world, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NANOV3_CACHE", str(tmp_path / "cache"))
    for name, raw in dict(text=text(0).encode(), latin1=b"caf\xe9", empty=b"", short=b"hi").items():
        Path(name + ".txt").write_bytes(raw)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(sys, "argv", ["train.py", str(world / "small.py"), "--out_dir=run",
                                      *(f"--{k}={v}" for k, v in changes.items())])
    with pytest.raises(SystemExit) as left:
        configs.cli(train.main)
    err = capsys.readouterr().err
    assert left.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1 and says in err, err
    assert sorted(tmp_path.rglob("*")) == before


def test_an_out_dir_that_is_a_file_is_refused_before_any_work(world, monkeypatch):
    monkeypatch.setattr(train, "Data", None)
    assert "text.txt: a file and not a folder" in refused("text.txt")


def test_running_out_of_memory_says_what_to_lower(tmp_path, monkeypatch):
    def starved(*_, **__):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
    monkeypatch.setattr(V3, "loss", starved)
    assert "--micro_batch_size (now 2" in refused(tmp_path / "run")
    monkeypatch.setattr(V3, "loss", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):                                              # our own mistakes keep a trace
        go(tmp_path / "other")


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA GPU")
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_micro_batches_from_a_cuda_graph_train_the_same_bits_as_launched_ones(precision):
    c = tiny(dim=128, inter_dim=256, moe_inter_dim=128, n_heads=4, q_lora_rank=64, kv_lora_rank=64, qk_nope_head_dim=32,
             qk_rope_head_dim=16, v_head_dim=32, seq_len=64, precision=precision, init_std=0.05)
    device = torch.device("cuda")
    path, why = backend.training_graph(device, c)
    if path != "CUDA graph":
        pytest.skip(why)
    tokens = random_tokens(5, 3, 2, c.seq_len + 2).to(device)                            # 5 steps of 3 micro-batches

    def trained(form):
        with device:
            v3 = V3(c).train()
        optimizer, micro_batch, losses = train.make_optimizer(c, v3.parameters()), form(v3), []
        for p in v3.parameters():
            p.queue = fp8.AtOnce()
        for step, batch in enumerate(tokens):
            for micro in batch:                                                          # step 4 is of other numbers
                parts = micro_batch(micro, ([6 * c.seq_len] * 2, 6), 0.3 if step < 4 else 0.1)
                losses.append([float(part) for part in parts.values()])
            with torch.no_grad():
                losses.append(v3(tokens[0, 0, :, :c.seq_len]).sum().item())              # makes copies of its own
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            for gate in v3.gates():
                gate.update_bias(0.001)
        return losses, list(v3.state_dict().values()), micro_batch

    want, launched, _ = trained(lambda v3: partial(train.forward_backward, v3))
    got, recorded, form = trained(train.Recorded)
    assert form.graphs == {} and got == want                                             # step 4 was launched anew
    assert all(map(torch.equal, launched, recorded))
