"""DualPipe: a pipeline fed from both ends (section 3.2.1). A schedule is data, drawn, simulated and executed alike.

The problem. A model too big for one GPU is cut into stages, a rank each, and the batch into micro-batches that pass
through them one behind the other. A rank can't start before the first micro-batch reaches it, nor stop before the last
gradient has: it idles, and that is the bubble. Besides, V3's experts lie on other nodes, and a stage spends as long on
its all-to-all as on its arithmetic. DualPipe answers both. Micro-batches enter at both ends, so that in the middle of
the run every rank always has a forward (F) of one and a backward (B) of another, and runs them as one pair (FB) in
which one's communication hides behind the other's arithmetic. And a backward can be cut in two: I, the gradient of the
stage's input, for which the neighbour waits, and W, those of its weights, for which nobody waits; W fills holes.

Four ranks, eight micro-batches; capitals enter at rank 0, small letters at rank 3; F = I = W = 1, B = 2, FB = 3:

    rank 0 F0F1F2f0i0w0f1F3b1  ..f2B0  b2  ..f3B1  b3  I2W2I3W3
    rank 1 ..F0f0F1f1F2b0  f2B0  F3b1  f3B1  b2  B2  ..i3I3w3W3              a dot is idle; F3b1 is a pair; the picture
    rank 2 ..f0F0f1F1f2B0  F2b0  f3B1  F3b1  B2  b2  ..I3i3W3w3              of any other: python dualpipe.py --help
    rank 3 f0f1f2F0I0W0F1f3B1  ..F2b0  B2  ..F3b1  B3  i2w2i3w3

Rank 3 is rank 0 with the directions exchanged: fold the line in its middle, and each micro-batch goes down the n = P/2
ranks to the fold and up again. One function writes that list for both: DualPipe puts two mirrored copies of it on P
ranks, each stage held twice (r and P-1-r); DualPipeV puts one on n ranks, each holding stages r and 2n-1-r.

The bubble, seen at the last rank, or the one at the fold: the fill, until its first F, and what the drain takes longer
than its own work. With I = B - W:

    1F1B      fill (P-1) F; the last gradient climbs to rank 0 in P-1 steps of B                           (P-1)(F + B)
    ZB1P      ... of I, and meanwhile the last rank does the P-1 W's it put off                        (P-1)(F + I - W)
    DualPipe  fill (n-1) F; the last micro-batch leaves the fold in n-1 pairs, turns at rank 0 in a B, comes down and up
              again in 2n-1 I's, and a W: (n-1)(FB + 2I) + 2B, of which the fold's rank works 2n B: (n-1)(F + FB - 2W)

1F1B and ZB1P want M >= P. The last two want that no rank waits anywhere else: in simulation ZB1P for W <= I and W <= F,
DualPipe for W <= I <= F and a pair that takes as long as either part of it at least, and as both at most. It is then
the largest bubble of the ranks, and every rank's at FB = F+B (else those that run more pairs work less). Published is
(P/2-1)(FB + B - 3W), the same for I = F and only then. For all other durations ask `simulate`. The price: parameters
twice, and PP+1 activations on each rank; 1F1B has PP-r on rank r.

Words: P ranks, r a rank, M micro-batches, n ranks from an end to the fold, m micro-batches per direction; F, B, W, FB,
p2p durations of a forward, a backward, its W part, a pair, and of sending a tensor to a neighbour.
"""
import contextlib
import difflib
import inspect
import json
import math
import os
import shutil
import sys
from bisect import bisect_left
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.graph import get_gradient_edge

import configs
from configs import UserError, param

KINDS = ("1f1b", "zb1p", "dualpipe", "dualpipev")
GIVES = {"F": "F", "B": "B", "I": "B"}                   # what the neighbour gets of a part: activations, or a gradient

# --- the schedules: each rank's list of steps -------------------------------------------------------------------------

class Step(NamedTuple):
    """One thing that a rank does. kind: F forward, B backward, I backward for the input only, W what I left (the
    weights), FB a pair, whose dir and mb are (the forward's, the backward's). dir: 0 enters at rank 0, 1 at the other
    end (DualPipeV: comes back up from the fold). mb: the micro-batch, counted in its direction."""
    kind: str
    dir: int | tuple[int, int]
    mb: int | tuple[int, int]

    @property
    def parts(self):
        """[(F, B, I or W, dir, mb)]: two of a pair, one of any other step."""
        return list(zip(self.kind, self.dir, self.mb)) if self.kind == "FB" else [tuple(self)]


def check(kind, ranks, microbatches):
    """UserError where there is no such schedule."""
    def wrong(message):
        raise UserError(f"{kind}, {ranks} ranks, {microbatches} micro-batches: {message}")

    if kind not in KINDS:
        near = difflib.get_close_matches(str(kind), KINDS, 1)
        wrong(f"no such schedule; {f'did you mean {near[0]}?' if near else 'there are: ' + ', '.join(KINDS)}")
    if ranks < 1 or microbatches < 1:
        wrong("both must be at least 1")
    if kind == "dualpipe" and (ranks % 2 or microbatches % 2):
        wrong(f"an even number of {'ranks' if ranks % 2 else 'micro-batches'} is needed, half for each direction")
    if kind.startswith("dualpipe") and microbatches < 2 * ranks:
        wrong(f"at least {2 * ranks} micro-batches are needed, two for each rank")


def schedule(kind, ranks, rank, microbatches):
    """The list of Steps of one rank. kind: one of KINDS; micro-batches: of both directions together. UserError where
    the schedule does not exist: dualpipe wants an even number of both, and both dualpipes 2 micro-batches per rank."""
    check(kind, ranks, microbatches)
    if not 0 <= rank < ranks:
        raise UserError(f"rank {rank} is not one of the {ranks} ranks 0..{ranks - 1}")
    if kind == "dualpipe":
        steps = folded(ranks // 2, min(rank, ranks - 1 - rank), microbatches // 2)
        return steps if rank < ranks // 2 else [mirror(step) for step in steps]
    return {"1f1b": one_f_one_b, "zb1p": zb1p, "dualpipev": folded}[kind](ranks, rank, microbatches)


def one_f_one_b(P, r, M):
    """1F1B: the first backward comes back to rank r when P-1-r ranks below it have each done a forward, so that many
    forwards go ahead; then one backward frees what one forward takes. At most P-r activations."""
    ahead = min(P - 1 - r, M)
    return number(["F0"] * ahead + ["F0", "B0"] * (M - ahead) + ["B0"] * ahead)


def zb1p(P, r, M):
    """1F1B with I and W for B. Rank r holds r activations fewer than rank 0: with room for so many it is r W's late,
    and does them while the last gradients climb the r ranks above it. At most P activations everywhere."""
    ahead = min(P - 1 - r, M)
    ops = ["F0"] * ahead
    for j in range(M):
        ops += ["F0"] * (j + ahead < M) + ["I0"] + ["W"] * (j >= r)
    return number(ops + ["W"] * min(r, M))


def folded(n, r, m):
    """Rank r of a line of n ranks, down which m micro-batches go (direction 0) and up which they come back (1).

    Eight phases; h ranks lie between this one and the fold. The first three follow from where the first micro-batch
    is, the others from what is left of the m forwards and backwards of each direction.
    """
    h = n - 1 - r
    # Down to the fold and back here are 2h + 1 steps, each F long, after our first F0. The first 2h+1 F0's fill them:
    # 2h alone and one that begins the next phase.
    ops = ["F0"] * (2 * h)
    # Our first F1 needs r more ranks to the loss, and its gradient r back: 2r steps = r pairs of forwards, and its own
    # pair before. Now 2h + 2(r+1) = 2n activations are held, here as on every rank, and each forward costs a backward.
    ops += ["F0", "F1"] * (r + 1)
    # Gradients of direction 1 are here, but need h ranks to the fold and h back before there are any of direction 0 to
    # pair with an F1: one of these rounds for each of the h. The next rank waits for I; W fits in before F1 comes.
    ops += ["I1", "W", "F1"] * h
    # Both are here: pairs, until the F0's run out, of which 2h + r+1 are done: m - 2h - (r+1) = m - 2n + r+1 are left.
    # On rank 0 that is m - 2n + 1: from here the bound m >= 2n. At the fold the first is no pair, as published: its F0
    # is on its way to the other half while B1 still runs. That gains up to p2p, and loses the F + B - FB of a pair.
    ops += (["F0B1", "F1B0"] if h else ["F0", "B1", "F1B0"]) + ["F0B1", "F1B0"] * (m - 2 * n + r)
    # F1's left: m - (r+1) - h - (m - 2n + r+1) = h, each still in a pair with a B0, and the B1's between them alone.
    ops += ["B1", "F1B0"] * h
    # No F's left. B1's left: m - h - (m - 2n + r+1) - h = r+1, in turns with B0's. The first half of them is whole, for
    # there is no hole yet to fill with a W; the second half puts off r+1 W's, and the gradients pass the sooner.
    ends = ["B1", "B0"] * (r + 1)
    ops += ends[:r + 1] + [op.replace("B", "I") for op in ends[r + 1:]]
    # B0's left: m - (m - 2n + r+1) - h - (r+1) = h. Between two of them a W: the rank that sends them does one too.
    ops += ["W", "I0"] * h
    # W's left: r+1 put off before and h in the last phase, less the h that it did.
    ops += ["W"] * (r + 1)
    return number(ops)


def number(ops):
    """["F0", "F1B0", "W", ...] -> Steps. Micro-batches keep their order in each direction, and W's that of the I's."""
    count, owed, steps = {}, deque(), []

    def step(op):
        kind, dir = op[0], int(op[1])
        key = ("F" if kind == "F" else "B", dir)                                  # I is a backward too
        count[key] = count.get(key, -1) + 1
        if kind == "I":
            owed.append((dir, count[key]))
        return Step(kind, dir, count[key])

    for op in ops:
        if op == "W":
            steps.append(Step("W", *owed.popleft()))
        elif len(op) == 4:
            forward, backward = step(op[:2]), step(op[2:])
            steps.append(Step("FB", (forward.dir, backward.dir), (forward.mb, backward.mb)))
        else:
            steps.append(step(op))
    return steps


def mirror(step):
    """The same step with the directions exchanged."""
    return step._replace(dir=(1 - step.dir[0], 1 - step.dir[1]) if step.kind == "FB" else 1 - step.dir)


def layout(kind, ranks, rank):
    """(number of stages, [the stage that the rank runs in each direction])."""
    stages = ranks * (2 if kind == "dualpipev" else 1)
    return stages, [rank, stages - 1 - rank] if kind.startswith("dualpipe") else [rank]


def source(kind, ranks, rank, part, dir):
    """(rank, dir) whose result of the same micro-batch a forward or backward waits for; None: the pipeline's inputs, or
    the loss. Activations of direction 0 go up in rank, its gradients down; direction 1 is the opposite."""
    neighbour = rank + (-1 if (part == "F") == (dir == 0) else 1)
    if neighbour == ranks and kind == "dualpipev":
        return rank, 1 - dir                                                      # the fold: from hand to hand
    return (neighbour, dir) if 0 <= neighbour < ranks else None


# --- the simulation ---------------------------------------------------------------------------------------------------

def simulate(kind, lists, F=1.0, B=2.0, W=1.0, FB=None, p2p=0.0):
    """Run the lists of all ranks, in order, each step as soon as what it needs has arrived. Durations in any one unit,
    the same for all ranks or a list; FB None: F + B. A pair is atomic: both of its results are there at its end.

    -> {"makespan", "bubble" (largest of the ranks), "bubbles" (makespan less what the rank works), "peak_activations"
    (stage inputs held at once, from the start of their F to the end of their B or W), "steps": per rank [{"rank",
    "kind", "dir", "mb", "start", "end"}]}. RuntimeError if the lists wait for each other.
    """
    ranks = len(lists)
    each = zip(*(d if isinstance(d, list) else [d] * ranks for d in (F, B, W, FB)))
    duration = [{"F": f, "B": b, "I": b - w, "W": w, "FB": f + b if fb is None else fb} for f, b, w, fb in each]
    done = {}                                                           # (rank, F or B, dir, mb) -> when it was ready
    times = [[] for _ in lists]

    def arrival(rank, part, dir, mb):
        """When what this part needs is here; None: not known yet."""
        if part == "W":
            return 0.0
        own = 0.0 if part == "F" else done.get((rank, "F", dir, mb))    # a backward needs its own forward too
        giver = source(kind, ranks, rank, part, dir)
        if giver is None:
            return own
        end = done.get((giver[0], GIVES[part], giver[1], mb))
        return None if own is None or end is None else max(own, end + (p2p if giver[0] != rank else 0.0))

    progress = True
    while progress:
        progress = False
        for rank, steps in enumerate(lists):
            while len(times[rank]) < len(steps):
                step = steps[len(times[rank])]
                needs = [arrival(rank, *part) for part in step.parts]
                if None in needs:
                    break
                start = max(*needs, times[rank][-1][1] if times[rank] else 0.0)
                end = start + duration[rank][step.kind]
                done.update({(rank, GIVES[part], dir, mb): end for part, dir, mb in step.parts if part in GIVES})
                times[rank].append((start, end))
                progress = True
    stuck = [f"rank {r} at {steps[len(t)]}" for r, (steps, t) in enumerate(zip(lists, times)) if len(t) < len(steps)]
    if stuck:
        raise RuntimeError(f"the schedule waits for itself: {'; '.join(stuck)}")

    makespan = max(end for t in times for _, end in t)
    bubbles = [makespan - sum(duration[rank][step.kind] for step in steps) for rank, steps in enumerate(lists)]
    return {"makespan": makespan, "bubble": max(bubbles), "bubbles": bubbles,
            "peak_activations": [peak_activations(steps) for steps in lists],
            "steps": [[{"rank": rank, **step._asdict(), "start": start, "end": end}
                       for step, (start, end) in zip(steps, t)] for rank, (steps, t) in enumerate(zip(lists, times))]}


def peak_activations(steps):
    held = peak = 0
    for step in steps:
        held += step.kind in ("F", "FB")
        peak = max(peak, held)                                   # a pair's own backward frees nothing before it ends
        held -= step.kind in ("B", "W", "FB")
    return peak


def bubble(kind, ranks, F, B, W, FB):
    """The published closed form; the opening says where it is exact."""
    if kind == "1f1b":
        return (ranks - 1) * (F + B)
    if kind == "zb1p":
        return (ranks - 1) * (F + B - 2 * W)
    return ((ranks if kind == "dualpipev" else ranks // 2) - 1) * (FB + B - 3 * W)


# --- a chunk in segments: how a pair hides its communication ----------------------------------------------------------
#
# A chunk, one micro-batch in one stage, stops twice in every layer of experts: its tokens travel to the experts' ranks
# (dispatch), and what the experts made of them travels home (combine). Its backward stops too, in the other order.
# Alone, a chunk can only wait. But a rank with a forward and a backward to do has two chunks that know nothing of each
# other: whenever one has sent its tokens off, the other computes. Per layer, as in the report's figure 4:
#
#     computes    attention F | experts B, W | experts F  | attention B, W | attention F of the next layer | ...
#     travels     combine B   | dispatch F   | dispatch B | combine F      | combine B of the layer before | ...
#
# In the way stands autograd: a backward is one call, in the midst of which nobody can step aside for another. Hence the
# cuts. Wherever tokens travel, a graph ends, and the next begins anew with the same values. A chunk is then a row of
# small graphs, attention | experts | attention | experts | ..., and its backward a loop over them, from the last to the
# first: autograd runs through one, and the gradients that arrive where it began are what the one before begins with.
# Between two there is time to step aside.
#
# To stop in the middle and go on later is what Python's generators do. A stage that communicates writes its forward as
# one, which starts an exchange, yields, and then waits for it; forward and backward of a chunk are generators too, and
# a pair is two generators that take turns.

class Cut(NamedTuple):
    """The values at a cut, from both sides."""
    ends: list                        # their places in the graph before; None for what has no gradient
    caught: list                      # for each the gradients that arrive from the graph after, one or none


class Catch(torch.autograd.Function):
    """A value where a graph begins, whose gradient ends in a list. A leaf would do the same with its .grad, but hold
    the value for as long, where often no backward reads it: that of a sum, and a block ends with one."""

    @staticmethod
    def forward(ctx, value, root, caught):
        ctx.caught = caught
        return value.view_as(value)

    @staticmethod
    def backward(ctx, grad):
        ctx.caught.append(grad)
        return None, None, None


def in_segments(run, cuts):
    """Run the generator of a stage to its end, and note its cuts. -> what it returns.

    The stage yields everything that it needs later on, and gets back the same with the graph cut off. What it has
    started before, it waits for after; in backward, what starts when the segment after ends is waited for where the one
    before begins (moe.Start and moe.Finish are such a couple).
    """
    values = None
    while True:
        try:
            before = run.send(values)
        except StopIteration as end:
            return end.value
        yield
        root, cut = torch.zeros((), requires_grad=True), Cut(ends(before), [[] for _ in before])
        values = [Catch.apply(value.detach(), root, caught) if end else value
                  for value, end, caught in zip(before, *cut)]
        cuts.append(cut)


def ends(values):
    """Their places in the graph, or None. Not the tensors, which are free where no backward reads them."""
    return [get_gradient_edge(v) if torch.is_tensor(v) and v.requires_grad else None for v in values]


def take_turns(runs):
    """Run generators to their ends: each up to its next yield, and then the next one."""
    over = object()
    while runs:
        runs = [run for run in runs if next(run, over) is not over]


# --- the executor -----------------------------------------------------------------------------------------------------

def exchanges(kind, lists):
    """What each rank sends and receives before each of its steps and after the last: per rank and step a list of
    (what, peer, (part, dir, mb)), what being "send", "receive", or "sent": the peer should have it, let go of it.

    The simulation says when. A transfer starts, on both sides, before the first step that starts when or after its
    tensor is ready. So a rank never waits for what the simulation, by that step, has not done; and as that has an order
    in time, no rank can wait for itself through others, even where whole batches run one behind the other (NCCL).
    """
    entries = simulate(kind, lists)["steps"]
    starts = [[e["start"] for e in steps] for steps in entries]
    ready = {(rank, GIVES[part], dir, mb): e["end"] for rank, steps in enumerate(lists)
             for step, e in zip(steps, entries[rank]) for part, dir, mb in step.parts if part in GIVES}
    transfers = []
    for taker, part, dir, mb in ready:
        giver = source(kind, len(lists), taker, part, dir)
        if giver and giver[0] != taker:
            transfers.append((ready[giver[0], part, dir, mb], giver[0], taker, (part, dir, mb)))
    plan = [[[] for _ in range(len(steps) + 1)] for steps in lists]
    for time, giver, taker, key in sorted(transfers):
        send, receive = bisect_left(starts[giver], time), bisect_left(starts[taker], time)
        taken = max(time, entries[taker][receive - 1]["end"]) if receive else time
        sent = bisect_left(starts[giver], taken) + 1                              # and a step of slack
        plan[giver][send].append(("send", taker, key))
        plan[taker][receive].append(("receive", giver, key))
        plan[giver][min(sent, len(lists[giver]))].append(("sent", taker, key))
    return plan


def trained(modules):
    """The parameters of some modules, each once."""
    return [p for p in nn.ModuleList(modules).parameters() if p.requires_grad]


def copied(kind, modules, shared=()):
    """The parameters of a rank's stages that the rank P-1-r holds too: in dualpipe all of them; in 1f1b and zb1p those
    `shared`, of the first stage and used by the last one too (V3's embedding, which MTP reads)."""
    return {"dualpipe": trained(modules), "dualpipev": []}.get(kind, list(shared))


class DualPipe:
    """Runs a rank's part of any of the four schedules on torch.distributed (gloo, NCCL).

    kind: one of KINDS. stages: this rank's modules, one for each direction (`layout` tells which): one for 1f1b and
    zb1p, two for the others. A stage maps its input to (output, local loss or None); the first one's inputs, and the
    labels, are a micro-batch of what `step` gets; the outputs of all but the last are tensors like `like`.
    criterion(output, labels) -> the last stage's loss. Losses are summed, never averaged. group: the pipeline's ranks;
    its timeout ends a rank whose neighbour is gone. The gradients are those of this rank's work; of parameters that are
    `copied` the caller sums both ranks' (parallel.Shares).

    A backward is cut into I and W through the parameters: during an I each of them has a list as `queue`, and the
    autograd functions that know of it (fp8.weight_gradient) put their dW there; W runs the list. All other gradients
    are computed in the I.

    A stage that communicates returns a generator (`in_segments`), and the two of a pair take turns; overlap=False: one
    after the other, for comparison.
    """

    def __init__(self, kind, stages, criterion, like, group=None, overlap=True):
        self.kind, self.stages, self.criterion, self.like = kind, list(stages), criterion, like
        self.group = group or dist.group.WORLD
        self.rank, self.ranks = dist.get_rank(self.group), dist.get_world_size(self.group)
        _, here = layout(kind, self.ranks, self.rank)
        if len(self.stages) != len(here):
            raise UserError(f"{kind}: {len(self.stages)} stages given to rank {self.rank}, it runs {len(here)}")
        # The lower stage first, so that the two ranks that hold the same stages list what they have in one order.
        self.in_order = [module for _, module in sorted(zip(here, self.stages), key=lambda at: at[0])]
        self.parameters, self.overlap = trained(self.in_order), overlap
        # NCCL connects a group, and two ranks of it, when all that it concerns first ask for it, and holds up the host
        # until then. So now: in the midst of a step one might ask for what the other only asks for later.
        peers = [peer for peer in (self.rank - 1, self.rank + 1) if 0 <= peer < self.ranks]
        ops = [dist.P2POp(op, like.new_zeros(1), group=self.group, group_peer=peer) for peer in peers
               for op in (dist.isend, dist.irecv)]
        with self.reaching(" or ".join(map(str, peers))):
            for work in dist.batch_isend_irecv(ops) if ops else ():
                work.wait()
        self.plans = {}                                          # (micro-batches, training) -> (steps, exchanges)

    def step(self, microbatches, inputs=None, labels=None):
        """Forward and backward of one batch; without gradients (torch.no_grad) the forwards alone.

        inputs, labels [N, ...]: the whole batch, cut along its first dim; ranks that hold no end of the model may leave
        them out. dualpipe sends the first half in at rank 0, the second at the last rank. -> the sum of all losses, a
        float, on every rank. Gradients are added to .grad.

        An exception on one rank is raised on all, as RuntimeError with its rank and message: that rank goes on sending
        zeros, so that nobody waits in vain, and at the end every rank tells how it fared. Gradients are then worthless.
        (Those that wait for it inside a stage, its experts' other ranks, wait for as long as their group's timeout.)
        """
        check(self.kind, self.ranks, microbatches)
        training = torch.is_grad_enabled()
        self.microbatches, self.batch = microbatches, {"inputs": inputs, "labels": labels}
        self.arrived, self.leaving, self.held, self.late = {}, {}, {}, {}
        self.sending, self.receiving, self.loss, error = {}, {}, 0.0, None
        steps, plan = self.plan(microbatches, training)
        for step, exchange in zip(steps, plan):
            self.exchange(exchange)
            for part, dir, mb in step.parts:
                if (key := (GIVES.get(part), dir, mb)) in self.receiving:
                    self.wait(self.receiving.pop(key))
            if error is None:
                try:
                    self.run(step)
                except Exception as e:
                    error = e
        self.exchange(plan[-1])
        reports = [None] * self.ranks
        told = error and f"rank {self.rank}, {type(error).__name__}: {error}"
        with self.reaching("another"):
            dist.all_gather_object(reports, (told, float(self.loss)), group=self.group)
        if told := "; ".join(told for told, _ in reports if told):
            raise RuntimeError(told) from error
        return sum(loss for _, loss in reports)

    def plan(self, microbatches, training):
        """(this rank's steps, its exchanges), made once."""
        key = microbatches, training
        if key not in self.plans:
            lists = [schedule(self.kind, self.ranks, rank, microbatches) for rank in range(self.ranks)]
            if not training:
                lists = [[Step(*part) for step in steps for part in step.parts if part[0] == "F"] for steps in lists]
            self.plans[key] = lists[self.rank], exchanges(self.kind, lists)[self.rank]
        return self.plans[key]

    def micro_batch(self, name, dir, mb):
        """Micro-batch mb of direction dir of the batch's "inputs" or "labels"."""
        batch = self.batch[name]
        if batch is None:
            raise UserError(f"no {name} were given; this rank needs them")
        if len(batch) % self.microbatches:
            raise UserError(f"{name}: a batch of {len(batch)} can't be cut into {self.microbatches} micro-batches")
        size = len(batch) // self.microbatches
        at = size * (mb + (self.microbatches // 2 if self.kind == "dualpipe" and dir else 0))
        return batch[at:at + size]

    def run(self, step):
        """A step of the schedule. The backward of a pair goes first: the gradients that it sends off at once travel
        while the forward computes its first attention."""
        kinds = {"F": self.forward, "B": self.backward, "I": self.backward, "W": self.weights}
        runs = [kinds[part](part, dir, mb) for part, dir, mb in reversed(step.parts)]
        for together in [runs] if self.overlap else ([run] for run in runs):
            take_turns(together)

    def forward(self, _, dir, mb):
        """Run a stage, leave its output for the next one, and keep what its backward begins with."""
        x, training, cuts = self.arrived.pop(("F", dir, mb), None), torch.is_grad_enabled(), []
        x = self.micro_batch("inputs", dir, mb) if x is None else x.requires_grad_(training)
        out = self.stages[dir](x)
        y, loss = (yield from in_segments(out, cuts)) if inspect.isgenerator(out) else out
        if source(self.kind, self.ranks, self.rank, "B", dir) is None:
            last = self.criterion(y, self.micro_batch("labels", dir, mb))
            loss, y = last if loss is None else last + loss, None
        else:
            if (y.shape, y.dtype) != (self.like.shape, self.like.dtype):
                raise UserError(f"a stage returned {y.dtype} {list(y.shape)}, but the pipeline was made for "
                                f"{self.like.dtype} {list(self.like.shape)}")
            self.give("F", dir, mb, y.detach())
        self.loss += 0.0 if loss is None else loss.detach()
        if training:
            self.held[dir, mb] = x, ends([y, loss]), None if loss is None else torch.ones_like(loss), cuts

    def backward(self, part, dir, mb):
        """From a chunk's last segment to its first. The W's wait in `late`: in an I for their own step, in a B until
        something travels, every second one until the other chunk's segment is over too: then it has sent its own tokens
        the earlier, and they as well have a W to hide behind. (Without cuts nothing travels, and each dW is computed in
        its place.)"""
        x, roots, one, cuts = self.held.pop((dir, mb))
        late = []
        soon = late if part == "B" else []                                       # what need not wait for its own step
        queue = late if part == "I" or cuts else None
        self.differentiate(roots, [self.arrived.pop(("B", dir, mb), None), one], queue)
        while cuts:
            self.work_off(soon, step=2)
            yield
            self.work_off(soon)
            places, caught = cuts.pop()
            self.differentiate(places, [grads[0] if grads else None for grads in caught], queue)
        self.give("B", dir, mb, x.grad)
        self.work_off(soon)
        if part == "I":
            self.late[dir, mb] = late

    def weights(self, _, dir, mb):
        self.work_off(self.late.pop((dir, mb)))
        yield from ()                                                            # a generator, as the other two

    @torch.no_grad()
    def work_off(self, late, step=1):
        """Compute what was put off, or every second of it, from the last; what a dW needs is free when it is done."""
        for i in range(len(late) - 1, -1, -step):
            late.pop(i)()

    def differentiate(self, ends, grads, queue):
        """The backward of a segment from those ends that have a gradient; each dW goes to `queue`, or with None to its
        place."""
        pairs = [(end, grad) for end, grad in zip(ends, grads) if end is not None and grad is not None]
        put_off = self.parameters if queue is not None else []
        for p in put_off:
            p.queue = queue
        try:
            torch.autograd.backward(*zip(*pairs))
        finally:
            for p in put_off:
                del p.queue

    def give(self, part, dir, mb, tensor):
        """Leave a result for the next stage, to be sent, or here at the fold. Activations go to where their gradient
        will come from, a gradient to where they came from."""
        taker = source(self.kind, self.ranks, self.rank, "B" if part == "F" else "F", dir)
        if taker and taker[0] == self.rank:
            self.arrived[part, taker[1], mb] = tensor
        elif taker:
            self.leaving[part, dir, mb] = tensor.contiguous()

    def exchange(self, exchange):
        """Start the sends and receives of a place in the schedule as one batch, and let go of what has been sent."""
        ops, keys = [], []
        for what, peer, key in exchange:
            if what == "sent":
                continue
            if what == "send":
                tensor, where, op = self.leaving.pop(key, None), self.sending, dist.isend
                tensor = torch.zeros_like(self.like) if tensor is None else tensor             # after an error here
            else:
                tensor, where, op = torch.empty_like(self.like), self.receiving, dist.irecv
                self.arrived[key] = tensor
            part, dir, mb = key
            ops.append(dist.P2POp(op, tensor, group=self.group, group_peer=peer, tag=4 * mb + 2 * dir + (part == "B")))
            keys.append((where, key, peer, tensor))
        with self.reaching(" or ".join(str(peer) for _, _, peer, _ in keys)):
            works = dist.batch_isend_irecv(ops) if ops else []
        # gloo gives a handle for each, NCCL one for the batch.
        for (where, key, peer, tensor), work in zip(keys, works if len(works) == len(ops) else works * len(ops)):
            where[key] = work, peer, tensor
        for what, _, key in exchange:
            if what == "sent":
                self.wait(self.sending.pop(key))

    def wait(self, transfer):
        work, peer, _ = transfer
        with self.reaching(peer):
            work.wait()

    @contextlib.contextmanager
    def reaching(self, peer):
        try:
            yield
        except RuntimeError as e:
            raise RuntimeError(f"rank {self.rank}: rank {peer} is gone or took longer than the timeout: {e}") from e


# --- pictures and tables ----------------------------------------------------------------------------------------------

COLOURS = {"F": ("#f2a65a", "#f7cfa3"), "B": ("#4f81bd", "#a9c4e4"),                     # of directions 0 and 1
           "I": ("#3b9c8f", "#8ed8b0"), "W": ("#6aa84f", "#b7d7a8")}


def cells(steps):
    """(part, dir, mb, start, end) of each of a rank's "steps", to draw: a pair is drawn as its forward, a third, and
    then its backward."""
    for e in steps:
        dir, mb, start, end = e["dir"], e["mb"], e["start"], e["end"]
        if e["kind"] == "FB":
            cut = start + (end - start) / 3
            yield "F", dir[0], mb[0], start, cut
            yield "B", dir[1], mb[1], cut, end
        else:
            yield e["kind"], dir, mb, start, end


def picture(result, columns=None, colour=False):
    """A line of text per rank, time from left to right. Capitals and full colours are direction 0, small letters and
    pale ones direction 1; a dot is an idle place. columns: shrink to fit, down to a letter a step; None: don't."""
    label = len(f"rank {len(result['steps']) - 1} ")
    shortest = min(e["end"] - e["start"] for steps in result["steps"] for e in steps if e["end"] > e["start"])
    fit = (columns - label) / result["makespan"] if columns else math.inf
    scale = min(max(1 / shortest, min(2 / shortest, fit)), 2000 / result["makespan"])           # characters per unit
    lines = []
    for rank, steps in enumerate(result["steps"]):
        line, at = [f"rank {rank} ".ljust(label)], 0
        for part, dir, mb, start, end in cells(steps):
            left, right = round(start * scale), round(end * scale)
            text = f"{part.lower() if dir else part}{mb}".ljust(right - left)
            text = text if len(text) == right - left else text[:1] * (right > left) + " " * (right - left - 1)
            line.append("." * (left - at))
            r, g, b = (round(byte / 51) for byte in bytes.fromhex(COLOURS[part][dir][1:]))
            line.append(f"\033[30;48;5;{16 + 36 * r + 6 * g + b}m{text}\033[0m" if colour else text)    # of 256 colours
            at = right
        lines.append("".join(line).rstrip())
    return "\n".join(lines)


def draw(result, title, path):
    """The same picture as a file, by matplotlib. UserError if that is missing or can't write there."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise UserError("--png needs matplotlib: pip install -r requirements-extra.txt") from None
    ranks = len(result["steps"])
    figure, axes = plt.subplots(figsize=(min(40, 2 + result["makespan"] / 5), 1 + 0.35 * ranks))
    for rank, steps in enumerate(result["steps"]):
        for part, dir, mb, start, end in cells(steps):
            axes.barh(rank, end - start, 0.9, start, color=COLOURS[part][dir], edgecolor="white", lw=0.3)
            axes.text((start + end) / 2, rank, str(mb), ha="center", va="center", fontsize=6)
        for pair in (entry for entry in steps if entry["kind"] == "FB"):
            axes.barh(rank, pair["end"] - pair["start"], 0.9, pair["start"], color="none", edgecolor="black", lw=0.7)
    axes.set(title=title, xlabel="time", ylabel="rank", yticks=range(ranks), ylim=(ranks - 0.5, -0.5),
             xlim=(0, result["makespan"]))
    axes.legend(handles=[plt.Rectangle((0, 0), 1, 1, color=COLOURS[part][0], label=name) for part, name in
                         zip("FBIW", ("forward", "backward", "backward for input", "weights"))],
                ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.25), frameon=False)
    temporary = Path(f"{path}.tmp")
    try:
        figure.savefig(temporary, dpi=150, bbox_inches="tight", format="png")
        os.replace(temporary, path)
    except OSError as e:
        raise UserError(f"--png={path}: {e.strerror or e}; give a file in a folder that can be written") from None
    finally:
        temporary.unlink(missing_ok=True)
        plt.close(figure)


def table(o):
    """The four schedules for the same model on the same ranks. DualPipeV cuts it into twice as many stages, so each of
    its steps takes half as long and each of its activations half as much."""
    rows = [("schedule", "stages", "makespan", "bubble", "form", "idle", "activations", "parameters")]
    for kind in KINDS:
        share = 0.5 if kind == "dualpipev" else 1.0
        F, B, W, FB = (share * d for d in (o.F, o.B, o.W, o.FB))
        stages = o.pp * (2 if kind == "dualpipev" else 1)
        try:
            result = simulate(kind, [schedule(kind, o.pp, r, o.microbatches) for r in range(o.pp)], F, B, W, FB, o.p2p)
        except UserError as e:
            rows.append((kind, str(stages), str(e).partition(": ")[2]))
            continue
        rows.append((kind, str(stages), f"{result['makespan']:g}", f"{result['bubble']:g}",
                     f"{bubble(kind, o.pp, F, B, W, FB):g}",
                     f"{result['bubble'] / result['makespan'] if result['makespan'] else 0:.1%}",
                     f"{max(result['peak_activations']) * share:g}", f"{2 if kind == 'dualpipe' else 1}/{o.pp}"))
    lines = [f"{row[0]:10}" + ("".join(f"{cell:>12}" for cell in row[1:]) if len(row) > 3
                               else f"{row[1]:>12}   {row[2]}") for row in rows]
    return "\n".join([*lines, "", "bubble: the largest of the ranks; form: as published; idle: bubble / makespan; "
                      "activations: most at once on a", "rank, in those of 1/pp of the model; parameters: share of the "
                      "model on a rank"])


# --- the command ------------------------------------------------------------------------------------------------------

@dataclass
class Options:
    pp: int = param(8, "ranks of the pipeline (PP)", 1, 1024)
    microbatches: int = param(20, "micro-batches of one step (M), of both directions together", 1, 65536)
    kind: str = param("dualpipe", "the schedule: " + ", ".join(KINDS))
    F: float = param(1.0, "time of a forward", 0.0, 1e9)
    B: float = param(2.0, "time of a backward, W included", 0.0, 1e9)
    W: float = param(1.0, "time of its part for the weights", 0.0, 1e9)
    FB: float = param(None, "time of a forward and a backward as a pair; without it F + B", 0.0, 1e9)
    p2p: float = param(0.0, "time of sending a tensor to a neighbour", 0.0, 1e9)
    json: bool = param(False, "print the simulated schedule as JSON and nothing else")
    png: str = param("", "draw it into this file (needs matplotlib)")


def parse(argv):
    o = configs.options(Options, "dualpipe.py", argv)
    if not o.kind:
        raise UserError(f"--kind= is empty: write --kind=VALUE, one of {', '.join(KINDS)}")
    o.FB = o.F + o.B if o.FB is None else o.FB
    if o.W > o.B:
        raise UserError(f"--W={o.W:g} is more than --B={o.B:g}, of which it is a part")
    if not o.F or not o.B or not o.FB:
        raise UserError(f"--F={o.F:g} --B={o.B:g} --FB={o.FB:g}: each must be more than 0")
    most = 2 ** 12 if o.png else 2 ** 18
    if o.pp * o.microbatches > most:
        raise UserError(f"--pp={o.pp} --microbatches={o.microbatches}: too many steps; their product may be {most}"
                        + (" with --png" if o.png else ""))
    check(o.kind, o.pp, o.microbatches)
    return o


def main(argv):
    if "--help" in argv or "-h" in argv:
        print(configs.options_usage(Options, "dualpipe.py", __doc__.splitlines()[0]))
        return 0
    o = parse(argv)
    lists = [schedule(o.kind, o.pp, rank, o.microbatches) for rank in range(o.pp)]
    result = simulate(o.kind, lists, o.F, o.B, o.W, o.FB, o.p2p)
    title = (f"{o.kind}, {o.pp} ranks, {o.microbatches} micro-batches: F={o.F:g} B={o.B:g} W={o.W:g} FB={o.FB:g} "
             f"p2p={o.p2p:g}")
    if o.png:
        draw(result, title, o.png)
    if o.json:
        print(json.dumps(result))
        return 0
    terminal = sys.stdout.isatty()
    print(title, "", picture(result, shutil.get_terminal_size().columns if terminal else None,
                             terminal and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"),
          "", table(o), sep="\n")
    return 0


if __name__ == "__main__":
    configs.cli(main)
