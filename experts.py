"""The routed experts of many tokens in Triton: sorted by index, multiplied where they lie, summed by token.

"""
from dataclasses import dataclass

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
        """How many of BLOCK pairs each expert has. EXPERTS: a power of two over E; pairs of no expert here count as E."""
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


def plan_triton(indices, E, height=128, most=None):
    """indices int64 [N, K] (-1: an expert that is elsewhere) -> Plan, without waiting for the device: R is an upper
    bound, from `most` pairs with an expert here (None: all of them)."""
    P, EXPERTS = indices.numel(), triton.next_power_of_2(E)
    R = ((P if most is None else most) // height + E) * height            # each expert has at most one ragged tile
    BLOCK = max(16, 8192 // EXPERTS)
    B, make = triton.cdiv(P, BLOCK), lambda *shape: torch.empty(*shape, dtype=torch.int32, device=indices.device)
    pair, expert = torch.full((R + R // height,), -1, dtype=torch.int32, device=indices.device).split([R, R // height])
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
                  GROUP: tl.constexpr, STAGES: tl.constexpr, JOINED: tl.constexpr):
        """BLOCK_M x BLOCK_F of a = weight * silu(x W1^T) * x W3^T, the rows of x gathered as they are loaded; KEEP: and
        of h, the two products."""
        i, j = tile_of(tl.cdiv(F, BLOCK_F), GROUP)
        e = tl.load(expert + i)
        if e >= 0:
            r, f = i * BLOCK_M + tl.arange(0, BLOCK_M), j * BLOCK_F + tl.arange(0, BLOCK_F)
            p = tl.load(pair + r)
            d = tl.arange(0, BLOCK_D)
            rows = x + (p // K).to(tl.int64)[:, None] * D + d[None, :]
            if JOINED:
                both = tl.zeros([BLOCK_M, 2 * BLOCK_F], tl.float32)
                for at in tl.range(0, D, BLOCK_D, num_stages=STAGES):
                    here = (p >= 0)[:, None] if D % BLOCK_D == 0 else (p >= 0)[:, None] & (at + d < D)[None, :]
                    tile = tl.load(rows + at, mask=here, other=0.0)
                    w = w13.load([e, 0, j * BLOCK_F, at]).reshape(2 * BLOCK_F, BLOCK_D)
                    both = tl.dot(tile, w.T, both, input_precision="ieee")
                gate, up = both.reshape(BLOCK_M, 2, BLOCK_F).permute(0, 2, 1).split()
            else:
                gate = tl.zeros([BLOCK_M, BLOCK_F], tl.float32)
                up = tl.zeros([BLOCK_M, BLOCK_F], tl.float32)
                for at in tl.range(0, D, BLOCK_D, num_stages=STAGES):
                    here = (p >= 0)[:, None] if D % BLOCK_D == 0 else (p >= 0)[:, None] & (at + d < D)[None, :]
                    tile = tl.load(rows + at, mask=here, other=0.0)
                    gate = tl.dot(tile, w13.load([e, 0, j * BLOCK_F, at]).reshape(BLOCK_F, BLOCK_D).T, gate,
                                  input_precision="ieee")
                    up = tl.dot(tile, w13.load([e, 1, j * BLOCK_F, at]).reshape(BLOCK_F, BLOCK_D).T, up,
                                input_precision="ieee")
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
    def hidden_grad_kernel(dout, w2, pair, expert, weights, h, a, dh, dweight, R, D: tl.constexpr, F: tl.constexpr,
                           K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
                           GROUP: tl.constexpr, STAGES: tl.constexpr):
        """BLOCK_M x BLOCK_F of da = dout W2, the rows of dout gathered; from it and h at once dh, a (made again for
        Wgrad), and this tile's part of the gate weights' gradient, <da, a without its weight>."""
        i, j = tile_of(tl.cdiv(F, BLOCK_F), GROUP)
        e = tl.load(expert + i)
        if e >= 0:
            r, d = i * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
            p = tl.load(pair + r)
            rows = dout + (p // K).to(tl.int64)[:, None] * D + d[None, :]
            da = tl.zeros([BLOCK_M, BLOCK_F], tl.float32)
            for at in tl.range(0, D, BLOCK_D, num_stages=STAGES):
                here = (p >= 0)[:, None] if D % BLOCK_D == 0 else (p >= 0)[:, None] & (at + d < D)[None, :]
                tile = tl.load(rows + at, mask=here, other=0.0)
                da = tl.dot(tile, w2.load([e, at, j * BLOCK_F]).reshape(BLOCK_D, BLOCK_F), da, input_precision="ieee")
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
    def weight_grad_kernel(left, x, pair, start, dw, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
                           STRIDE_M: tl.constexpr, STRIDE_N: tl.constexpr, BLOCK_M: tl.constexpr,
                           BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, STAGES: tl.constexpr):
        """BLOCK_M x BLOCK_N of dW_e = left^T x over the rows of expert e, those of x [tokens, N] gathered."""
        columns = tl.cdiv(N, BLOCK_N)
        tiles = columns * tl.cdiv(M, BLOCK_M)
        e, i, j = tl.program_id(0) // tiles, tl.program_id(0) % tiles // columns, tl.program_id(0) % columns
        m, n = i * BLOCK_M + tl.arange(0, BLOCK_M), j * BLOCK_N + tl.arange(0, BLOCK_N)
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for at in tl.range(tl.load(start + e), tl.load(start + e + 1), BLOCK_R, num_stages=STAGES):
            p = tl.load(pair + at + tl.arange(0, BLOCK_R))
            here = (p >= 0)[:, None] if N % BLOCK_N == 0 else (p >= 0)[:, None] & (n < N)[None, :]
            tile = tl.load(x + (p // K).to(tl.int64)[:, None] * N + n[None, :], mask=here, other=0.0)
            total = tl.dot(left.load([at, i * BLOCK_M]).T, tile, total, input_precision="ieee")
        to = dw + e.to(tl.int64) * (M * N) + m[:, None] * STRIDE_M + n[None, :] * STRIDE_N
        tl.store(to, total, mask=(m < M)[:, None] & (n < N)[None, :])


def described(x, *block):
    """A descriptor of x, contiguous, for loads of so large blocks."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), list(block))


@dataclass(frozen=True)
class Tiles:
    """Sizes of tiles and numbers of warps, for what a program holds in registers and keeps coming in shared memory."""
    rows: int = 128
    up: int = 128                             # columns of up_kernel, of which it makes two products
    hidden: int = 128
    wide: int = 256
    deep: int = 64                            # of the contraction at a time
    warps: int = 8
    stages: int = 3
    group: int = 8
    joined: bool = True
    regs: int = None


HOPPER, SMALL = Tiles(), Tiles(16, 16, 16, 16, 16, 4, 1)


def up_triton(x, weights, w13, plan, keep, t):
    """-> a [R, F], and h [R, 2F] if it is to be kept."""
    (E, FF, D), R, K = w13.shape, len(plan.pair), plan.row.shape[1]
    a, h = x.new_empty(R, FF // 2), x.new_empty(R, FF) if keep else None
    up_kernel[R // t.rows * triton.cdiv(FF // 2, t.up),](
        x, described(w13.view(E, 2, FF // 2, D), 1, 1 + t.joined, t.up, t.deep), plan.pair, plan.expert, weights,
        a if h is None else h, a, D, FF // 2, K, keep, t.rows, t.up, t.deep, t.group, t.stages, t.joined,
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


def hidden_grad_triton(dout, w2, weights, h, plan, t):
    """-> dh [R, 2F], a [R, F], dweights float32 [N, K]."""
    (E, D, F), R, (N, K) = w2.shape, len(h), plan.row.shape
    dh, a, columns = torch.empty_like(h), h.new_empty(R, F), triton.cdiv(F, t.hidden)
    part = torch.empty(columns, R, dtype=torch.float32, device=h.device)
    hidden_grad_kernel[R // t.rows * columns,](
        dout, described(w2, 1, t.deep, t.hidden), plan.pair, plan.expert, weights, h, a, dh, part, R, D, F, K, t.rows,
        t.hidden, t.deep, t.group, t.stages, num_warps=t.warps, **({"maxnreg": t.regs} if t.regs else {}))
    dweights = part.sum(0)[plan.row.clamp_min(0)].masked_fill(plan.row < 0, 0)
    return dh, a, dweights


def weight_grad_triton(left, x, plan, weight, turned, t):
    """dW [E, M, N] = left^T x, rows of x gathered; or turned its transpose, dW [E, N, M]."""
    M, (N, D), K = left.shape[1], x.shape, plan.row.shape[1]
    dw = torch.empty_like(weight)
    weight_grad_kernel[len(weight) * triton.cdiv(M, t.rows) * triton.cdiv(D, t.wide),](
        described(left, t.deep, t.rows), x, plan.pair, plan.start, dw, M, D, K, 1 if turned else D, M if turned else 1,
        t.rows, t.wide, t.deep, t.stages, num_warps=t.warps)
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
    @staticmethod
    def forward(ctx, x, weights, w13, w2, indices, keep):
        tiles = HOPPER if x.element_size() == 2 else SMALL
        x, weights, low = x.contiguous(), weights.contiguous(), [cast(w, x.dtype) for w in (w13, w2)]
        plan = plan_triton(indices, len(w13), tiles.rows)
        a, h = up_triton(x, weights, low[0], plan, keep, tiles)
        ctx.save_for_backward(x, weights, h)
        ctx.plan, ctx.low, ctx.parameters, ctx.tiles = plan, low, (w13, w2), tiles
        return sum_triton(rows_triton(a, low[1], plan, False, tiles), plan)

    @staticmethod
    def backward(ctx, dout):
        (x, weights, h), (w13, w2), plan, tiles = ctx.saved_tensors, ctx.parameters, ctx.plan, ctx.tiles
        dout = dout.contiguous()
        dh, a, dweights = hidden_grad_triton(dout, ctx.low[1], weights, h, plan, tiles)
        dx = sum_triton(rows_triton(dh, ctx.low[0], plan, True, tiles), plan)
        dw13 = weight_gradient(w13, lambda: weight_grad_triton(dh, x, plan, w13, False, tiles))
        dw2 = weight_gradient(w2, lambda: weight_grad_triton(a, dout, plan, w2, True, tiles))
        return dx, dweights.to(weights.dtype), dw13, dw2, None, None


@torch.compiler.disable
def routed_triton(x, indices, weights, w13, w2, recipe=None):
    return Routed.apply(x, weights, w13, w2, indices, torch.is_grad_enabled())
