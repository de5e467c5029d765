"""The routed experts of many tokens as kernels: moe.routed_torch without its copies and without its waits.

The problem. What the experts compute is two products. Around them torch moves more bytes than the products read: it
copies each token to its K rows, sorted by expert, passes over the rows for SwiGLU and for the gate's weights, adds them
up, and keeps most of it for backward. And how many rows an expert has is known to the device alone, so that the host,
which would start a product for each expert, has to wait.

Here indices are sorted, and tokens are gathered while they are loaded (section 2.1.2, equation 12):

    plan          pair [R]: which (token, choice) sits in each row, the rows of one expert together
    up            h = x[token] W13^T, and from the sums, still in registers, a = weight * SwiGLU(h)
    rows, sum     y = a W2^T; out = the sum of each token's rows, in the order of its choices

    backward, from dout and from what was kept, x and h:
    gather        dy = dout[token]: three products read it
    hidden_grad   da = dy W2, and at once dh, a once more, and the gradient of the gate's weights, <da, a> / weight
    rows, sum     dx = the sum of each token's rows of dh W13
    weight_grad   dW2_e = dy^T a, dW13_e = dh^T x[token], over the rows of expert e

Each expert's rows begin at a multiple of 128, so that a tile of rows has one expert: indices are padded, with rows that
are nobody's. The host knows an upper bound, N K / 128 + E tiles, and starts programs for as many; those left over end
at once. Nothing waits, so a CUDA graph can record it all. Sums are in a fixed order, never by atomic additions: they
have the same bits every time.

The masters of the weights are FP32. Their copy in BF16 is made once per optimizer step and stays with the parameter, as
FP8's does: casting costs a tenth of a small layer's time, and several micro-batches share it. It is 2 bytes a weight,
which autograd would keep of a cast in every forward pass too.

Shapes: N tokens, K choices, E experts of this rank, D dim, F moe_inter_dim, R rows, an upper bound.
"""
from dataclasses import dataclass
from functools import partial

import torch

import backend
from fp8 import weight_gradient

if backend.has_triton():
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor


# --- the plan: which row is whose -------------------------------------------------------------------------------------

@dataclass
class Plan:
    """The (token, choice) pairs p = token * K + choice, sorted by expert. Each expert's rows begin at a multiple of
    `height`, so that a tile of so many rows has one expert; rows that are nobody's fill up the last tile of each."""
    pair: torch.Tensor                        # int32 [R]: the pair of each row, -1 for none
    row: torch.Tensor                         # int32 [N, K]: the row of each pair, -1 where its expert is elsewhere
    expert: torch.Tensor                      # int32 [R / height]: the expert of each tile, -1 for none
    start: torch.Tensor                       # int32 [E + 1]: the first row of each expert, and the end
    height: int


if backend.has_triton():
    @triton.jit
    def count_kernel(indices, counts, P, E, BLOCK: tl.constexpr, EXPERTS: tl.constexpr):
        """How many of BLOCK pairs each expert has. EXPERTS: the power of two from E up."""
        p, e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, EXPERTS)
        chosen = tl.load(indices + p, mask=p < P, other=-1).to(tl.int32)
        mine = (chosen[:, None] == e[None, :]).to(tl.int32)
        tl.store(counts + tl.program_id(0) * E + e, tl.sum(mine, 0), mask=e < E)

    @triton.jit
    def scan_kernel(counts, total, B, E, BLOCKS: tl.constexpr):
        """For one expert: counts [B, E] become the numbers before each block; and their total."""
        b = tl.arange(0, BLOCKS)
        here = counts + b * E + tl.program_id(0)
        count = tl.load(here, mask=b < B, other=0)
        tl.store(here, tl.cumsum(count, 0) - count, mask=b < B)
        tl.store(total + tl.program_id(0), tl.sum(count, 0))

    @triton.jit
    def tiles_kernel(total, start, expert, E, HEIGHT: tl.constexpr, EXPERTS: tl.constexpr):
        """Where the rows of one expert (or, for program E, all rows) begin, and its number for each of its tiles."""
        me, e = tl.program_id(0), tl.arange(0, EXPERTS)
        tiles = tl.cdiv(tl.load(total + e, mask=e < E, other=0), HEIGHT)
        first, count = tl.sum(tl.where(e < me, tiles, 0), 0), tl.sum(tl.where(e == me, tiles, 0), 0)
        tl.store(start + me, first * HEIGHT)
        for at in range(0, count, EXPERTS):
            tl.store(expert + first + at + e, me, mask=at + e < count)

    @triton.jit
    def place_kernel(indices, before, start, pair, row, P, E, BLOCK: tl.constexpr, EXPERTS: tl.constexpr):
        """The rows of BLOCK pairs: after those that the expert has of the blocks before, in order."""
        p, e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, EXPERTS)
        chosen = tl.load(indices + p, mask=p < P, other=-1).to(tl.int32)
        mine = chosen[:, None] == e[None, :]
        first = tl.load(start + e, mask=e < E, other=0) \
            + tl.load(before + tl.program_id(0) * E + e, mask=e < E, other=0)
        rank = tl.cumsum(mine.to(tl.int32), 0) - 1
        at = tl.sum(tl.where(mine, first[None, :] + rank, 0), 1)
        tl.store(row + p, tl.where(chosen >= 0, at, -1), mask=p < P)
        tl.store(pair + at, p, mask=chosen >= 0)


def plan_triton(indices, E, height=128, rows=None):
    """indices int64 [N, K] (-1: an expert that is elsewhere) -> Plan, without waiting for the device: R is an upper
    bound, from how many pairs have an expert here (rows; None: perhaps all)."""
    P, EXPERTS = indices.numel(), triton.next_power_of_2(E)
    R = ((P if rows is None else rows) // height + E) * height            # each expert has at most one ragged tile
    BLOCK = max(16, 8192 // EXPERTS)
    B, where = max(1, triton.cdiv(P, BLOCK)), dict(dtype=torch.int32, device=indices.device)
    make = lambda *shape: torch.empty(*shape, **where)
    pair, expert = torch.full((R + R // height,), -1, **where).split([R, R // height])
    counts, total, start, row = make(B, E), make(E), make(E + 1), make(*indices.shape)
    indices = indices.contiguous()
    count_kernel[B,](indices, counts, P, E, BLOCK, EXPERTS)
    scan_kernel[E,](counts, total, B, E, triton.next_power_of_2(B))
    tiles_kernel[E + 1,](total, start, expert, E, height, EXPERTS)
    place_kernel[B,](indices, counts, start, pair, row, P, E, BLOCK, EXPERTS)
    return Plan(pair, row, expert, start, height)


# --- the products -----------------------------------------------------------------------------------------------------

if backend.has_triton():
    @triton.jit
    def tile_of(COLUMNS, GROUP: tl.constexpr):
        """(tile of rows, tile of columns) of this program. GROUP tiles of rows at a time walk over all columns, to find
        the weights in the cache."""
        here, tiles = tl.program_id(0) % (GROUP * COLUMNS), tl.num_programs(0) // COLUMNS
        first = tl.program_id(0) // (GROUP * COLUMNS) * GROUP
        height = min(tiles - first, GROUP)
        return first + here % height, here // height

    @triton.jit
    def up_kernel(x, w13, pair, expert, weights, h, a, D: tl.constexpr, F: tl.constexpr, K: tl.constexpr,
                  KEEP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
                  GROUP: tl.constexpr, STAGES: tl.constexpr):
        """BLOCK_M x BLOCK_F of a = weight * silu(x W1^T) * x W3^T, the rows of x gathered as they are loaded; KEEP: and
        of h, the two products."""
        i, j = tile_of(tl.cdiv(F, BLOCK_F), GROUP)
        e = tl.load(expert + i)
        if e >= 0:
            r, f = i * BLOCK_M + tl.arange(0, BLOCK_M), j * BLOCK_F + tl.arange(0, BLOCK_F)
            p = tl.load(pair + r)
            d = tl.arange(0, BLOCK_D)
            rows = x + (p // K).to(tl.int64)[:, None] * D + d[None, :]
            both = tl.zeros([BLOCK_M, 2 * BLOCK_F], tl.float32)
            for at in tl.range(0, D, BLOCK_D, num_stages=STAGES):
                here = (p >= 0)[:, None] if D % BLOCK_D == 0 else (p >= 0)[:, None] & (at + d < D)[None, :]
                w = w13.load([e, 0, j * BLOCK_F, at]).reshape(2 * BLOCK_F, BLOCK_D)
                both = tl.dot(tl.load(rows + at, mask=here, other=0.0), w.T, both, input_precision="ieee")
            gate, up = both.reshape(BLOCK_M, 2, BLOCK_F).permute(0, 2, 1).split()
            weight = tl.load(weights + p, mask=p >= 0, other=0.0)
            r, inside = r.to(tl.int64), (f < F)[None, :]
            if KEEP:
                tl.store(h + r[:, None] * (2 * F) + f[None, :], gate, mask=inside)
                tl.store(h + r[:, None] * (2 * F) + F + f[None, :], up, mask=inside)
            tl.store(a + r[:, None] * F + f[None, :], gate * tl.sigmoid(gate) * up * weight[:, None], mask=inside)

    @triton.jit
    def rows_kernel(a, w, expert, y, N: tl.constexpr, K: tl.constexpr, TURNED: tl.constexpr, BLOCK_M: tl.constexpr,
                    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr):
        """BLOCK_M x BLOCK_N of y = a W^T, W [E, N, K], or if TURNED of a W, W [E, K, N]."""
        i, j = tile_of(tl.cdiv(N, BLOCK_N), GROUP)
        e = tl.load(expert + i)
        if e >= 0:
            total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for at in tl.range(0, K, BLOCK_K, num_stages=STAGES):
                tile = a.load([i * BLOCK_M, at])
                if TURNED:
                    total = tl.dot(tile, w.load([e, at, j * BLOCK_N]).reshape(BLOCK_K, BLOCK_N), total,
                                   input_precision="ieee")
                else:
                    total = tl.dot(tile, w.load([e, j * BLOCK_N, at]).reshape(BLOCK_N, BLOCK_K).T, total,
                                   input_precision="ieee")
            r, n = i * BLOCK_M + tl.arange(0, BLOCK_M), j * BLOCK_N + tl.arange(0, BLOCK_N)
            tl.store(y + r.to(tl.int64)[:, None] * N + n[None, :], total, mask=(n < N)[None, :])

    @triton.jit
    def sum_kernel(rows, row, out, D: tl.constexpr, K: tl.constexpr, BLOCK_D: tl.constexpr):
        """out of one token: the sum over its rows, always in the order of its choices."""
        n, d = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        total = tl.zeros([BLOCK_D], tl.float32)
        for k in tl.static_range(K):
            r = tl.load(row + n * K + k).to(tl.int64)
            total += tl.load(rows + r * D + d, mask=d < tl.where(r >= 0, D, 0), other=0.0).to(tl.float32)
        tl.store(out + n * D + d, total, mask=d < D)

    @triton.jit
    def swiglu_grad(da, weight, h, a, dh, r, f, F: tl.constexpr):
        """From da [rows, columns] of a = weight * silu(gate) * up: writes dh and a, returns the gradients of weight."""
        r, inside = r.to(tl.int64)[:, None], (f < F)[None, :]
        gate = tl.load(h + r * (2 * F) + f[None, :], mask=inside, other=0.0).to(tl.float32)
        up = tl.load(h + r * (2 * F) + F + f[None, :], mask=inside, other=0.0).to(tl.float32)
        s = tl.sigmoid(gate)
        silu = gate * s
        tl.store(a + r * F + f[None, :], silu * up * weight[:, None], mask=inside)
        scaled = da * weight[:, None]
        tl.store(dh + r * (2 * F) + f[None, :], scaled * up * (s + silu * (1 - s)), mask=inside)
        tl.store(dh + r * (2 * F) + F + f[None, :], scaled * silu, mask=inside)
        return tl.sum(da * silu * up, 1)

    @triton.jit
    def gather_kernel(x, pair, expert, rows, D: tl.constexpr, K: tl.constexpr, HEIGHT: tl.constexpr,
                      BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
        """The tokens of BLOCK_M rows, zeros where a row is nobody's."""
        r, d = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        if tl.load(expert + tl.program_id(0) * BLOCK_M // HEIGHT) >= 0:
            p = tl.load(pair + r)
            token = x + (p // K).to(tl.int64)[:, None] * D + d[None, :]
            token = tl.load(token, mask=(p >= 0)[:, None] & (d < D)[None, :], other=0.0)
            tl.store(rows + r.to(tl.int64)[:, None] * D + d[None, :], token, mask=(d < D)[None, :])

    @triton.jit
    def hidden_grad_kernel(dy, w2, pair, expert, weights, h, a, dh, dweight, R, D: tl.constexpr, F: tl.constexpr,
                           BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
                           STAGES: tl.constexpr):
        """BLOCK_M x BLOCK_F of da = dy W2; from it and h at once dh, a (made again for Wgrad), and this tile's part of
        the gate weights' gradient, <da, a without its weight>."""
        i, j = tile_of(tl.cdiv(F, BLOCK_F), GROUP)
        e = tl.load(expert + i)
        if e >= 0:
            da = tl.zeros([BLOCK_M, BLOCK_F], tl.float32)
            for at in tl.range(0, D, BLOCK_D, num_stages=STAGES):
                w = w2.load([e, at, j * BLOCK_F]).reshape(BLOCK_D, BLOCK_F)
                da = tl.dot(dy.load([i * BLOCK_M, at]), w, da, input_precision="ieee")
            r = i * BLOCK_M + tl.arange(0, BLOCK_M)
            p = tl.load(pair + r)
            weight = tl.load(weights + p, mask=p >= 0, other=0.0)
            # A quarter of the columns at a time: for all of them there are not registers enough.
            QUARTER: tl.constexpr = BLOCK_F // 4
            f = j * BLOCK_F + tl.arange(0, QUARTER)
            left, right = da.reshape(BLOCK_M, 2, BLOCK_F // 2).permute(0, 2, 1).split()
            first, second = left.reshape(BLOCK_M, 2, QUARTER).permute(0, 2, 1).split()
            part = swiglu_grad(first, weight, h, a, dh, r, f, F)
            part += swiglu_grad(second, weight, h, a, dh, r, f + QUARTER, F)
            first, second = right.reshape(BLOCK_M, 2, QUARTER).permute(0, 2, 1).split()
            part += swiglu_grad(first, weight, h, a, dh, r, f + 2 * QUARTER, F)
            part += swiglu_grad(second, weight, h, a, dh, r, f + 3 * QUARTER, F)
            tl.store(dweight + j * R + r, part)

    @triton.jit
    def weight_grad_kernel(left, right, start, dw, M: tl.constexpr, N: tl.constexpr, BLOCK_M: tl.constexpr,
                           BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr):
        """BLOCK_M x BLOCK_N of dW_e = left^T right over the rows of expert e."""
        columns = tl.cdiv(N, BLOCK_N)
        tiles = columns * tl.cdiv(M, BLOCK_M)
        e, here = tl.program_id(0) // tiles, tl.program_id(0) % tiles
        first = here // (GROUP * columns) * GROUP
        height = min(tiles // columns - first, GROUP)
        i, j = first + here % (GROUP * columns) % height, here % (GROUP * columns) // height
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for at in tl.range(tl.load(start + e), tl.load(start + e + 1), BLOCK_R, num_stages=STAGES):
            total = tl.dot(left.load([at, i * BLOCK_M]).T, right.load([at, j * BLOCK_N]), total, input_precision="ieee")
        m, n = i * BLOCK_M + tl.arange(0, BLOCK_M), j * BLOCK_N + tl.arange(0, BLOCK_N)
        to = dw + e.to(tl.int64) * (M * N) + m[:, None] * N + n[None, :]
        tl.store(to, total, mask=(m < M)[:, None] & (n < N)[None, :])


def described(x, *block):
    """A descriptor of x, contiguous, for loads of so large blocks."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), list(block))


@dataclass(frozen=True)
class Tiles:
    """Sizes of tiles and numbers of warps, for what a program holds in registers and keeps coming in shared memory."""
    rows: int = 128
    up: int = 128                             # columns of up_kernel, of which it makes two products
    hidden: int = 256
    wide: int = 256
    deep: int = 64                            # of the contraction at a time
    warps: int = 8
    stages: int = 3
    group: int = 16                           # tiles of rows that walk over all columns together


HOPPER, SMALL = Tiles(), Tiles(16, 16, 16, 16, 16, 4, 1)


def up_triton(x, weights, w13, plan, keep, t):
    """-> a [R, F], and h [R, 2F] if it is to be kept."""
    (E, FF, D), R, K = w13.shape, len(plan.pair), plan.row.shape[1]
    a, h = x.new_empty(R, FF // 2), x.new_empty(R, FF) if keep else None
    up_kernel[R // t.rows * triton.cdiv(FF // 2, t.up),](
        x, described(w13.view(E, 2, FF // 2, D), 1, 2, t.up, t.deep), plan.pair, plan.expert, weights,
        a if h is None else h, a, D, FF // 2, K, keep, t.rows, t.up, t.deep, t.group, t.stages,
        num_warps=t.warps)
    return a, h


def rows_triton(a, w, plan, turned, t):
    """a [R, K] -> [R, N]: a W^T, W [E, N, K], or turned a W, W [E, K, N]."""
    (R, K), N = a.shape, w.shape[2 if turned else 1]
    y = a.new_empty(R, N)
    block = (1, t.deep, t.wide) if turned else (1, t.wide, t.deep)
    rows_kernel[R // t.rows * triton.cdiv(N, t.wide),](
        described(a, t.rows, t.deep), described(w, *block), plan.expert, y, N, K, turned, t.rows, t.wide, t.deep,
        t.group, t.stages, num_warps=t.warps)
    return y


def sum_triton(rows, plan):
    """rows [R, D] -> [N, D], the sum of each token's rows."""
    (N, K), D = plan.row.shape, rows.shape[1]
    out, BLOCK_D = rows.new_empty(N, D), min(1024, triton.next_power_of_2(D))
    sum_kernel[N, triton.cdiv(D, BLOCK_D)](rows, plan.row, out, D, K, BLOCK_D, num_warps=4)
    return out


def gather_triton(x, plan):
    """x [N, D] -> its rows [R, D]."""
    R, D, K = len(plan.pair), x.shape[1], plan.row.shape[1]
    rows, BLOCK_D = x.new_empty(R, D), min(512, triton.next_power_of_2(D))
    gather_kernel[R // 16, triton.cdiv(D, BLOCK_D)](x, plan.pair, plan.expert, rows, D, K, plan.height, 16, BLOCK_D)
    return rows


def hidden_grad_triton(dy, w2, weights, h, plan, t):
    """dy [R, D] -> dh [R, 2F], a [R, F], dweights float32 [N, K]."""
    (_, D, F), R = w2.shape, len(h)
    dh, a, columns = torch.empty_like(h), h.new_empty(R, F), triton.cdiv(F, t.hidden)
    part = torch.empty(columns, R, dtype=torch.float32, device=h.device)
    hidden_grad_kernel[R // t.rows * columns,](
        described(dy, t.rows, t.deep), described(w2, 1, t.deep, t.hidden), plan.pair, plan.expert, weights, h, a, dh,
        part, R, D, F, t.rows, t.hidden, t.deep, t.group, t.stages, num_warps=t.warps)
    return dh, a, weights_grad(part, plan)


def weights_grad(part, plan):
    """Parts [tiles of F, R] of the gradients of the gate weights -> their sums, where the pairs are: [N, K]."""
    return part.sum(0)[plan.row.clamp_min(0)].masked_fill(plan.row < 0, 0)


def weight_grad_triton(left, right, plan, weight, t):
    """dW [E, M, N], the sum of left^T right over the rows of each expert: left [R, M], right [R, N]."""
    (E, M, N), dw = weight.shape, torch.empty_like(weight)
    weight_grad_kernel[E * triton.cdiv(M, t.rows) * triton.cdiv(N, t.wide),](
        described(left, t.deep, t.rows), described(right, t.deep, t.wide), plan.start, dw, M, N,
        t.rows, t.wide, t.deep, t.group, t.stages, num_warps=t.warps)
    return dw


def cast(weight, dtype):
    """A parameter in `dtype`: the copy is made once per optimizer step and stays with the parameter, until somebody
    writes to that."""
    if weight.dtype == dtype:
        return weight.detach()
    key = weight._version, weight.data_ptr(), dtype
    if getattr(weight, "low", (None,))[0] != key:
        weight.low = key, weight.detach().to(dtype)
    return weight.low[1]


class Routed(torch.autograd.Function):
    """routed_triton in x's dtype."""

    @staticmethod
    def forward(ctx, x, weights, w13, w2, indices, rows, keep):
        tiles = HOPPER if x.element_size() == 2 else SMALL
        x, weights, low = x.contiguous(), weights.contiguous(), [cast(w, x.dtype) for w in (w13, w2)]
        plan = plan_triton(indices, len(w13), tiles.rows, rows)
        a, h = up_triton(x, weights, low[0], plan, keep, tiles)
        ctx.save_for_backward(x, weights, h)
        ctx.plan, ctx.low, ctx.parameters, ctx.tiles = plan, low, (w13, w2), tiles
        return sum_triton(rows_triton(a, low[1], plan, False, tiles), plan)

    @staticmethod
    def backward(ctx, dout):
        (x, weights, h), (w13, w2), plan, tiles = ctx.saved_tensors, ctx.parameters, ctx.plan, ctx.tiles
        dy = gather_triton(dout.contiguous(), plan)
        dh, a, dweights = hidden_grad_triton(dy, ctx.low[1], weights, h, plan, tiles)
        dx = sum_triton(rows_triton(dh, ctx.low[0], plan, True, tiles), plan)
        dw2 = weight_gradient(w2, partial(weight_grad_triton, dy, a, plan, w2, tiles))
        del dy, a                                                                 # before x asks for as much memory
        dw13 = weight_gradient(w13, lambda: weight_grad_triton(dh, gather_triton(x, plan), plan, w13, tiles))
        return dx, dweights.to(weights.dtype), dw13, dw2, None, None, None
