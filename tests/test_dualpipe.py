"""Pipeline schedules: executable, complete, as long as the formulas say; the executor against one process."""
import datetime
import json
import multiprocessing
import os
import random
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import build, random_tokens, run_ranks, tiny
from torch import nn

import dualpipe
import model
import moe
import parallel
from bench_pipeline import Sleep, Sleeper
from configs import UserError
from dualpipe import KINDS, DualPipe, Step, bubble, layout, mirror, picture, schedule, simulate, source
from fp8 import Linear
from model import target_totals
from moe import Gate, GroupedLinear

ROOT = Path(__file__).resolve().parent.parent


def lists(kind, ranks, microbatches):
    return [schedule(kind, ranks, rank, microbatches) for rank in range(ranks)]


def simulated(kind, ranks, microbatches, *durations, **more):
    return simulate(kind, lists(kind, ranks, microbatches), *durations, **more)


def legal(kind, most=32, every=False):
    """(ranks, micro-batches): the fewest that are allowed, a few more, many."""
    some = range(1, 33) if every else (1, 2, 3, 4, 5, 6, 7, 8, 10, 13, 16, 22, 32)
    for ranks in (r for r in some if r <= most):
        if kind == "dualpipe":
            counts = [] if ranks % 2 else (2 * ranks, 2 * ranks + 2, 3 * ranks + 4)
        elif kind == "dualpipev":
            counts = (2 * ranks, 2 * ranks + 1, 3 * ranks + 2)
        else:
            counts = (1, ranks, ranks + 1, 2 * ranks + 3)
        yield from ((ranks, m) for m in counts)


def directions(kind, microbatches):
    """{direction: its micro-batches}."""
    half = range(microbatches // 2)
    return {"dualpipe": {0: half, 1: half}, "dualpipev": {0: range(microbatches), 1: range(microbatches)}}.get(
        kind, {0: range(microbatches)})


# --- the lists --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", KINDS)
def test_every_legal_schedule_can_be_run_and_does_each_thing_once(kind):
    for ranks, microbatches in legal(kind, every=True):
        whole = sorted((dir, mb) for dir, mbs in directions(kind, microbatches).items() for mb in mbs)
        every = lists(kind, ranks, microbatches)
        for steps in every:
            done = {part: [(d, m) for step in steps for p, d, m in step.parts if p in part]
                    for part in ("F", "BI", "I", "W")}
            assert sorted(done["F"]) == sorted(done["BI"]) == whole and done["I"] == done["W"]
            order = {(p.replace("I", "B"), d, m): i for i, step in enumerate(steps) for p, d, m in step.parts}
            assert all(order["F", d, m] < order["B", d, m] <= order.get(("W", d, m), 10**9) for d, m in whole)
        simulate(kind, every)                                             # raises where the lists wait for each other


@pytest.mark.parametrize("kind", KINDS)
def test_no_step_starts_before_what_it_needs_has_arrived(kind):
    for ranks, microbatches in legal(kind, most=8):
        result = simulated(kind, ranks, microbatches, 1.1, 2.3, 0.9, 2.9, p2p=0.25)
        end = {(rank, p.replace("I", "B"), d, m): entry["end"] for rank, entries in enumerate(result["steps"])
               for entry in entries for p, d, m in dualpipe_parts(entry)}
        for rank, entries in enumerate(result["steps"]):
            assert all(a["end"] <= b["start"] for a, b in zip(entries, entries[1:]))
            for entry in entries:
                for part, dir, mb in dualpipe_parts(entry):
                    giver = None if part == "W" else source(kind, ranks, rank, part, dir)
                    if giver:
                        assert end[giver[0], part.replace("I", "B"), giver[1], mb] + 0.25 * (giver[0] != rank) \
                            <= entry["start"] + 1e-9


def dualpipe_parts(entry):
    return Step(entry["kind"], entry["dir"], entry["mb"]).parts


@pytest.mark.parametrize("kind", KINDS)
def test_a_micro_batch_passes_the_stages_in_order(kind):
    for ranks, microbatches in [(4, 8), (6, 14)]:
        stages, stage = 2 * ranks if kind == "dualpipev" else ranks, lambda rank, dir: layout(kind, ranks, rank)[1][dir]
        for rank in range(ranks):
            for dir in directions(kind, microbatches):
                here, before = stage(rank, dir), source(kind, ranks, rank, "F", dir)
                after = source(kind, ranks, rank, "B", dir)
                assert (before is None) == (here == 0) and (after is None) == (here == stages - 1)
                assert before is None or stage(*before) == here - 1
                assert after is None or stage(*after) == here + 1


def released(n, r, m):
    """The eight phases of the released code for half-rank r of n, m micro-batches a direction: (what, phase) pairs."""
    out = [("F", 0)] * ((n - r - 1) * 2)
    out += [("F", 0), ("F", 1)] * (r + 1)
    out += [("I", 1), ("W",), ("F", 1)] * (n - r - 1)
    for i in range(m - 2 * n + r + 1):
        out += [("F", 0), ("B", 1)] if i == 0 and r == n - 1 else [("FB", 0, 1)]
        out += [("FB", 1, 0)]
    out += [("B", 1), ("FB", 1, 0)] * (n - r - 1)
    zero_bubble = False
    for i in range(r + 1):
        zero_bubble |= i == (r + 1) // 2 and r % 2 == 1
        out += [("I" if zero_bubble else "B", 1)]
        zero_bubble |= i == (r + 1) // 2 and r % 2 == 0
        out += [("I" if zero_bubble else "B", 0)]
    return out + [("W",), ("I", 0)] * (n - r - 1) + [("W",)] * (r + 1)


def test_the_order_is_that_of_the_released_schedules():
    def said(steps):
        return [("W",) if s.kind == "W" else (s.kind, *(s.dir if s.kind == "FB" else (s.dir,))) for s in steps]

    for ranks, microbatches in legal("dualpipev", most=16, every=True):
        for rank in range(ranks):
            want = released(ranks, rank, microbatches)
            assert said(schedule("dualpipev", ranks, rank, microbatches)) == want
            steps = schedule("dualpipe", 2 * ranks, rank, 2 * microbatches)
            assert said(steps) == want
            assert [mirror(s) for s in schedule("dualpipe", 2 * ranks, 2 * ranks - 1 - rank, 2 * microbatches)] == steps


def test_micro_batches_keep_their_order():
    for step_kinds, kind in [("F", "1f1b"), ("F", "dualpipe"), ("BI", "dualpipe"), ("W", "zb1p")]:
        for steps in lists(kind, 4, 10):
            for dir in directions(kind, 10):
                mbs = [m for step in steps for p, d, m in step.parts if p in step_kinds and d == dir]
                assert mbs == sorted(mbs)


# --- the formulas -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["1f1b", "zb1p"])
def test_the_bubble_of_1f1b_and_zb1p_is_exact_from_as_many_micro_batches_as_ranks_up(kind):
    for ranks, microbatches in legal(kind, every=True):
        for F, B, W in [(1, 2, 1), (1, 3, 0.5), (2, 3, 1)]:
            if microbatches >= ranks:
                bubbles = simulated(kind, ranks, microbatches, F, B, W)["bubbles"]
                assert bubbles == pytest.approx([bubble(kind, ranks, F, B, W, F + B)] * ranks)


@pytest.mark.parametrize("kind", ["dualpipe", "dualpipev"])
def test_the_bubble_of_dualpipe_is_the_published_form(kind):
    for ranks, microbatches in legal(kind, most=16 if kind == "dualpipev" else 32, every=True):          # 32 stages
        bubbles = simulated(kind, ranks, microbatches)["bubbles"]                 # F, B, W, FB = 1, 2, 1, 3: every rank
        assert bubbles == pytest.approx([bubble(kind, ranks, 1, 2, 1, 3)] * ranks)
        for FB in (2, 2.25, 2.75):                                                # a pair hides something: the maximum
            worst = simulated(kind, ranks, microbatches, FB=FB)["bubble"]
            assert worst == pytest.approx(bubble(kind, ranks, 1, 2, 1, FB))


@pytest.mark.parametrize("kind", ["dualpipe", "dualpipev"])
@pytest.mark.parametrize("F, B, W", [(1, 1.5, 0.5), (1, 1.25, 0.5), (2, 2, 1), (2, 0.75, 0.25)])
def test_the_opening_says_where_the_form_is_exact(kind, F, B, W):
    n = lambda ranks: ranks if kind == "dualpipev" else ranks // 2
    for ranks, microbatches in legal(kind, most=10, every=True):
        for FB in (max(F, B), F + B):
            bubbles = simulated(kind, ranks, microbatches, F, B, W, FB)["bubbles"]
            ours = (n(ranks) - 1) * (F + FB - 2 * W)
            assert max(bubbles) == pytest.approx(ours)
            assert FB < F + B or bubbles == pytest.approx([ours] * ranks)
            assert (bubble(kind, ranks, F, B, W, FB) == pytest.approx(ours)) == (F == B - W or n(ranks) == 1)


def test_the_opening_holds_for_any_durations_that_it_names_and_not_beyond():
    rng = random.Random(0)
    for _ in range(60):
        W, B, F = sorted(rng.uniform(0.1, 3) for _ in range(3))
        n, m = rng.randint(1, 6), rng.randint(0, 9)
        B, FB = B + W, rng.uniform(max(F, B + W), F + B + W)
        for kind, ranks, microbatches in [("dualpipev", n, 2 * n + m), ("dualpipe", 2 * n, 4 * n + 2 * m)]:
            worst = simulated(kind, ranks, microbatches, F, B, W, FB)["bubble"]
            assert worst == pytest.approx((n - 1) * (F + FB - 2 * W)), (kind, n, m, F, B, W, FB)
        M = n + m
        assert simulated("1f1b", n, M, F, B, W)["bubble"] == pytest.approx((n - 1) * (F + B))
        assert simulated("zb1p", n, M, F, B, W)["bubble"] == pytest.approx((n - 1) * (F + B - 2 * W))
    # Here I > F, and W > I: ranks wait in the midst of the run, of which the forms know nothing.
    assert simulated("dualpipe", 8, 20, 1, 3, 1, 4)["bubble"] > 3 * (1 + 4 - 2)
    assert simulated("zb1p", 8, 20, 1, 2.5, 1.5)["bubble"] > 7 * (1 + 1 - 1.5)


def test_the_bubbles_of_eight_ranks():
    assert simulated("dualpipe", 8, 20, 1, 2, 1, 2)["bubbles"] == [1, 2, 3, 3, 3, 3, 2, 1]
    assert {kind: simulated(kind, 8, 20)["bubble"] for kind in KINDS} == {"1f1b": 21, "zb1p": 7, "dualpipe": 6,
                                                                          "dualpipev": 14}


@pytest.mark.parametrize("kind", KINDS)
def test_activations_held_at_once(kind):
    for ranks, microbatches in legal(kind, every=True):
        want = {"1f1b": [min(ranks - rank, microbatches) for rank in range(ranks)],
                "zb1p": [min(ranks, microbatches)] * ranks,
                "dualpipe": [ranks + 1] * ranks, "dualpipev": [2 * ranks + 1] * ranks}[kind]
        assert simulated(kind, ranks, microbatches)["peak_activations"] == want


def test_a_pair_is_atomic_and_sending_takes_its_time():
    assert simulated("1f1b", 3, 1, 1, 2, 1, p2p=0.5)["makespan"] == 3 + 6 + 4 * 0.5
    # From hand to hand at the fold nothing is sent.
    assert simulated("dualpipev", 1, 2, p2p=7)["makespan"] == simulated("dualpipev", 1, 2)["makespan"] == 12
    every = lists("dualpipe", 2, 4)
    pair = next(entry for entry in simulate("dualpipe", every, FB=2.5)["steps"][0] if entry["kind"] == "FB")
    assert pair["end"] - pair["start"] == 2.5 and pair["dir"] == (1, 0)


def test_a_slow_rank_holds_up_the_others():
    every = lists("1f1b", 2, 8)
    slow = simulate("1f1b", every, F=[1.0, 1.5], B=[2.0, 3.0], W=0.0)
    assert slow["makespan"] == 8 * 4.5 + 1 + 2 and slow["bubbles"] == [39 - 8 * 3, 3]
    assert simulate("1f1b", every, [1.0] * 2, [2.0] * 2, [1.0] * 2, [None] * 2) == simulate("1f1b", every)


def test_lists_that_wait_for_each_other_are_told():
    every = lists("1f1b", 2, 3)
    every[1][0], every[1][1] = every[1][1], every[1][0]                           # a backward before its forward
    with pytest.raises(RuntimeError, match="waits for itself: rank 0 at .*; rank 1 at .*'B'"):
        simulate("1f1b", every)


# --- the command ------------------------------------------------------------------------------------------------------

def command(*argv, **options):
    return subprocess.run([sys.executable, "dualpipe.py", *argv], cwd=ROOT, text=True, capture_output=True, timeout=60,
                          **options)


def out(capsys, *argv):
    assert dualpipe.main(list(argv)) == 0
    return capsys.readouterr().out


def test_the_command_draws_the_schedule_and_compares_the_four(capsys):
    text = out(capsys, "--pp=8", "--microbatches=20")
    lines = text.splitlines()
    assert lines[0] == "dualpipe, 8 ranks, 20 micro-batches: F=1 B=2 W=1 FB=3 p2p=0"
    assert [line[:7] for line in lines[2:10]] == [f"rank {r} " for r in range(8)]
    assert max(map(len, lines[2:10])) == 7 + 2 * 66
    assert [line.split() for line in lines[12:16]] == [["1f1b", "8", "81", "21", "21", "25.9%", "8", "1/8"],
                                                       ["zb1p", "8", "67", "7", "7", "10.4%", "8", "1/8"],
                                                       ["dualpipe", "8", "66", "6", "6", "9.1%", "9", "2/8"],
                                                       ["dualpipev", "16", "67", "7", "7", "10.4%", "8.5", "1/8"]]
    assert "\033" not in text
    rows = out(capsys, "--pp=3", "--microbatches=4", "--kind=zb1p").splitlines()  # one that does not exist says why
    assert any(re.match(r"dualpipe +3 +an even number of ranks", row) for row in rows)


def test_the_figure_in_the_opening_is_what_the_command_draws(capsys):
    drawn = out(capsys, "--pp=4", "--microbatches=8").splitlines()[2:6]
    opening = [line[4:] for line in dualpipe.__doc__.splitlines() if line.startswith("    rank ")]
    assert [line[:len(ours)] for line, ours in zip(opening, drawn)] == drawn


def test_the_json_has_every_step(capsys):
    o = json.loads(out(capsys, "--pp=4", "--microbatches=10", "--kind=dualpipe", "--FB=2.5", "--json"))
    assert o.keys() == {"makespan", "bubble", "bubbles", "peak_activations", "steps"}
    assert o["bubble"] == max(o["bubbles"]) and o["peak_activations"] == [5] * 4 and len(o["steps"]) == 4
    for rank, entries in enumerate(o["steps"]):
        for e in entries:
            assert e.keys() == {"rank", "kind", "dir", "mb", "start", "end"} and e["rank"] == rank
            assert e["end"] - e["start"] == {"F": 1, "B": 2, "I": 1, "W": 1, "FB": 2.5}[e["kind"]]
            assert (len(e["mb"]) == len(e["dir"]) == 2) if e["kind"] == "FB" else e["dir"] in (0, 1)
        assert o["bubbles"][rank] == o["makespan"] - sum(e["end"] - e["start"] for e in entries)


def test_colours_change_nothing_but_colours_and_a_narrow_terminal_gets_a_narrow_picture():
    result = simulated("dualpipe", 4, 8)
    plain, coloured = picture(result), picture(result, colour=True)
    assert "\033[" in coloured and re.sub(r"\033\[[0-9;]*m", "", coloured) == plain
    assert max(map(len, picture(result, columns=40).splitlines())) <= 40
    assert len(picture(simulated("1f1b", 2, 3, 1e-6, 1e6, 0.0))) < 10_000


def test_help_names_every_flag_and_its_default(capsys):
    text = out(capsys, "--help")
    assert all(flag in text for flag in ("--pp=8", "--microbatches=20", "--kind=dualpipe", "--F=1.0", "--FB=", "--json",
                                         "--png="))


@pytest.mark.parametrize("argv, said", [
    (["--pp=7"], "even number of ranks"), (["--microbatches=21"], "even number of micro-batches"),
    (["--microbatches=14"], "at least 16"), (["--kind=dualpipev", "--microbatches=15"], "at least 16"),
    (["--kind=dualpip"], "did you mean dualpipe"), (["--kind="], "--kind=VALUE"), (["--pp=0"], "at least 1"),
    (["--pp=eight"], "must be int"), (["--pp"], "--pp=VALUE"), (["--json=3"], "True or False"), (["pp=8"], "--pp"),
    (["--microbatch=8"], "did you mean --microbatches"), (["--F=nan"], "out of range"), (["--F=inf"], "out of range"),
    (["--F=0"], "more than 0"), (["--FB=0"], "more than 0"), (["--W=3"], "--B=2"), (["--p2p=-1"], "at least 0"),
    (["--pp=1024", "--microbatches=4096"], "too many"), (["--pp=64", "--microbatches=128", "--png=x"], "with --png"),
    (["--zzz"], "--help")])
def test_a_mistake_is_answered_in_one_line(argv, said):
    with pytest.raises(UserError, match=re.escape(said)) as e:
        dualpipe.main(argv)
    assert "\n" not in str(e.value)


def test_a_mistake_leaves_with_code_2_and_no_traceback():
    done = command("--pp=7")
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1


def test_no_such_rank():
    with pytest.raises(UserError, match="rank 4 is not one of the 4"):
        schedule("1f1b", 4, 4, 8)


def test_a_missing_matplotlib_is_named_with_its_remedy(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="requirements-extra.txt"):
        dualpipe.main([f"--png={tmp_path / 'x.png'}"])


@pytest.mark.extra
def test_the_drawing_is_a_png_and_a_folder_that_is_not_there_is_named(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="pip install -r requirements-extra.txt")
    out(capsys, "--pp=4", "--microbatches=8", f"--png={tmp_path / 'x.png'}")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG") and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(UserError, match="can be written"):
        dualpipe.main([f"--png={tmp_path / 'nowhere' / 'x.png'}"])


# --- the executor: what its ranks do ----------------------------------------------------------------------------------

D = 6


class Layer(nn.Module):
    """[b, D] -> ([b, D], a loss of its own): two matrices whose dW can be put off, a vector whose gradient can't. The
    output is a view of a tensor that the backward reads: to free it once it is sent would be wrong."""

    def __init__(self, index):
        super().__init__()
        torch.manual_seed(index)
        self.up, self.down, self.scale = Linear(D, 2 * D), Linear(2 * D, D), nn.Parameter(torch.rand(D))
        self.local = index % 3 != 1
        for weight in (self.up.weight, self.down.weight):
            nn.init.normal_(weight)
        self.double()

    def forward(self, x):
        y = (self.down(self.up(x).tanh()) * self.scale + x).sigmoid()
        return y.view(-1, D), y.square().sum() if self.local else None


def squared(y, labels):
    return ((y - labels) ** 2).sum()


def error(ours, theirs):
    """Largest difference over the largest value."""
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30)).item()


def shares(kind, pipe, named, twins, shared=()):
    """Who sums and who owns what of {name: parameter}, the same in two ranks that hold the same."""
    copied = {id(p) for p in dualpipe.copied(kind, pipe.in_order, shared)}
    return parallel.Shares({name: (p, twins if id(p) in copied else None) for name, p in named.items()}, zero1=False)


def twins_of(rank, groups):
    """The group of this rank among `groups` of ranks, which all make."""
    return next(group for ranks, group in [(ranks, dist.new_group(ranks)) for ranks in groups] if rank in ranks)


def run_layers(kind, rank, ranks):
    """One process, then the pipeline: loss, gradients once and accumulated, evaluation, what is put off and freed."""
    M = 3 * ranks + ranks % 2
    x, labels = torch.randn(2, 2 * M, D, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    whole = [Layer(i) for i in range(layout(kind, ranks, rank)[0])]
    h, want = x, 0.0
    for layer in whole:
        h, loss = layer(h)
        want = want + (0.0 if loss is None else loss)
    want = want + squared(h, labels)
    want.backward()

    mine = [Layer(i) for i in layout(kind, ranks, rank)[1]]
    pipe = DualPipe(kind, mine, squared, torch.empty(2, D, dtype=torch.float64))
    named = {f"{i}.{name}": p for i, module in enumerate(pipe.in_order) for name, p in module.named_parameters()}
    replicas = shares(kind, pipe, named, twins_of(rank, [[r, ranks - 1 - r] for r in range(ranks // 2)]))
    put_off, sending, run = set(), [], pipe.run

    def watched(step):
        sending.append(len(pipe.sending))
        run(step)
        put_off.update(len(pipe.late[dir, mb]) for part, dir, mb in step.parts if part == "I")

    pipe.run = watched
    ends = rank in (0, ranks - 1)
    loss = pipe.step(M, x if ends else None, labels if ends else None)
    replicas.sum_gradients()
    grads = [(p.grad.clone(), q.grad) for ours, i in zip(mine, layout(kind, ranks, rank)[1])
             for p, q in zip(ours.parameters(), whole[i].parameters())]
    with torch.no_grad():
        evaluated = pipe.step(M, x, labels)
    left = [len(kept) for kept in (pipe.held, pipe.late, pipe.arrived, pipe.sending, pipe.receiving)]
    same = all(torch.equal(p.grad, g) for p, (g, _) in zip((p for ours in mine for p in ours.parameters()), grads))
    for ours in mine:
        ours.zero_grad()
    for _ in range(2):
        pipe.step(M, x, labels)
    replicas.sum_gradients()
    twice = [p.grad for ours in mine for p in ours.parameters()]
    return {"loss": abs(loss / want.item() - 1), "evaluated": abs(evaluated / want.item() - 1), "untouched": same,
            "grads": max(error(ours, theirs) for ours, theirs in grads),
            "accumulated": max(error(p, 2 * theirs) for p, (_, theirs) in zip(twice, grads)),
            "put_off": sorted(put_off), "sending": max(sending), "microbatches": M,
            "left": sum(left) + len(pipe.held) + len(pipe.late) + len(pipe.arrived) + len(pipe.sending)}


def run_time(kind, rank, ranks, seconds=0.02, attempts=3):
    """Measured over simulated makespan: the best attempt, for a busy machine only adds."""
    M, x, best = 2 * ranks, torch.zeros(4 * ranks, D), 10.0
    pipe = DualPipe(kind, [Sleeper(seconds) for _ in layout(kind, ranks, rank)[1]], squared, torch.empty(2, D))
    want = simulated(kind, ranks, M)["makespan"] * seconds
    for _ in range(attempts):
        if best > 1.15:
            dist.barrier()
            began = time.time()
            pipe.step(M, x, x)
            took = torch.tensor(time.time() - began)
            dist.all_reduce(took, dist.ReduceOp.MAX)
            best = min(best, took.item() / want)
    return best


def run_v3(kind, rank, ranks, micro_batches=1, ep=1, **changes):
    """V3 in stages, and its experts on `ep` ranks each, against V3 in one process, its loss taken of one micro-batch or
    as many as a pipeline's."""
    pp, T = ranks // ep, 9
    lines = [dist.new_group(list(range(e, ranks, ep))) for e in range(ep)]
    spreads = [dist.new_group(list(range(ep * r, ep * (r + 1)))) for r in range(pp)]
    (count, mine), M, line, spread = layout(kind, pp, rank // ep), 2 * pp, lines[rank % ep], spreads[rank // ep]
    whole = build(**{**dict(n_layers=count, balance_alpha=0.1, init_std=0.1, seq_len=T), **changes})
    tokens = random_tokens(ep * M, T + 2)
    valid = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(3)) < 0.7
    totals, loss, parts = target_totals(tokens.masked_fill(~valid, -1), 1), 0.0, {}
    for micro, targets in zip(tokens.chunk(micro_batches), valid.chunk(micro_batches)):
        share, more = whole.loss(micro, targets, totals, mtp_weight=0.7)
        share.backward()
        loss += share.item()
        parts = {name: parts.get(name, 0.0) + part.item() for name, part in more.items()}
    whole.eval()
    with torch.no_grad():
        evaluated = whole.loss(tokens, valid, totals)[1]["loss"].item()

    stages = [s.double() for s in model.stages(whole.config, count, mine, initialize=False)]
    for s in stages:
        s.load_state_dict({name: whole.state_dict()[name] for name in s.state_dict()})
    moe.spread(nn.ModuleList(stages), moe.ExpertRanks(1, ep, rank % ep, inside=spread))
    pipe = DualPipe(kind, stages, next((s.criterion for s in stages if s.last), None), stages[0].like(1), line)
    cuts, run = [], pipe.run
    pipe.run = lambda step: (run(step), cuts.extend(len(held[-1]) for held in pipe.held.values()))
    here, labels = (t[rank % ep * M:][:M] for t in (tokens, torch.where(valid, tokens, ~tokens)))
    for s in stages:
        s.begin(totals, mtp_weight=0.7)
    took = pipe.step(M, here, labels)
    ours = {name: p for s in pipe.in_order for name, p in s.named_parameters()}
    twins = twins_of(rank, [[ep * r + e, ep * (pp - 1 - r) + e] for r in range(pp // 2) for e in range(ep)])
    replicas = shares(kind, pipe, ours, twins, model.shared(stages))
    replicas.sum_gradients()
    theirs = {name: p.grad for name, p in whole.named_parameters()}
    experts = len(whole.mtp[0].block.ffn.w13) // ep
    for name, p in ours.items():
        if name.endswith(("ffn.w13", "ffn.w2")) and p.ndim == 3:
            theirs[name] = theirs[name][rank % ep * experts:][:experts]
        else:
            dist.all_reduce(p.grad, group=spread)
    gates = dict(whole.named_modules())
    gates = [(gate, gates[name]) for s in pipe.in_order for name, gate in s.named_modules() if isinstance(gate, Gate)]
    if kind == "dualpipe":
        parallel.add([gate.load for gate, _ in gates], twins)
    for gate, _ in gates:
        dist.all_reduce(gate.load, group=spread)
    parts_here = [sum(float(s.parts[name]) for s in stages) for name in parts]

    for s in stages:
        s.eval()
        s.begin(totals)
    with torch.no_grad():
        seen = pipe.step(M, here, labels)
    sums = torch.tensor([took, seen], dtype=torch.float64)
    dist.all_reduce(sums, group=spread)
    return {"loss": abs(sums[0].item() / loss - 1), "evaluated": abs(sums[1].item() / evaluated - 1),
            "loads": all(torch.equal(gate.load, ref.load) for gate, ref in gates), "cuts": sum(cuts),
            "parts": parts_here, "whole": list(parts.values()),
            "grads": max(error(p.grad, theirs[name]) for name, p in ours.items()),
            "moved": min(grad.abs().max().item() for name, grad in theirs.items() if name in ours),
            "owned": sorted(replicas.owned), "names": sorted(theirs)}


class Far(ThreadPoolExecutor):
    """What moe.ExpertRanks exchanges by, over a slow network."""
    seconds = 0.0

    def submit(self, function):
        return super().submit(lambda: (time.sleep(self.seconds), function())[1])


OVERLAP = {                                    # seconds: of attention's F, I and W, of the experts', of an exchange
    "all of one length": (0.02, 0.02, 0.02), "half of the arithmetic": (0.016, 0.032, 0.018),
    "most of the arithmetic": (0.02, 0.04, 0.04)}


class Slow(nn.Module):
    """x, but F, I and W take so long, W in two parts."""

    def __init__(self, seconds):
        super().__init__()
        self.seconds, self.weights = seconds, nn.ParameterList(torch.zeros(1) for _ in range(2))

    def forward(self, x):
        for weight in self.weights:
            x = Sleep.apply(x, self.seconds / 2, weight)
        return x


def run_overlap(attention, experts, exchange):
    """Seconds that a pair of chunks takes, of two layers each, whose segments and exchanges take these: with no time
    for the exchanges; with it; and the same without taking turns."""
    c = tiny(n_layers=4, n_dense_layers=0, n_mtp=0, seq_len=9)
    tokens, ranks, routed = random_tokens(9, 10), moe.ExpertRanks(1, 1, 0), moe.routed
    ranks.thread = Far(1)
    stages = model.stages(c, 2, [0, 1])
    stages[0].slow = nn.ModuleList([Slow(attention), Slow(experts)])              # with its weights in a stage
    moe.routed = lambda x, *more: routed(stages[0].slow[1](x), *more)
    for block in (block for s in stages for block in s.layers.values()):
        block.ffn.ranks = ranks
        block.attention = lambda x, rope, run=block.attention: run(stages[0].slow[0](x), rope)
    out = []
    for delay, overlap in [(0.0, True), (exchange, True), (exchange, False)]:
        pipe, times, Far.seconds = DualPipe("dualpipev", stages, stages[1].criterion, stages[0].like(1),
                                            overlap=overlap), [], delay
        for s in stages:
            s.begin(target_totals(tokens, 0))
        run = pipe.run

        def timed(step):
            began = time.time()
            run(step)
            times.extend([time.time() - began] if step.kind == "FB" else [])

        pipe.run = timed
        pipe.step(9, tokens, tokens)
        out.append(min(times))                                                    # a busy machine only adds
    moe.routed = routed
    return {"travel": 8 * exchange, "free": out[0], "overlapped": out[1], "apart": out[2]}


class Broken(Layer):
    """A stage that fails at its third forward."""
    calls = 0

    def forward(self, x):
        self.calls += 1
        if self.calls == 3:
            raise ValueError("the third one")
        return super().forward(x)


def told(function, *args, **kwargs):
    """The message of the exception."""
    try:
        function(*args, **kwargs)
    except Exception as e:
        return f"{type(e).__name__}: {e}"


def run_mistakes(rank, ranks):
    like, M = torch.empty(2, D, dtype=torch.float64), 3 * ranks
    x = torch.randn(2 * M, D, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    out = {}
    for kind in KINDS:
        mine = [(Broken if rank == 1 and not dir else Layer)(i) for dir, i in enumerate(layout(kind, ranks, rank)[1])]
        pipe = DualPipe(kind, mine, squared, like)
        out[kind] = told(pipe.step, M, x, x)
        pipe.step(M, x, x)                                                        # and the pipeline goes on
    pipe = DualPipe("1f1b", [Layer(rank)], squared, like)
    out["not divisible"] = told(pipe.step, M, x[1:], x)
    out["no labels"] = told(pipe.step, M, x)
    out["another shape"] = told(DualPipe("1f1b", [Layer(rank)], squared, like[:1]).step, M, x, x)
    out["stages"] = told(DualPipe, "dualpipe", [Layer(0)], squared, like)
    out["micro-batches"] = told(DualPipe("dualpipe", [Layer(0)] * 2, squared, like).step, 2 * ranks - 2, x, x)
    return out


def run_death(rank, ranks):
    class Dies(Layer):
        def forward(self, x):
            os._exit(3)

    began = time.time()
    pipe = DualPipe("1f1b", [(Dies if rank == 1 else Layer)(rank)], squared, torch.empty(2, D, dtype=torch.float64))
    x = torch.zeros(16, D, dtype=torch.float64)
    return {"told": told(pipe.step, 8, x, x), "seconds": time.time() - began}


def run_hang(rank, ranks):
    class Hangs(Layer):
        def forward(self, x):
            time.sleep(4)
            return super().forward(x)

    group, began = dist.new_group(timeout=datetime.timedelta(seconds=1)), time.time()
    pipe = DualPipe("1f1b", [(Hangs if rank == 1 else Layer)(rank)], squared, torch.empty(2, D, dtype=torch.float64),
                    group)
    x = torch.zeros(4, D, dtype=torch.float64)
    return {"told": told(pipe.step, 2, x, x), "seconds": time.time() - began}


def rank_main(rank, ranks, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{ranks}", rank=rank, world_size=ranks,
                            timeout=datetime.timedelta(seconds=30))
    out = {f"v3 {kind}": run_v3(kind, rank, ranks) for kind in KINDS if ranks > 1}
    if ranks == 1:
        out["overlap"] = {name: run_overlap(*seconds) for name, seconds in OVERLAP.items()}
    if ranks in (2, 4):
        out |= {kind: run_layers(kind, rank, ranks) for kind in KINDS}
        out["mistakes"] = run_mistakes(rank, ranks)
    if ranks == 2:
        out["v3 fp8"] = run_v3("dualpipev", rank, ranks, 2 * ranks, precision="fp8_reference")
        out["hang"] = run_hang(rank, ranks)
    if ranks == 4:
        out["time"] = {kind: run_time(kind, rank, ranks) for kind in KINDS}
        out |= {f"v3 {kind} ep": run_v3(kind, rank, ranks, ep=2, recompute=kind == "dualpipe") for kind in KINDS}
    (folder / f"{ranks}.{rank}.json").write_text(json.dumps(out))
    if ranks == 4:
        out = run_death(rank, ranks)
        (folder / f"death.{rank}.json").write_text(json.dumps(out))
        os._exit(0)                                                               # nobody is left to say goodbye to
    dist.destroy_process_group()


if __name__ == "__main__":
    # One process imports torch; on Linux its ranks are forks of it, before it has started any thread.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    for world in (1, 2, 4, 8):
        processes = [context.Process(target=rank_main, args=(r, world, Path(sys.argv[1]))) for r in range(world)]
        [p.start() for p in processes]
        [p.join() for p in processes]


# --- the executor: what is asked of them ------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """{(number of ranks, rank): results}, of one run of this file."""
    folder = tmp_path_factory.mktemp("ranks")
    done = run_ranks(__file__, folder, timeout=120)
    out = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    assert len(out) == 1 + 2 + 4 + 8 + 3, done.stderr
    return out


WORLDS = pytest.mark.parametrize("world", [2, 4])


@WORLDS
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_every_gradient_equal_one_process(kind, world, ranks):
    for r in range(world):
        result = ranks[f"{world}.{r}"][kind]
        assert max(result[what] for what in ("loss", "grads", "accumulated", "evaluated")) < 1e-12, result
        assert result["untouched"], "evaluation changed a gradient"
        assert result["left"] == 0


@WORLDS
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_put_off_is_the_two_matrices_and_what_is_sent_is_let_go(kind, world, ranks):
    for r in range(world):
        result = ranks[f"{world}.{r}"][kind]
        assert result["put_off"] == ([] if kind == "1f1b" else [2])
        assert result["sending"] <= 4 < result["microbatches"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_takes_as_long_as_the_simulation_says(kind, ranks):
    took = ranks["4.0"]["time"][kind]
    print(f"{kind}: {took:.3f} of the simulated makespan")
    assert 0.99 < took < 1.3


@pytest.mark.parametrize("world, kind", [(world, kind) for world in (2, 4, 8) for kind in KINDS] + [(2, "fp8")]
                         + [(4, f"{kind} ep") for kind in KINDS])
def test_v3_in_stages_equals_v3(world, kind, ranks):
    results = [ranks[f"{world}.{r}"][f"v3 {kind}"] for r in range(world)]
    limit = 1e-6 if kind == "fp8" else 1e-12                                   # the losses of BF16 states are float32
    for result in results:
        assert result["grads"] < 1e-12 and result["loads"] and result["moved"] > 0, result
        assert max(result["loss"], result["evaluated"]) < limit, result
    assert any(result["cuts"] for result in results) == kind.endswith("ep")
    parts = [sum(parts) for parts in zip(*(result["parts"] for result in results))]
    assert parts == pytest.approx(results[0]["whole"], rel=limit) and min(parts) > 0
    # What is counted once and written once: every parameter, by one rank of a pipeline.
    assert sorted(name for result in results[::2 if kind.endswith("ep") else 1] for name in result["owned"]) \
        == results[0]["names"]


@pytest.mark.parametrize("lengths", OVERLAP)
def test_a_pair_hides_the_exchanges_of_one_chunk_behind_the_arithmetic_of_the_other(lengths, ranks):
    took = ranks["1.0"]["overlap"][lengths]
    hidden = [1 - (took[how] - took["free"]) / took["travel"] for how in ("overlapped", "apart")]
    print(f"hidden: {hidden[0]:.1%} taking turns, {hidden[1]:.1%} one after the other; {took}")
    assert hidden[0] >= 0.9 and hidden[1] < 0.6                    # alone, a backward hides some behind its own W's


def test_half_of_what_a_backward_puts_off_waits_for_the_other_chunks_segment():
    pipe, log = DualPipe.__new__(DualPipe), []
    pipe.arrived, pipe.late, pipe.give = {}, {}, lambda *_: log.append("done")

    def differentiate(ends, grads, queue):
        log.append("I")
        queue += [lambda i=i: log.append(f"W{i}") for i in range(3)]

    pipe.differentiate = differentiate
    for part, want in [("B", "I W2 W0 other W1 I W2 W0 other W1 I done W2 W1 W0"), ("I", "I other I other I done")]:
        log.clear()
        pipe.held = {(0, 0): (torch.zeros(1), [], None, [dualpipe.Cut([], []) for _ in range(2)])}
        for _ in pipe.backward(part, 0, 0):
            log.append("other")
        assert " ".join(log) == want
    assert len(pipe.late[0, 0]) == 9


@WORLDS
def test_an_error_on_one_rank_is_raised_on_all(world, ranks):
    for r in range(world):
        result = ranks[f"{world}.{r}"]["mistakes"]
        for kind in KINDS:
            assert result[kind] == "RuntimeError: rank 1, ValueError: the third one"
        assert f"a batch of {6 * world - 1} can't be cut into {3 * world}" in result["not divisible"]
        assert f"rank {world - 1}, UserError: no labels" in result["no labels"]
        assert "returned torch.float64 [2, 6]" in result["another shape"] and "[1, 6]" in result["another shape"]
        assert "1 stages given" in result["stages"] and f"at least {2 * world}" in result["micro-batches"]


def test_a_rank_that_dies_ends_the_others_before_the_timeout(ranks):
    assert "death.1" not in ranks
    for r in (0, 2, 3):
        result = ranks[f"death.{r}"]
        assert re.match(r"RuntimeError: rank \d: rank .* is gone", result["told"]) and result["seconds"] < 20, result


def test_a_rank_that_hangs_ends_the_others_at_the_timeout(ranks):
    result = ranks["2.0"]["hang"]
    assert re.match(r"RuntimeError: rank 0: rank 1 is gone or took longer", result["told"])
    assert 0.9 < result["seconds"] < 3, result


def test_a_queue_on_a_weight_takes_its_gradient_and_gives_it_later():
    x, linear = torch.randn(2, 3, D, requires_grad=True), Linear(D, 4)
    nn.init.normal_(linear.weight)
    w = torch.randn(2, 4, D, requires_grad=True)
    for weight, product in [(linear.weight, lambda: linear(x)),
                            (w, lambda: GroupedLinear.apply(x.flatten(0, 1), w, [4, 6]))]:
        product().square().sum().backward()
        want, dx = weight.grad.clone(), x.grad.clone()
        x.grad, weight.queue = None, []
        product().square().sum().backward()
        assert torch.equal(weight.grad, want) and torch.equal(x.grad, dx) and len(weight.queue) == 1
        with torch.no_grad():
            weight.queue.pop()()
        assert torch.equal(weight.grad, 2 * want)
        x.grad, weight.queue = None, None
