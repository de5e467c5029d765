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

In FP8 (3.3) a token is quantized once and its bytes are gathered. The passes over memory that gather rows, and those
of SwiGLU and its gradient, write the 1x128 and the 128x1 tiles which the products want. h is kept in FP8.

Shapes: N tokens, K choices, E experts of this rank, D dim, F moe_inter_dim, R rows, an upper bound.
"""
from dataclasses import dataclass
from functools import partial

import torch

import backend
from fp8 import BLOCK, Quantized, empty, quantize_triton, quantized, transpose, weight_gradient

if backend.has_triton():
    import triton
    import triton.language as tl
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia import hopper
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as Described
    from triton.tools.tensor_descriptor import TensorDescriptor

    from fp8 import load_tile, scale_of, store_tile, to_e4m3


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
    group: int = 8


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


# --- in FP8 -----------------------------------------------------------------------------------------------------------
#
# Pointers that gather rows of FP8 take more registers than there are: the gather is a pass of its own, over bytes.

if backend.has_triton():
    @triton.jit
    def gather8_kernel(x, x_scale, pair, expert, row, row_scale, column, column_scale, N, R, D: tl.constexpr,
                       K: tl.constexpr, QUANTIZED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                       BLOCK_M: tl.constexpr):
        """BLOCK_M x 128 of the rows of x, plain or QUANTIZED in 1x128 tiles: written in 1x128 tiles and (BLOCK_M = 128)
        transposed in 128x1 tiles. Rows that are nobody's are zeros."""
        if tl.load(expert + tl.program_id(0) * BLOCK_M // 128) >= 0:
            r, d = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.program_id(1) * 128 + tl.arange(0, 128)
            p = tl.load(pair + r)
            n, inside = (p // K).to(tl.int64), (p >= 0)[:, None] & (d < D)[None, :]
            tile = tl.load(x + n[:, None] * D + d[None, :], mask=inside, other=0.0)
            if QUANTIZED:
                scale = tl.load(x_scale + tl.program_id(1) * N + n, mask=p >= 0, other=0.0)
            else:
                tile = tile.to(tl.float32)
                scale = scale_of(tl.max(tl.where(tile == tile, tl.abs(tile), float("inf")), 1), False)
            r, there = r.to(tl.int64), (d < D)[None, :]
            if ROWS:
                tl.store(row_scale + tl.program_id(1).to(tl.int64) * R + r, scale)
                values = tile if QUANTIZED else to_e4m3(tile, scale[:, None])
                tl.store(row + r[:, None] * D + d[None, :], values, mask=there)
            if COLUMNS:
                tile = tile.to(tl.float32) * scale[:, None] if QUANTIZED else tile
                scale = scale_of(tl.max(tl.where(tile == tile, tl.abs(tile), float("inf")), 0), False)
                tl.store(column_scale + tl.program_id(0).to(tl.int64) * D + d, scale, mask=d < D)
                tl.store(column + d.to(tl.int64)[:, None] * R + r[None, :], to_e4m3(tile, scale[None, :]).T,
                         mask=(d < D)[:, None])

    @triton.jit
    def rows8_kernel(a, a_scale, w, w_scale, w_scale_e, w_scale_n, w_scale_k, expert, y, R, N: tl.constexpr,
                     K: tl.constexpr, BLOCK_M: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr):
        """BLOCK_M x 128 of y = a W^T, promoted after each 128 of K: a in 1x128 tiles, W [E, N, K] in 128x128 blocks."""
        i, j = tile_of(tl.cdiv(N, 128), GROUP)
        e = tl.load(expert + i * BLOCK_M // 128)
        if e >= 0:
            r, n = (i * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64), j * 128 + tl.arange(0, 128)
            total = tl.zeros([BLOCK_M, 128], tl.float32)
            w_scale += e * w_scale_e + j * w_scale_n
            for k in tl.range(0, tl.cdiv(K, 128), num_stages=STAGES):
                dot = tl.dot(a.load([i * BLOCK_M, k * 128]), w.load([e, j * 128, k * 128]).reshape(128, 128).T)
                total += dot * (tl.load(a_scale + k * R + r) * tl.load(w_scale + k * w_scale_k))[:, None]
            tl.store(y + r[:, None] * N + n[None, :], total, mask=(n < N)[None, :])

    @triton.jit
    def act8_kernel(h, pair, expert, weights, a, a_scale, h8, h8_scale, R, F: tl.constexpr, KEEP: tl.constexpr,
                    BLOCK_M: tl.constexpr):
        """BLOCK_M x 128 of weight * SwiGLU(h), and KEEP: of both halves of h, in 1x128 tiles."""
        if tl.load(expert + tl.program_id(0) * BLOCK_M // 128) >= 0:
            r, f = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.program_id(1) * 128 + tl.arange(0, 128)
            p = tl.load(pair + r)
            r, inside, tiles = r.to(tl.int64), (f < F)[None, :], tl.cdiv(F, 128)
            at = r[:, None] * (2 * F) + f[None, :]
            gate = tl.load(h + at, mask=inside, other=0.0).to(tl.float32)
            up = tl.load(h + at + F, mask=inside, other=0.0).to(tl.float32)
            if KEEP:
                store8(gate, h8 + at, h8_scale + tl.program_id(1) * R + r, inside)
                store8(up, h8 + at + F, h8_scale + (tiles + tl.program_id(1)) * R + r, inside)
            weight = tl.load(weights + p, mask=p >= 0, other=0.0)
            store8(gate * tl.sigmoid(gate) * up * weight[:, None], a + r[:, None] * F + f[None, :],
                   a_scale + tl.program_id(1) * R + r, inside)

    @triton.jit
    def load8(values, scale, inside):
        return tl.load(values, mask=inside, other=0.0).to(tl.float32) * tl.load(scale)[:, None]

    @triton.jit
    def store8(tile, to, to_scale, inside):
        """A tile of float32 in 1x128 tiles."""
        scale = scale_of(tl.max(tl.where(tile == tile, tl.abs(tile), float("inf")), 1), False)
        tl.store(to_scale, scale)
        tl.store(to, to_e4m3(tile, scale[:, None]), mask=inside)

    @triton.jit
    def store8_turned(tile, to, to_scale, inside):
        """A tile of float32, transposed, in 128x1 tiles."""
        scale = scale_of(tl.max(tl.where(tile == tile, tl.abs(tile), float("inf")), 0), False)
        tl.store(to_scale, scale, mask=inside)
        tl.store(to, to_e4m3(tile, scale[None, :]).T, mask=inside[:, None])

    @triton.jit
    def act8_grad_kernel(da, h8, h8_scale, pair, expert, weights, dh, dh_scale, dh_turned, dh_turned_scale, a_turned,
                         a_turned_scale, dweight, R, F: tl.constexpr):
        """128 x 128 of the SwiGLU's backward: from da and the kept h, dh in 1x128 and 128x1 tiles, a in 128x1 tiles,
        and this tile's part of the gate weights' gradient."""
        i, j = tl.program_id(0), tl.program_id(1)
        if tl.load(expert + i) >= 0:
            r, f = i * 128 + tl.arange(0, 128), j * 128 + tl.arange(0, 128)
            p = tl.load(pair + r)
            weight = tl.load(weights + p, mask=p >= 0, other=0.0)[:, None]
            r, there, inside, tiles = r.to(tl.int64), f < F, (f < F)[None, :], tl.cdiv(F, 128)
            at, turned = r[:, None] * (2 * F) + f[None, :], f.to(tl.int64)[:, None] * R + r[None, :]
            g, u = h8_scale + j * R + r, h8_scale + (tiles + j) * R + r
            # Each part reads its inputs anew, from the nearest cache: for all at once there are not registers enough.
            gate, up = load8(h8 + at, g, inside), load8(h8 + at + F, u, inside)
            a = gate * tl.sigmoid(gate) * up
            d = tl.load(da + r[:, None] * F + f[None, :], mask=inside, other=0.0).to(tl.float32)
            tl.store(dweight + j * R + r, tl.sum(d * a, 1))
            store8_turned(a * weight, a_turned + turned, a_turned_scale + i * F + f, there)
            gate = load8(h8 + at, g, inside)
            d = tl.load(da + r[:, None] * F + f[None, :], mask=inside, other=0.0).to(tl.float32) * weight
            d = d * (gate * tl.sigmoid(gate))
            store8(d, dh + at + F, dh_scale + (tiles + j) * R + r, inside)
            store8_turned(d, dh_turned + F * R.to(tl.int64) + turned, dh_turned_scale + i * (2 * F) + F + f, there)
            gate, up = load8(h8 + at, g, inside), load8(h8 + at + F, u, inside)
            d = tl.load(da + r[:, None] * F + f[None, :], mask=inside, other=0.0).to(tl.float32) * weight
            s = tl.sigmoid(gate)
            d = d * up * (s + gate * s * (1 - s))
            store8(d, dh + at, dh_scale + j * R + r, inside)
            store8_turned(d, dh_turned + turned, dh_turned_scale + i * (2 * F) + f, there)

    @triton.jit
    def weight_grad8_kernel(left, left_scale, right, right_scale, start, dw, M: tl.constexpr, N: tl.constexpr,
                            BLOCK_M: tl.constexpr, STAGES: tl.constexpr):
        """BLOCK_M x 128 of dW_e = left right^T over the rows of expert e: left [M, R], right [N, R] in 1x128 tiles."""
        columns = tl.cdiv(N, 128)
        tiles = columns * tl.cdiv(M, BLOCK_M)
        e, i, j = tl.program_id(0) // tiles, tl.program_id(0) % tiles // columns, tl.program_id(0) % columns
        m, n = i * BLOCK_M + tl.arange(0, BLOCK_M), j * 128 + tl.arange(0, 128)
        total = tl.zeros([BLOCK_M, 128], tl.float32)
        for k in tl.range(tl.load(start + e) // 128, tl.load(start + e + 1) // 128, num_stages=STAGES):
            dot = tl.dot(left.load([i * BLOCK_M, k * 128]), right.load([j * 128, k * 128]).T)
            s = tl.load(left_scale + k * M + m, mask=m < M, other=0.0)
            total += dot * (s[:, None] * tl.load(right_scale + k * N + n, mask=n < N, other=0.0)[None, :])
        to = dw + e.to(tl.int64) * (M * N) + m[:, None] * N + n[None, :]
        tl.store(to, total, mask=(m < M)[:, None] & (n < N)[None, :])


# The same two products written for Hopper. In the kernels above every warp loads, multiplies, and then scales and adds,
# while the tensor cores wait. Here two groups of four warps multiply, each 64 rows of a tile, and while one scales and
# adds the other has the tensor cores; a ninth warp does nothing but start loads, into a ring of STAGES slots: a slot is
# `full` when its bytes have come, and `empty` when both groups have read it. A multiprocessor runs one program, which
# walks over tiles. Triton's interpreter can't run it, so the kernels above are also what says what it computes.

if backend.has_triton():
    @gluon.jit
    def find_tile(tile, table, M, N, K, ROWS: gl.constexpr, GROUP: gl.constexpr):
        """(expert, tile of rows, tile of columns, first and last 128 of the contraction). ROWS: of a W^T, table: the
        expert of each tile of rows; else of dW, table: the first row of each expert."""
        rows, columns = gl.cdiv(M, 128), gl.cdiv(N, 128)
        here = tile if ROWS else tile % (rows * columns)
        first = here // (GROUP * columns) * GROUP
        height = gl.minimum(rows - first, GROUP)
        i, j = first + here % (GROUP * columns) % height, here % (GROUP * columns) // height
        if ROWS:
            e = gl.load(table + i)
            start, end = 0, gl.where(e >= 0, gl.cdiv(K, 128), 0)
        else:
            e = tile // (rows * columns)
            start, end = gl.load(table + e) // 128, gl.load(table + e + 1) // 128
        return e, i, j, start, end

    @gluon.jit
    def load_tiles(a, b, a_scale, b_scale, table, a_slots, b_slots, s_slots, t_slots, full, empty, M, N, K, tiles,
                   ROWS: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr):
        step = 0
        for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
            e, i, j, start, end = find_tile(tile, table, M, N, K, ROWS, GROUP)
            for k in range(start, end):
                slot = step % STAGES
                hopper.mbarrier.wait(empty.index(slot), (step // STAGES & 1) ^ 1)
                hopper.mbarrier.expect(full.index(slot), 256 * 128 + (512 if ROWS else 1024))                    # bytes
                for part in gl.static_range(2):
                    m = i * 128 + part * 64
                    load_tile(a, [m, k * 128], full.index(slot), a_slots.index(slot * 2 + part))
                    load_tile(a_scale, [k * M + m], full.index(slot), s_slots.index(slot * 2 + part))
                if ROWS:
                    load_tile(b, [e * N + j * 128, k * 128], full.index(slot), b_slots.index(slot))
                else:
                    load_tile(b, [j * 128, k * 128], full.index(slot), b_slots.index(slot))
                    load_tile(b_scale, [k * N + j * 128], full.index(slot), t_slots.index(slot))
                step += 1

    @gluon.jit
    def multiply_tiles(part, b_scale, scale_e, scale_n, scale_k, table, y, a_slots, b_slots, s_slots, t_slots, full,
                       empty, out, M, N, K, tiles, ROWS: gl.constexpr, STAGES: gl.constexpr,
                       GROUP: gl.constexpr):
        SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])
        zeros = gl.zeros([64, 128], gl.float32, SUMS)
        step = 0
        for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
            e, i, j, start, end = find_tile(tile, table, M, N, K, ROWS, GROUP)
            total = zeros
            for k in range(start, end):
                slot = step % STAGES
                if ROWS:
                    t = gl.load(b_scale + e * scale_e + j * scale_n + k * scale_k)
                hopper.mbarrier.wait(full.index(slot), step // STAGES & 1)
                dot = hopper.warpgroup_mma(a_slots.index(slot * 2 + part), b_slots.index(slot).permute((1, 0)), zeros,
                                           use_acc=False, is_async=True)
                s = s_slots.index(slot * 2 + part).load(gl.SliceLayout(1, SUMS))
                if not ROWS:
                    t = t_slots.index(slot).load(gl.SliceLayout(0, SUMS))
                dot = hopper.warpgroup_mma_wait(0, [dot])
                hopper.mbarrier.arrive(empty.index(slot), count=1)
                if ROWS:
                    total += dot * (s * t)[:, None]
                else:
                    total += dot * s[:, None] * t[None, :]
                step += 1
            row = i * 128 + part * 64
            if ROWS:
                if e >= 0:
                    hopper.tma.store_wait(0)                                   # of the tile before, from the same place
                    out.index(part).store(total.to(out.dtype))
                    hopper.fence_async_shared()
                    store_tile(y, [row, j * 128], out.index(part))
            else:
                m = row + gl.arange(0, 64, gl.SliceLayout(1, SUMS))
                n = j * 128 + gl.arange(0, 128, gl.SliceLayout(0, SUMS))
                to = y + (e.to(gl.int64) * M + m.to(gl.int64)[:, None]) * N + n[None, :]
                gl.store(to, total, mask=(m < M)[:, None] & (n < N)[None, :])
        if ROWS:
            hopper.tma.store_wait(0)

    @gluon.jit
    def wide_kernel(a, b, a_scale, b_tiles, b_scale, scale_e, scale_n, scale_k, table, y, M, N, K, tiles,
                    ROWS: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr):
        """rows8_kernel (ROWS) or weight_grad8_kernel, with tiles of 128x128."""
        BARRIER: gl.constexpr = hopper.mbarrier.MBarrierLayout()
        OUT: gl.constexpr = y.layout if ROWS else gl.NVMMASharedLayout(128, 16)
        a_slots = gl.allocate_shared_memory(gl.float8e4nv, [STAGES * 2, 64, 128], a.layout)
        b_slots = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, 128, 128], b.layout)
        s_slots = gl.allocate_shared_memory(gl.float32, [STAGES * 2, 64], a_scale.layout)
        t_slots = gl.allocate_shared_memory(gl.float32, [STAGES, 128], a_scale.layout)
        out = gl.allocate_shared_memory(gl.bfloat16, [2, 64 if ROWS else 8, 128 if ROWS else 64], OUT)
        full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
        empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
        for slot in gl.static_range(STAGES):
            hopper.mbarrier.init(full.index(slot), count=1)
            hopper.mbarrier.init(empty.index(slot), count=2)
        hopper.fence_async_shared()
        gl.warp_specialize([
            (multiply_tiles, (0, b_scale, scale_e, scale_n, scale_k, table, y, a_slots, b_slots, s_slots, t_slots, full,
                              empty, out, M, N, K, tiles, ROWS, STAGES, GROUP)),
            (multiply_tiles, (1, b_scale, scale_e, scale_n, scale_k, table, y, a_slots, b_slots, s_slots, t_slots, full,
                              empty, out, M, N, K, tiles, ROWS, STAGES, GROUP)),
            (load_tiles, (a, b, a_scale, b_tiles, table, a_slots, b_slots, s_slots, t_slots, full, empty, M, N, K,
                          tiles, ROWS, STAGES, GROUP))], [4, 1], [240, 24])


def swizzled(x, *block):
    """A descriptor of the matrix x for loads or stores of so large blocks, laid out as Hopper's products read them."""
    layout = gl.NVMMASharedLayout(128, 8 * x.element_size(), 2)
    return Described(x, list(x.shape), list(x.stride()), list(block), layout)


def flat(scale, block):
    """A descriptor of scales [tiles, rows] for loads of `block` of them."""
    return Described(scale, [scale.numel()], [1], [block], gl.NVMMASharedLayout(0, 32, 1))


def rows8_hopper(a, w, plan, dtype):
    """rows8_triton, BF16."""
    (values, scale), (_, N, K), R = a, w.values.shape, len(plan.pair)
    y = torch.empty(R, N, dtype=dtype, device=values.device)
    a_scale = flat(scale, 64)
    wide_kernel[backend.multiprocessors(y.device),](
        swizzled(values, 64, BLOCK), swizzled(w.values.flatten(0, 1), BLOCK, BLOCK), a_scale, a_scale, w.scale,
        *w.scale.stride(), plan.expert, swizzled(y, 64, BLOCK), R, N, K, R // BLOCK * triton.cdiv(N, BLOCK), True,
        STAGES=5, GROUP=8, num_warps=4)
    return y


def weight_grad8_hopper(left, right, plan, weight):
    """weight_grad8_triton."""
    (E, M, N), dw = weight.shape, torch.empty_like(weight)
    wide_kernel[backend.multiprocessors(dw.device),](
        swizzled(left[0], 64, BLOCK), swizzled(right[0], BLOCK, BLOCK), flat(left[1], 64), flat(right[1], BLOCK),
        right[1], 0, 0, 0, plan.start, dw, M, N, len(plan.pair), E * triton.cdiv(M, BLOCK) * triton.cdiv(N, BLOCK),
        False, STAGES=5, GROUP=8, num_warps=4)
    return dw


def scales(tiles, rows, like):
    return torch.empty(tiles, rows, dtype=torch.float32, device=like.device)


def gather8_triton(x, plan, rows=True, columns=False):
    """x [N, D], plain or Quantized in 1x128 -> (its rows [R, D] in 1x128 tiles or None, [D, R]: the transpose's or
    None), with their scales [tiles along the contraction, ...]."""
    q = isinstance(x, Quantized)
    (N, D), R, K = (x.values if q else x).shape, len(plan.pair), plan.row.shape[1]
    x, x_scale = (x.values, x.scale) if q else (x, x)
    k, BLOCK_M = triton.cdiv(D, BLOCK), BLOCK if columns else 32
    row = (empty(R, D, device=x.device), scales(k, R, x)) if rows else None
    column = (empty(D, R, device=x.device), scales(R // BLOCK, D, x)) if columns else None
    to, turned = row or column, column or row                             # what is not asked for is not written
    gather8_kernel[R // BLOCK_M, k](x, x_scale, plan.pair, plan.expert, *to, *turned, N, R, D, K, q, rows, columns,
                                    BLOCK_M, num_warps=8 if columns else 4)
    return row, column


def rows8_triton(a, w, plan, dtype, BLOCK_M=64):
    """a ([R, K], its scales), W Quantized [E, N, K] -> a W^T [R, N]."""
    (values, scale), (_, N, K) = a, w.values.shape
    y = torch.empty(len(values), N, dtype=dtype, device=values.device)
    rows8_kernel[len(values) // BLOCK_M * triton.cdiv(N, BLOCK),](
        described(values, BLOCK_M, BLOCK), scale, described(w.values, 1, BLOCK, BLOCK), w.scale,
        *w.scale.stride(), plan.expert, y,
        len(values), N, K, BLOCK_M, GROUP=16, STAGES=3, num_warps=4)
    return y


def act8_triton(h, weights, plan, keep):
    """h [R, 2F] -> weight * SwiGLU(h) [R, F] and, if it is to be kept, h, both with their scales."""
    (R, FF), tiles, BLOCK_M = h.shape, triton.cdiv(h.shape[1] // 2, BLOCK), 32
    a = empty(R, FF // 2, device=h.device), scales(tiles, R, h)
    kept = (empty(R, FF, device=h.device), scales(2 * tiles, R, h)) if keep else None
    act8_kernel[R // BLOCK_M, tiles](h, plan.pair, plan.expert, weights, *a, *(kept or a), R, FF // 2, keep, BLOCK_M)
    return a, kept


def act8_grad_triton(da, h8, weights, plan):
    """-> dh [R, 2F], dh^T [2F, R], a^T [F, R], all with their scales, and dweights float32 [N, K]."""
    (R, F), tiles = da.shape, triton.cdiv(da.shape[1], BLOCK)
    dh = empty(R, 2 * F, device=da.device), scales(2 * tiles, R, da)
    dh_turned = empty(2 * F, R, device=da.device), scales(R // BLOCK, 2 * F, da)
    a_turned = empty(F, R, device=da.device), scales(R // BLOCK, F, da)
    part = scales(tiles, R, da)
    act8_grad_kernel[R // BLOCK, tiles](da, *h8, plan.pair, plan.expert, weights, *dh, *dh_turned, *a_turned, part, R,
                                        F, num_warps=16)
    return dh, dh_turned, a_turned, weights_grad(part, plan)


def weight_grad8_triton(left, right, plan, weight, BLOCK_M=64):
    """dW [E, M, N] = left right^T: left ([M, R], its scales), right ([N, R], its scales)."""
    (E, M, N), dw = weight.shape, torch.empty_like(weight)
    weight_grad8_kernel[E * triton.cdiv(M, BLOCK_M) * triton.cdiv(N, BLOCK),](
        described(left[0], BLOCK_M, BLOCK), left[1], described(right[0], BLOCK, BLOCK), right[1], plan.start, dw, M, N,
        BLOCK_M, STAGES=3, num_warps=4)
    return dw


def rows8(a, w, plan, dtype):
    """rows8_triton, on Hopper in BF16 rows8_hopper."""
    pick = rows8_hopper if backend.hopper(w.values.device) and dtype == torch.bfloat16 else rows8_triton
    return pick(a, w, plan, dtype)


def weight_grad8(left, right, plan, weight):
    """weight_grad8_triton, on Hopper weight_grad8_hopper."""
    pick = weight_grad8_hopper if backend.hopper(weight.device) else weight_grad8_triton
    return pick(left, right, plan, weight)


class Routed8(torch.autograd.Function):
    """routed_triton in FP8."""

    @staticmethod
    def forward(ctx, x, weights, w13, w2, indices, rows, keep):
        x, weights = x.contiguous(), weights.contiguous()
        up, down = ctx.quantized = quantized(w13, False), quantized(w2, False)
        plan, x8 = plan_triton(indices, len(w13), rows=rows), quantize_triton(x)[0]
        h = rows8(gather8_triton(x8, plan)[0], up, plan, x.dtype)
        a, h8 = act8_triton(h, weights, plan, keep)
        if keep:
            ctx.save_for_backward(x8.values, x8.scale, weights, *h8)
        ctx.plan, ctx.parameters = plan, (w13, w2)
        return sum_triton(rows8(a, down, plan, x.dtype), plan)

    @staticmethod
    def backward(ctx, dout):
        values, scale, weights, *h8 = ctx.saved_tensors
        (w13, w2), (up, down), plan, dout = ctx.parameters, ctx.quantized, ctx.plan, dout.contiguous()
        dy, dy_turned = gather8_triton(dout, plan, columns=True)
        da = rows8(dy, transpose(down), plan, dout.dtype)
        del dy
        dh, dh_turned, a_turned, dweights = act8_grad_triton(da, h8, weights, plan)
        del da
        # What is as large as the rows is let go before dx asks for as much; a queue holds what it needs by itself.
        dw2 = weight_gradient(w2, partial(weight_grad8, dy_turned, a_turned, plan, w2))
        del dy_turned, a_turned
        dx = sum_triton(rows8(dh, transpose(up), plan, dout.dtype), plan)
        del dh

        def wgrad13():
            x_turned = gather8_triton(Quantized(values, scale), plan, rows=False, columns=True)[1]
            return weight_grad8(dh_turned, x_turned, plan, w13)

        dw13 = weight_gradient(w13, wgrad13)
        return dx, dweights.to(weights.dtype), dw13, dw2, None, None, None


# --- which one runs ---------------------------------------------------------------------------------------------------

@torch.compiler.disable
def routed_triton(x, indices, weights, w13, w2, recipe=None, rows=None):
    """moe.routed_torch without waiting for the device, and with no more than x and h kept for backward."""
    form = Routed8 if recipe else Routed
    return form.apply(x, weights, w13, w2, indices, rows, torch.is_grad_enabled())
