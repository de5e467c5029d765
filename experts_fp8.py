"""The routed experts of many tokens in FP8: experts.py's dataflow on the tiles of section 3.3.

A token is quantized once and its bytes are gathered. The passes over memory that gather rows, and those of SwiGLU and
its gradient, write the 1x128 and the 128x1 tiles which the products want. h is kept in FP8.

Shapes: N tokens, K choices, E experts of this rank, D dim, F moe_inter_dim, R rows, an upper bound.
"""
from functools import partial

import torch

import backend
from experts import Routed, described, plan_triton, sum_triton, weights_grad
from fp8 import quantized, weight_gradient
from fp8_tiles import BLOCK, Quantized, empty, quantize_triton, transpose

if backend.has_triton():
    import triton
    import triton.language as tl
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia import hopper
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as Described

    from experts import tile_of
    from fp8_gemm import load_tile, store_tile
    from fp8_tiles import largest, neighbours, scale_of, sigmoid, tile_at, to_e4m3, turned


# --- in FP8 -----------------------------------------------------------------------------------------------------------
#
# Pointers that gather rows of FP8 take more registers than there are: the gather is a pass of its own, over bytes.

if backend.has_triton():
    @triton.jit
    def gather8_kernel(x, x_scale, pair, expert, row, row_scale, column, column_scale, N, R, D: tl.constexpr,
                       K: tl.constexpr, QUANTIZED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                       BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, APART: tl.constexpr):
        """fp8_tiles.quantize_kernel of the rows of x, plain or QUANTIZED in 1x128 tiles; all scales are powers of two.
        Rows that are nobody's are zeros."""
        i, j = tile_at(R // BLOCK_M, tl.cdiv(D, BLOCK_D), COLUMNS)
        if tl.load(expert + i * BLOCK_M // 128) >= 0:
            order = neighbours(BLOCK_M, APART) if COLUMNS else tl.arange(0, BLOCK_M)
            r, d = i * BLOCK_M + order, j * BLOCK_D + tl.arange(0, BLOCK_D)
            p = tl.load(pair + r)
            n, inside = (p // K).to(tl.int64), (p >= 0)[:, None] & (d < D)[None, :]
            tile = tl.load(x + n[:, None] * D + d[None, :], mask=inside, other=0.0)
            if QUANTIZED:
                scale = tl.load(x_scale + (j * BLOCK_D // 128).to(tl.int64) * N + n, mask=p >= 0, other=0.0)
            else:
                tile = tile.to(tl.float32)
                if ROWS:
                    scale = scale_of(largest(tile, 1), True)
            r, there = r.to(tl.int64), (d < D)[None, :]
            if ROWS:
                tl.store(row_scale + j.to(tl.int64) * R + r, scale)
                values = tile if QUANTIZED else to_e4m3(tile, scale[:, None])
                tl.store(row + r[:, None] * D + d[None, :], values, mask=there)
            if COLUMNS:
                tile = tile.to(tl.float32) * scale[:, None] if QUANTIZED else tile
                scale = scale_of(largest(tile, 0), True)
                tl.store(column_scale + i.to(tl.int64) * D + d, scale, mask=d < D)
                r = i.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
                tl.store(column + d.to(tl.int64)[:, None] * R + r[None, :],
                         turned(to_e4m3(tile, scale[None, :]), BLOCK_M, APART), mask=(d < D)[:, None])

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
            store8(gate * sigmoid(gate) * up * weight[:, None], a + r[:, None] * F + f[None, :],
                   a_scale + tl.program_id(1) * R + r, inside)

    @triton.jit
    def load8(values, scale, inside):
        return tl.load(values, mask=inside, other=0.0).to(tl.float32) * tl.load(scale)[:, None]

    @triton.jit
    def store8(tile, to, to_scale, inside):
        """A tile of float32 in 1x128 tiles."""
        scale = scale_of(largest(tile, 1), False)
        tl.store(to_scale, scale)
        tl.store(to, to_e4m3(tile, scale[:, None]), mask=inside)

    @triton.jit
    def store8_turned(tile, to, to_scale, inside, APART: tl.constexpr):
        """A tile of 128 rows of float32, transposed, in 128x1 tiles."""
        scale = scale_of(largest(tile, 0), False)
        tl.store(to_scale, scale, mask=inside)
        tl.store(to, turned(to_e4m3(tile, scale[None, :]), 128, APART), mask=inside[:, None])

    @triton.jit
    def act8_grad_kernel(da, h8, h8_scale, pair, expert, weights, dh, dh_scale, dh_turned, dh_turned_scale, a_turned,
                         a_turned_scale, dweight, R, F: tl.constexpr, APART: tl.constexpr):
        """128 x 128 of the SwiGLU's backward: from da and the kept h, dh in 1x128 and 128x1 tiles, a in 128x1 tiles,
        and this tile's part of the gate weights' gradient."""
        i, j = tl.program_id(0), tl.program_id(1)
        if tl.load(expert + i) >= 0:
            r, f = i * 128 + neighbours(128, APART), j * 128 + tl.arange(0, 128)
            p = tl.load(pair + r)
            weight = tl.load(weights + p, mask=p >= 0, other=0.0)[:, None]
            r, there, inside, tiles = r.to(tl.int64), f < F, (f < F)[None, :], tl.cdiv(F, 128)
            at = r[:, None] * (2 * F) + f[None, :]
            across = f.to(tl.int64)[:, None] * R + (i * 128 + tl.arange(0, 128))[None, :]
            g, u = h8_scale + j * R + r, h8_scale + (tiles + j) * R + r
            # Each part reads its inputs anew, from the nearest cache: for all at once there are not registers enough.
            gate, up = load8(h8 + at, g, inside), load8(h8 + at + F, u, inside)
            a = gate * sigmoid(gate) * up
            d = tl.load(da + r[:, None] * F + f[None, :], mask=inside, other=0.0).to(tl.float32)
            tl.store(dweight + j * R + r, tl.sum(d * a, 1))
            store8_turned(a * weight, a_turned + across, a_turned_scale + i * F + f, there, APART)
            gate = load8(h8 + at, g, inside)
            d = tl.load(da + r[:, None] * F + f[None, :], mask=inside, other=0.0).to(tl.float32) * weight
            d = d * (gate * sigmoid(gate))
            store8(d, dh + at + F, dh_scale + (tiles + j) * R + r, inside)
            store8_turned(d, dh_turned + F * R.to(tl.int64) + across, dh_turned_scale + i * (2 * F) + F + f, there,
                          APART)
            gate, up = load8(h8 + at, g, inside), load8(h8 + at + F, u, inside)
            d = tl.load(da + r[:, None] * F + f[None, :], mask=inside, other=0.0).to(tl.float32) * weight
            s = sigmoid(gate)
            d = d * up * (s + gate * s * (1 - s))
            store8(d, dh + at, dh_scale + j * R + r, inside)
            store8_turned(d, dh_turned + across, dh_turned_scale + i * (2 * F) + f, there, APART)

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
    BLOCK_M, BLOCK_D, warps = BLOCK if columns else 32, BLOCK if rows else 64, 8 if rows and columns else 4
    row = (empty(R, D, device=x.device), scales(triton.cdiv(D, BLOCK), R, x)) if rows else None
    column = (empty(D, R, device=x.device), scales(R // BLOCK, D, x)) if columns else None
    a, b = row or column, column or row                                   # what is not asked for is not written
    gather8_kernel[R // BLOCK_M * triton.cdiv(D, BLOCK_D),](
        x, x_scale, plan.pair, plan.expert, *a, *b, N, R, D, K, q, rows, columns, BLOCK_M, BLOCK_D,
        warps * 32 * 16 // (BLOCK_D * x.element_size()), num_warps=warps)
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
                                        F, 32 // da.element_size(), num_warps=8)
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
        plan, x8 = plan_triton(indices, len(w13), rows=rows), quantize_triton(x, pow2=True)[0]
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
    assert not recipe or recipe.pow2, "the kernels know no other scales"
    form = Routed8 if recipe else Routed
    return form.apply(x, weights, w13, w2, indices, rows, torch.is_grad_enabled())
