"""Pipeline schedules: executable, complete, as long as the formulas say; the executor against one process."""
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dualpipe
from configs import UserError
from dualpipe import KINDS, Step, bubble, mirror, picture, schedule, simulate, source, stage

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
        stages = 2 * ranks if kind == "dualpipev" else ranks
        for rank in range(ranks):
            for dir in directions(kind, microbatches):
                here, before = stage(kind, ranks, rank, dir), source(kind, ranks, rank, "F", dir)
                after = source(kind, ranks, rank, "B", dir)
                assert (before is None) == (here == 0) and (after is None) == (here == stages - 1)
                assert before is None or stage(kind, ranks, *before) == here - 1
                assert after is None or stage(kind, ranks, *after) == here + 1


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

    for ranks, microbatches in legal("dualpipev", most=16):
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
    for ranks, microbatches in legal(kind):
        for F, B, W in [(1, 2, 1), (1, 3, 0.5), (2, 3, 1)]:
            if microbatches >= ranks:
                bubbles = simulated(kind, ranks, microbatches, F, B, W)["bubbles"]
                assert bubbles == pytest.approx([bubble(kind, ranks, F, B, W, F + B)] * ranks)


@pytest.mark.parametrize("kind", ["dualpipe", "dualpipev"])
def test_the_bubble_of_dualpipe_is_the_published_form(kind):
    for ranks, microbatches in legal(kind):
        bubbles = simulated(kind, ranks, microbatches)["bubbles"]                 # F, B, W, FB = 1, 2, 1, 3: every rank
        assert bubbles == pytest.approx([bubble(kind, ranks, 1, 2, 1, 3)] * ranks)
        for FB in (2, 2.25, 2.75):                                                # a pair hides something: the maximum
            worst = simulated(kind, ranks, microbatches, FB=FB)["bubble"]
            assert worst == pytest.approx(bubble(kind, ranks, 1, 2, 1, FB))


@pytest.mark.parametrize("kind", ["dualpipe", "dualpipev"])
@pytest.mark.parametrize("F, B, W", [(1, 1.5, 0.5), (1, 1.25, 0.5), (2, 2, 1), (2, 0.75, 0.25)])
def test_the_opening_says_where_the_form_is_exact(kind, F, B, W):
    n = lambda ranks: ranks if kind == "dualpipev" else ranks // 2
    for ranks, microbatches in legal(kind, most=10):
        for FB in (max(F, B), F + B):
            bubbles = simulated(kind, ranks, microbatches, F, B, W, FB)["bubbles"]
            ours = (n(ranks) - 1) * (F + FB - 2 * W)
            assert max(bubbles) == pytest.approx(ours)
            assert FB < F + B or bubbles == pytest.approx([ours] * ranks)
            assert (bubble(kind, ranks, F, B, W, FB) == pytest.approx(ours)) == (F == B - W or n(ranks) == 1)


def test_the_bubbles_of_eight_ranks():
    assert simulated("dualpipe", 8, 20, 1, 2, 1, 2)["bubbles"] == [1, 2, 3, 3, 3, 3, 2, 1]
    assert {kind: simulated(kind, 8, 20)["bubble"] for kind in KINDS} == {"1f1b": 21, "zb1p": 7, "dualpipe": 6,
                                                                          "dualpipev": 14}


@pytest.mark.parametrize("kind", KINDS)
def test_activations_held_at_once(kind):
    for ranks, microbatches in legal(kind):
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
    (["--pp=eight"], "must be int"), (["--pp"], "--pp=VALUE"), (["--json=1"], "write --json"), (["pp=8"], "--pp"),
    (["--microbatch=8"], "did you mean --microbatches"), (["--F=nan"], "out of range"), (["--F=inf"], "out of range"),
    (["--F=0"], "more than 0"), (["--FB=0"], "more than 0"), (["--W=3"], "--B=2"), (["--p2p=-1"], "at least 0"),
    (["--pp=1024", "--microbatches=4096"], "too many"), (["--zzz"], "--help")])
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
