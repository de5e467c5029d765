"""FP8 training: the three products of a Linear in 8 bits, with a scale for every 128 numbers (section 3.3).

The problem. A tensor core multiplies FP8 numbers twice as fast as BF16 ones, and they take half the memory. But E4M3
has 4 bits of exponent and 3 of mantissa: it reaches from 2^-9 to 448, with a relative error of up to 6%. Scaled by the
largest value of a whole tensor, one outlier presses everything else into the zeros. V3 (3.3.2) gives every 128 numbers
a scale of their own:

    activations, gradients    one scale per 1 x 128 tile: one row (token), 128 columns (channels)
    weights                   one scale per 128 x 128 block

    scale = max|x| / 448,     values = round(x / scale) in E4M3,     x = values * scale

A product contracts over the dim that its operands' scales are cut along, so that of every 128 products one factor can
be taken out, and has to be: Hopper's tensor cores keep about 14 bits of a running sum. So after each 128 of K the sum
is promoted: multiplied by the two scales and added up in FP32 (3.3.2, figure 7b).

A Linear (figure 6), x [N, in], W [out, in], dy [N, out]; x, y, dx are BF16, W and dW FP32:

    Fprop   y  = x  W^T     x  in 1x128 along in      W   in 128x128
    Dgrad   dx = dy W       dy in 1x128 along out     W^T in 128x128: the same numbers, moved into its order
    Wgrad   dW = dy^T x     both along the tokens: 128x1 tiles, that is the transposes dy^T [out, N], x^T [in, N]
                            in 1x128. Quantized anew: scales along the channels can't be taken out of this sum

What Wgrad needs of the forward pass is kept in FP8 as well (3.3.3): the input of a Linear, from which the 128x1 tiles
are made in backward; of an FFN's second Linear the input of the SwiGLU, whose output is made again. The input of the
Linear after attention is kept in a format of 12 bits, E5M6, since attention's own backward needs it too; all its scales
are powers of two, so that going from 1x128 to 128x1 tiles only moves exponents.

In high precision stay the embedding, the head, the gates, the norms and attention itself (3.3.1). The optimizer's FP32
weights are the masters: they are quantized once per step, not once per micro-batch. AdamW's moments are BF16. Nobody
waits for Wgrad, so a pipeline (dualpipe.py) may have it put off.

Shapes: N tokens (rows), M x K times N x K in a product, E experts. In tiles: m = ceil(M/128), k = ceil(K/128); the last
tile of a ragged dim is smaller, as in the released checkpoints.
Defined for bad numbers: a tile's scale is at least 2^-126 (a tile of zeros divides by no zero), and a tile that holds a
NaN or an infinity gets the scale NaN: all of it reads as NaN, and nothing saturates unseen.
Simplified against V3: the layers that share an input (W_dq and W_dkv) quantize it each for itself; attention keeps its
output in BF16 besides; E5M6 is held in FP16, of which it is a subset: 16 bits where packing would take 12.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

import backend

if backend.has_triton():
    import triton
    import triton.language as tl
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia import hopper
    from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as SharedDescriptor
    from triton.tools.tensor_descriptor import TensorDescriptor

BLOCK = 128                                   # numbers along the contraction that share a scale


# --- formats, tiles and scales ----------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Format:
    """Floating point with a sign, some bits of exponent, and `mantissa` bits after the leading one."""
    mantissa: int
    lowest: int                               # exponent of the smallest normal number; below it the steps stay equal
    largest: float
    dtype: torch.dtype                        # of the tensors that hold it


E4M3 = Format(3, -6, 448.0, torch.float8_e4m3fn)
E5M6 = Format(6, -14, 65024.0, torch.float16)                          # 2^15 * (2 - 2^-6); FP16 less its last 4 bits
LEAST = 2.0 ** -126                           # smallest scale: its reciprocal and what it multiplies stay finite


@dataclass
class Quantized:
    """values [..., M, K] in 8 (or 12) bits, scale float32 [..., M or m, k]: per 1x128 tile or per 128x128 block."""
    values: torch.Tensor
    scale: torch.Tensor

    def __getitem__(self, rows):
        """Some rows of tiles, or one matrix of a stack of blocks."""
        return Quantized(self.values[rows], self.scale[rows])

    @property
    def mT(self):
        """The transpose, of blocks: the same bytes in another order."""
        return Quantized(self.values.mT, self.scale.mT)

    def dequantize(self):
        """float32 [..., M, K]."""
        M, K = self.values.shape[-2:]
        scale = self.scale.repeat_interleave(BLOCK, -1)[..., :K]
        if scale.shape[-2] < M:
            scale = scale.repeat_interleave(BLOCK, -2)[..., :M, :]
        return self.values.to(torch.float32) * scale


def bits(x):
    return x.view(torch.int32)


def step_of(x, mantissa, lowest):
    """The distance between neighbours of x (float32) in a format: 2^(exponent - mantissa). Made from the bits, as a
    kernel does; pow and log2 are not exact on every machine."""
    exponent = ((bits(x) >> 23 & 255) - 127).clamp_min(lowest)
    return (exponent - mantissa + 127 << 23).view(torch.float32)


def round_to(x, fmt):
    """float32 -> the nearest number of the format, ties to even, still in float32; |x| at most fmt.largest. What
    vanishes keeps its sign, as it does in a GPU's own cast."""
    # 1.5 * 2^23 steps are so large that float32 itself has no digit left below one step, and rounds there.
    large = 1.5 * 2**23 * step_of(x, fmt.mantissa, fmt.lowest)
    return torch.copysign((x + large) - large, x)


def round_up(scale):
    """The next power of two, from a normal float32: what the 8 bits of a UE8M0 scale can say."""
    return (bits(scale) + 0x7FFFFF >> 23 << 23).view(torch.float32)


def quantize_torch(x, rows=1, fmt=E4M3, pow2=False):
    """x [..., M, K], any float dtype -> Quantized, with a scale for each tile of `rows` (1 or 128) x 128.

    pow2: the scales are powers of two, rounded up before anything is divided by them. 128x1 tiles of a matrix are the
    1x128 tiles of its transpose.
    """
    M, K = x.shape[-2:]
    m, k = -(-M // rows), -(-K // BLOCK)
    tiles = F.pad(x.to(torch.float32), (0, k * BLOCK - K, 0, m * rows - M))
    tiles = tiles.unflatten(-1, (k, BLOCK)).unflatten(-3, (m, rows))                         # [..., m, rows, k, 128]
    amax = tiles.abs().amax((-3, -1), keepdim=True)                                          # NaN if one of them is
    # Divided by a tensor: a GPU would multiply by the reciprocal of a Python number, and round twice.
    scale = (amax / torch.full_like(amax, fmt.largest)).clamp_min(LEAST)
    scale = round_up(scale) if pow2 else scale
    values = round_to((tiles * scale.reciprocal()).clamp(-fmt.largest, fmt.largest), fmt)
    bad = ~amax.isfinite()
    values = values.masked_fill(bad, 0).flatten(-2).flatten(-3, -2)[..., :M, :K].to(fmt.dtype)
    return Quantized(values.contiguous(), scale.masked_fill(bad, torch.nan).squeeze((-3, -1)))


def swiglu_torch(h, weight=None):
    """silu(a) * b in float32 for h = [a, b]: [R, 2F] -> [R, F]; times the rows' weight [R] if there is one."""
    a, b = h.to(torch.float32).chunk(2, -1)
    out = F.silu(a) * b
    return out if weight is None else out * weight[:, None]


# --- the product ------------------------------------------------------------------------------------------------------

def dot_limited(a, b, y, kept=14):
    """y [M, N] + a [M, K] b [N, K]^T as Hopper's tensor cores add up: 32 products and the sum so far are shifted to
    the exponent of the largest of them, cut off below its `kept` bits, and added (3.3.2)."""
    for start in range(0, a.shape[1], 32):
        terms = a[:, None, start:start + 32] * b[None, :, start:start + 32]                   # [M, N, 32], exact
        terms = torch.cat([y.unsqueeze(-1), terms], -1)
        step = step_of(terms.abs().amax(-1, keepdim=True), kept - 1, -100)
        y = ((terms / step).trunc() * step).sum(-1)
    return y


def gemm_torch(a, b, dtype=torch.float32, kept=None):
    """a b^T -> [M, N] in `dtype`, with promotion to FP32 after each 128 of K (3.3.2).

    a: Quantized [M, K] in 1x128; b: Quantized [N, K] in 128x128, or in 1x128 (Wgrad). kept: bits that the sums inside
    128 keep, to see what the hardware does; None: float32.
    """
    M, N = len(a.values), len(b.values)
    scale = b.scale if len(b.scale) == N else b.scale.repeat_interleave(BLOCK, 0)[:N]         # [N, k]
    y = torch.zeros(M, N, dtype=torch.float32, device=a.values.device)
    for k in range(a.scale.shape[1]):
        x, w = (q.values[:, k * BLOCK:(k + 1) * BLOCK].to(torch.float32) for q in (a, b))
        dot = x @ w.t() if kept is None else dot_limited(x, w, torch.zeros_like(y), kept)
        y += dot * (a.scale[:, k, None] * scale[:, k])
    return y.to(dtype)


# --- the kernels ------------------------------------------------------------------------------------------------------
#
# Hopper's FP8 tensor cores read both operands along K, from shared memory, where the descriptors' loads (TMA) put them:
# so each operand is written K-major once, W^T and the 128x1 tiles too, and rows begin at multiples of 16 bytes.

def empty(*shape, device):
    """E4M3 [..., K] whose rows begin at multiples of 16 bytes."""
    *lead, K = shape
    return torch.empty(*lead, -(-K // 16) * 16, dtype=torch.float8_e4m3fn, device=device)[..., :K]


def tile_scales(M, k, device):
    """float32 [M, k], each column in one piece."""
    return torch.empty(k, M, dtype=torch.float32, device=device).t()


if backend.has_triton():
    INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

    @triton.jit
    def size(x):
        """|x| as an integer, in the same order: NaN is above infinity, and that above all numbers."""
        return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF

    @triton.jit
    def larger(x, y):
        return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)

    @triton.jit
    def largest(x, axis: tl.constexpr):
        """The largest |x| along an axis, NaN if there is one."""
        if INTERPRETED:                                  # which takes minutes for a reduction that it doesn't know
            return tl.max(size(x), axis).to(tl.float32, bitcast=True)
        return tl.reduce(tl.abs(x), axis, larger)

    @triton.jit
    def scale_of(amax, POW2: tl.constexpr):
        """The scale of a tile with the largest number amax, NaN if one of them is."""
        scale = tl.maximum(tl.div_rn(amax, 448.0), 1.1754943508222875e-38)
        if POW2:
            scale = (((scale.to(tl.int32, bitcast=True) + 0x7FFFFF) >> 23) << 23).to(tl.float32, bitcast=True)
        return tl.where(amax < float("inf"), scale, float("nan"))

    @triton.jit
    def to_e4m3(x, scale):
        """x / scale in E4M3. A GPU's cast rounds as the reference does; the interpreter's cuts off, so there it gets
        what is already rounded."""
        x = tl.where(scale == scale, x * tl.div_rn(1.0, scale), 0.0)
        if INTERPRETED:
            clamped = tl.minimum(tl.maximum(x, -448.0), 448.0)
            exponent = tl.maximum((size(clamped) >> 23) - 127, -6)
            large = ((exponent - 3 + 127) << 23).to(tl.float32, bitcast=True) * 12582912.0
            sign = x.to(tl.int32, bitcast=True) & -0x80000000
            x = (size((clamped + large) - large) | sign).to(tl.float32, bitcast=True)
        return x.to(tl.float8e4nv)

    @triton.jit
    def norm_kernel(x, weight, r, row, row_scale, M, K, eps, x_stride, row_stride, ROWS: tl.constexpr,
                    POW2: tl.constexpr, TILES: tl.constexpr):
        """1 / rms of a row of x, and (ROWS) what RMSNorm makes of it in 1x128 tiles."""
        m = tl.program_id(0).to(tl.int64)
        tile, k = tl.arange(0, TILES), tl.arange(0, TILES)[:, None] * 128 + tl.arange(0, 128)[None, :]
        value = tl.load(x + m * x_stride + k, mask=k < K, other=0.0).to(tl.float32)                     # [TILES, 128]
        mean = tl.div_rn(tl.sum(tl.sum(value * value, 1), 0), K + 0.0)
        inverse = tl.div_rn(1.0, tl.sqrt_rn(mean + eps))
        tl.store(r + m, inverse)
        if ROWS:
            value = value * inverse * tl.load(weight + k, mask=k < K, other=0.0).to(tl.float32)
            scale = scale_of(largest(value, 1), POW2)
            tl.store(row_scale + tile * M + m, scale, mask=tile * 128 < K)
            tl.store(row + m * row_stride + k, to_e4m3(value, scale[:, None]), mask=k < K)

    @triton.jit
    def quantize_kernel(x, x_scale, weight, r, row, row_scale, column, column_scale, M, K, x_stride, x_scale_m,
                        x_scale_k, row_stride, column_stride, SCALED: tl.constexpr, BEFORE: tl.constexpr,
                        ROWS: tl.constexpr, COLUMNS: tl.constexpr, POW2: tl.constexpr, BLOCK_M: tl.constexpr,
                        APART: tl.constexpr):
        """BLOCK_M x 128 of before(x): read once, written in 1x128 tiles and (BLOCK_M = 128) transposed in 128x1 tiles.

        APART: rows that the threads load at once. Those of a thread come in steps of APART; we let them be neighbours
        in x, so that it holds what lies together in the transpose, and stores words and not single bytes.
        """
        order = tl.arange(0, BLOCK_M)
        order = order % APART * (BLOCK_M // APART) + order // APART if COLUMNS else order
        m = tl.program_id(0).to(tl.int64) * BLOCK_M + order
        k = tl.program_id(1).to(tl.int64) * 128 + tl.arange(0, 128)
        inside = (m < M)[:, None] & (k < K)[None, :]
        x += m[:, None] * x_stride + k[None, :]
        x_scale += m * x_scale_m + tl.program_id(1) * x_scale_k
        tile = tl.load(x, mask=inside, other=0.0).to(tl.float32)
        if SCALED:
            tile *= tl.load(x_scale, mask=m < M, other=0.0)[:, None]
        if BEFORE == "norm":
            tile *= tl.load(r + m, mask=m < M, other=0.0)[:, None]
            tile *= tl.load(weight + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
        if BEFORE == "SwiGLU":
            up = tl.load(x + K, mask=inside, other=0.0).to(tl.float32)
            if SCALED:
                up *= tl.load(x_scale + K // 128 * x_scale_k, mask=m < M, other=0.0)[:, None]
            tile = tile / (1 + tl.exp(-tile)) * up
            if weight is not None:
                tile *= tl.load(weight + m, mask=m < M, other=0.0).to(tl.float32)[:, None]
        if ROWS:
            scale = scale_of(largest(tile, 1), POW2)
            tl.store(row_scale + tl.program_id(1) * M + m, scale, mask=m < M)
            tl.store(row + m[:, None] * row_stride + k[None, :], to_e4m3(tile, scale[:, None]), mask=inside)
        if COLUMNS:
            scale = scale_of(largest(tile, 0), POW2)
            tl.store(column_scale + tl.program_id(0) * K + k, scale, mask=k < K)
            q = to_e4m3(tile, scale[None, :])
            q = tl.trans(q.reshape(BLOCK_M // APART, APART, 128), 2, 1, 0).reshape(128, BLOCK_M)    # in x's own order
            m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
            tl.store(column + k[:, None] * column_stride + m[None, :], q, mask=(k < K)[:, None] & (m < M)[None, :])

    @triton.jit
    def blocks_kernel(w, q, q_scale, M, K, q_stride):
        """One 128x128 block of one of E matrices."""
        i, j, e = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
        m, k = i * 128 + tl.arange(0, 128), j * 128 + tl.arange(0, 128)
        inside = (m < M)[:, None] & (k < K)[None, :]
        block = tl.load(w + e * M * K + m.to(tl.int64)[:, None] * K + k[None, :], mask=inside, other=0.0).to(tl.float32)
        scale = scale_of(largest(largest(block, 1), 0), False)
        tl.store(q_scale + (e * tl.num_programs(0) + i) * tl.num_programs(1) + j, scale)
        tl.store(q + e * M * q_stride + m.to(tl.int64)[:, None] * q_stride + k[None, :], to_e4m3(block, scale),
                 mask=inside)

    @triton.jit
    def transpose_kernel(q, t, M, K, q_matrix, q_stride, t_matrix, t_stride):
        """One 128x128 block of one of E matrices, written the other way round."""
        m, k = tl.program_id(0) * 128 + tl.arange(0, 128), tl.program_id(1) * 128 + tl.arange(0, 128)
        q += tl.program_id(2).to(tl.int64) * q_matrix
        t += tl.program_id(2).to(tl.int64) * t_matrix
        inside = (m < M)[:, None] & (k < K)[None, :]
        block = tl.load(q + m.to(tl.int64)[:, None] * q_stride + k[None, :], mask=inside, other=0.0)
        tl.store(t + k.to(tl.int64)[:, None] * t_stride + m[None, :], block.T, mask=(k < K)[:, None] & (m < M)[None, :])

    @triton.jit
    def gemm_kernel(a, b, y, a_scale, b_scale, M, N, K, y_stride, a_scale_m, a_scale_k, b_scale_m, b_scale_k,
                    BLOCKS: tl.constexpr, ADD: tl.constexpr, BLOCK_M: tl.constexpr, GROUP: tl.constexpr):
        """BLOCK_M x 128 of y, or of what is added to y. A tile of 64 rows leaves room for three programs on a
        multiprocessor: while one scales and adds, the others multiply. GROUP tiles of rows at a time walk over all
        columns, to find B in the cache."""
        rows, columns = tl.cdiv(M, BLOCK_M), tl.cdiv(N, 128)
        group = tl.program_id(0) // (GROUP * columns)
        height = min(rows - group * GROUP, GROUP)
        i = group * GROUP + tl.program_id(0) % (GROUP * columns) % height
        j = tl.program_id(0) % (GROUP * columns) // height
        m, n = i * BLOCK_M + tl.arange(0, BLOCK_M), j * 128 + tl.arange(0, 128)
        total = tl.zeros([BLOCK_M, 128], tl.float32)
        for k in tl.range(0, tl.cdiv(K, 128), num_stages=3):
            dot = tl.dot(a.load([i * BLOCK_M, k * 128]), b.load([j * 128, k * 128]).T)
            s = tl.load(a_scale + m * a_scale_m + k * a_scale_k, mask=m < M, other=0.0)
            if BLOCKS:
                total += dot * (s * tl.load(b_scale + j * b_scale_m + k * b_scale_k))[:, None]
            else:
                t = tl.load(b_scale + n * b_scale_m + k * b_scale_k, mask=n < N, other=0.0)
                total += dot * (s[:, None] * t[None, :])
        inside = (m < M)[:, None] & (n < N)[None, :]
        y += m.to(tl.int64)[:, None] * y_stride + n[None, :]
        if ADD:
            total += tl.load(y, mask=inside, other=0.0)
        tl.store(y, total, mask=inside)

    # The same for Hopper, with the roles handed out: in Gluon, which is Triton with layouts and waits written by hand.
    # One warp does nothing but start loads, into a ring of slots; two or three groups of four warps wait for a slot to
    # be full, multiply 64 rows each, say that it is empty, and add up, while another group multiplies. One program for
    # each multiprocessor takes tile after tile, so that the loads of the next one begin before this one is stored.
    #
    #       load    | a0 b0 | a1 b1 | a2 b2 | ...                full[slot]: its bytes have come
    #       group 0         | dot  | add  | dot  | add  |        empty[slot]: all groups have read it
    #       group 1         |      | dot  | add  | dot  | add

    load_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared        # Triton 3.7 renamed them
    store_tile = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global

    @gluon.jit
    def place(tile, M, N, GROUPS: gl.constexpr):
        """Row and column of a tile of GROUPS * 64 x 128: 2048 rows at a time walk over all columns, for the cache."""
        HEIGHT: gl.constexpr = 2048 // (GROUPS * 64)
        rows, columns = gl.cdiv(M, GROUPS * 64), gl.cdiv(N, 128)
        first = tile // (HEIGHT * columns) * HEIGHT
        height = gl.minimum(rows - first, HEIGHT)
        return first + tile % (HEIGHT * columns) % height, tile % (HEIGHT * columns) // height

    @gluon.jit
    def wide_load(a, b, a_scale, b_scale, a_start, b_start, slots, sizes, strides, BLOCKS: gl.constexpr,
                  GROUPS: gl.constexpr, SLOTS: gl.constexpr):
        a_slots, b_slots, s_slots, t_slots, full, empty = slots
        tiles, M, N, steps = sizes
        a_scale_k, b_scale_n, b_scale_k, y_stride = strides
        turn = 0
        for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
            i, j = place(tile, M, N, GROUPS)
            for k in range(steps):
                slot = turn % SLOTS
                mbarrier.wait(empty.index(slot), turn // SLOTS % 2 ^ 1)                       # the first time at once
                mbarrier.expect(full.index(slot), GROUPS * 64 * 132 + 128 * (128 if BLOCKS else 132))
                for group in gl.static_range(GROUPS):
                    m, to = (i * GROUPS + group) * 64, slot * GROUPS + group
                    load_tile(a, [m, k * 128], full.index(slot), a_slots.index(to))
                    load_tile(a_scale, [a_start + k * a_scale_k + m], full.index(slot), s_slots.index(to))
                load_tile(b, [j * 128, k * 128], full.index(slot), b_slots.index(slot))
                if not BLOCKS:
                    load_tile(b_scale, [b_start + k * b_scale_k + j * 128], full.index(slot), t_slots.index(slot))
                turn += 1

    @gluon.jit
    def wide_multiply(group, y, b_scale, slots, out, sizes, strides, BLOCKS: gl.constexpr, ADD: gl.constexpr,
                      STORED: gl.constexpr, GROUPS: gl.constexpr, SLOTS: gl.constexpr):
        SUM: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])
        a_slots, b_slots, s_slots, t_slots, full, empty = slots
        tiles, M, N, steps = sizes
        a_scale_k, b_scale_n, b_scale_k, y_stride = strides
        zeros = gl.zeros([64, 128], gl.float32, SUM)
        turn = 0
        for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
            i, j = place(tile, M, N, GROUPS)
            total = zeros
            for k in range(steps):
                slot = turn % SLOTS
                if BLOCKS:
                    t = gl.load(b_scale + j * b_scale_n + k * b_scale_k)
                mbarrier.wait(full.index(slot), turn // SLOTS % 2)
                dot = hopper.warpgroup_mma(a_slots.index(slot * GROUPS + group), b_slots.index(slot).permute((1, 0)),
                                           zeros, use_acc=False, is_async=True)
                s = s_slots.index(slot * GROUPS + group).load(gl.SliceLayout(1, SUM))
                if BLOCKS:
                    s *= t
                else:
                    t = t_slots.index(slot).load(gl.SliceLayout(0, SUM))
                dot = hopper.warpgroup_mma_wait(0, [dot])
                mbarrier.arrive(empty.index(slot), count=1)
                if BLOCKS:
                    total += dot * s[:, None]
                else:
                    total += dot * s[:, None] * t[None, :]
                turn += 1
            m, n = (i * GROUPS + group) * 64, j * 128
            if STORED:                                                        # BF16, stored while the next tile begins
                tma.store_wait(0)
                out.index(group).store(total.to(gl.bfloat16))
                hopper.fence_async_shared()
                store_tile(y, [m, n], out.index(group))
            else:
                m, n = m + gl.arange(0, 64, gl.SliceLayout(1, SUM)), n + gl.arange(0, 128, gl.SliceLayout(0, SUM))
                at, inside = y + m.to(gl.int64)[:, None] * y_stride + n[None, :], (m < M)[:, None] & (n < N)[None, :]
                if ADD:                                            # nobody else adds here, so there is one order only
                    gl.atomic_add(at, total, mask=inside, sem="relaxed")
                else:
                    gl.store(at, total.to(y.dtype.element_ty), mask=inside)
        if STORED:
            tma.store_wait(0)

    @gluon.jit
    def wide_kernel(a, b, y, a_scale, b_scale, t_scale, a_start, t_start, tiles, M, N, steps, a_scale_k, b_scale_n,
                    b_scale_k, y_stride, BLOCKS: gl.constexpr, ADD: gl.constexpr, STORED: gl.constexpr,
                    GROUPS: gl.constexpr, SLOTS: gl.constexpr):
        """gemm_kernel in tiles of GROUPS * 64 x 128. a, b, a_scale, t_scale (b's, not BLOCKS) and y (STORED) are
        descriptors."""
        share: gl.constexpr = gl.allocate_shared_memory
        slots = (share(gl.float8e4nv, [SLOTS * GROUPS, 64, 128], a.layout),
                 share(gl.float8e4nv, [SLOTS, 128, 128], b.layout),
                 share(gl.float32, [SLOTS * GROUPS, 64], a_scale.layout),
                 share(gl.float32, [SLOTS, 128], a_scale.layout),
                 share(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout()),
                 share(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout()))
        for slot in gl.static_range(SLOTS):
            mbarrier.init(slots[4].index(slot), count=1)
            mbarrier.init(slots[5].index(slot), count=GROUPS)
        hopper.fence_async_shared()
        out = share(gl.bfloat16, [GROUPS, 64, 128], y.layout) if STORED else slots[0]
        sizes, strides = (tiles, M, N, steps), (a_scale_k, b_scale_n, b_scale_k, y_stride)
        # One warp needs few registers, and groups of 64 x 128 sums many: 240, or 160 if there are three.
        if GROUPS == 2:
            gl.warp_specialize([
                (wide_multiply, (0, y, b_scale, slots, out, sizes, strides, BLOCKS, ADD, STORED, GROUPS, SLOTS)),
                (wide_multiply, (1, y, b_scale, slots, out, sizes, strides, BLOCKS, ADD, STORED, GROUPS, SLOTS)),
                (wide_load, (a, b, a_scale, t_scale, a_start, t_start, slots, sizes, strides, BLOCKS, GROUPS, SLOTS))],
                [4, 1], [240, 24])
        else:
            gl.warp_specialize([
                (wide_multiply, (0, y, b_scale, slots, out, sizes, strides, BLOCKS, ADD, STORED, GROUPS, SLOTS)),
                (wide_multiply, (1, y, b_scale, slots, out, sizes, strides, BLOCKS, ADD, STORED, GROUPS, SLOTS)),
                (wide_multiply, (2, y, b_scale, slots, out, sizes, strides, BLOCKS, ADD, STORED, GROUPS, SLOTS)),
                (wide_load, (a, b, a_scale, t_scale, a_start, t_start, slots, sizes, strides, BLOCKS, GROUPS, SLOTS))],
                [4, 4, 1], [160, 160, 24])

    # Few rows, as in decoding: reading the weight is all there is to do. Its rows become those of the product, of which
    # the tensor cores want 64, y^T = W x^T; where they are too few to keep the GPU busy, K is shared out as well.

    @triton.jit
    def few_kernel(a, b, y, a_scale, b_scale, M, N, steps, share, y_share, y_stride, a_scale_m, a_scale_k, b_scale_n,
                   b_scale_k, BLOCK_M: tl.constexpr, STAGES: tl.constexpr):
        """64 columns of y [M, N], or of one share of the sums."""
        n, m, first = tl.program_id(0) * 64 + tl.arange(0, 64), tl.arange(0, BLOCK_M), tl.program_id(1) * share
        total = tl.zeros([64, BLOCK_M], tl.float32)
        for k in tl.range(first, min(steps, first + share), num_stages=STAGES):
            dot = tl.dot(b.load([tl.program_id(0) * 64, k * 128]), a.load([0, k * 128]).T)
            s = tl.load(a_scale + m * a_scale_m + k * a_scale_k, mask=m < M, other=0.0)
            total += dot * (s * tl.load(b_scale + tl.program_id(0) // 2 * b_scale_n + k * b_scale_k))[None, :]
        y += tl.program_id(1).to(tl.int64) * y_share + m[None, :] * y_stride + n[:, None]
        tl.store(y, total, mask=(m < M)[None, :] & (n < N)[:, None])

    @triton.jit
    def sum_kernel(parts, y, N, size, y_stride, SHARES: tl.constexpr, BLOCK_N: tl.constexpr):
        n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        total = tl.zeros([BLOCK_N], tl.float32)
        for share in tl.static_range(SHARES):
            total += tl.load(parts + share * size + tl.program_id(1) * N + n, mask=n < N, other=0.0)
        tl.store(y + tl.program_id(1) * y_stride + n, total, mask=n < N)


def launch(x, M, K, pow2, rows, columns, before=None, weight=None, r=None):
    """quantize_kernel on before(x), an M x K matrix -> its 1x128 tiles or None, its 128x1 tiles or None."""
    q = x if isinstance(x, Quantized) else None
    x = q.values if q else x if x.stride(1) == 1 else x.contiguous()
    m, k, BLOCK_M = triton.cdiv(M, BLOCK), triton.cdiv(K, BLOCK), BLOCK if columns else 32
    row = Quantized(empty(M, K, device=x.device), tile_scales(M, k, x.device)) if rows else None
    column = Quantized(empty(K, M, device=x.device), tile_scales(K, m, x.device)) if columns else None
    a, b, s = row or column, column or row, q.scale if q else x            # what is not asked for is not written
    APART = 16 // x.element_size()                                         # 128 threads load 16 bytes of a row each
    quantize_kernel[triton.cdiv(M, BLOCK_M), k](
        x, s, weight, r, a.values, a.scale, b.values, b.scale, M, K, x.stride(0), *s.stride(), a.values.stride(0),
        b.values.stride(0), q is not None, before, rows, columns, pow2, BLOCK_M, APART, num_warps=4)
    return row, column


def quantize_triton(x, pow2=False, rows=True, columns=False):
    """x [M, K], plain or Quantized in 1x128 -> (its 1x128 tiles or None, its 128x1 tiles as the transpose or None), in
    one pass over x. The bits are quantize_torch's."""
    return launch(x, *(x.values if isinstance(x, Quantized) else x).shape, pow2, rows, columns)


def swiglu_quantize_triton(h, weight=None, pow2=False, rows=True, columns=False):
    """quantize_triton of swiglu_torch(h, weight), which is never written; h plain or Quantized in 1x128. The bits are
    those of quantize_torch but for the last two of exp."""
    if isinstance(h, Quantized) and h.values.shape[1] % (2 * BLOCK):                       # its halves share a tile
        h = h.dequantize()
    M, K = (h.values if isinstance(h, Quantized) else h).shape
    return launch(h, M, K // 2, pow2, rows, columns, "SwiGLU", weight)


def norm_quantize_triton(x, weight, eps, pow2=False, rows=True, columns=False):
    """quantize_triton of RMSNorm(x) * weight in float32, which is never written: x [M, K] with rows of up to 16384.
    The bits are those of quantize_torch but for the order in which a row's squares are summed."""
    x = x if x.stride(1) == 1 else x.contiguous()
    (M, K), k = x.shape, triton.cdiv(x.shape[1], BLOCK)
    r = torch.empty(M, dtype=torch.float32, device=x.device)
    row = Quantized(empty(M if rows else 0, K, device=x.device), tile_scales(M, k if rows else 0, x.device))
    norm_kernel[M,](x, weight, r, row.values, row.scale, M, K, eps, x.stride(0), row.values.stride(0), rows, pow2,
                    triton.next_power_of_2(k), num_warps=8)
    column = launch(x, M, K, pow2, False, True, "norm", weight, r)[1] if columns else None
    return row if rows else None, column


def blocks_triton(w):
    """w [E, out, in] -> Quantized in 128x128 blocks; the bits are quantize_torch's."""
    (E, M, K), w = w.shape, w.contiguous()
    m, k = triton.cdiv(M, BLOCK), triton.cdiv(K, BLOCK)
    q = Quantized(empty(E, M, K, device=w.device), torch.empty(E, m, k, device=w.device))
    blocks_kernel[m, k, E](w, q.values, q.scale, M, K, q.values.stride(1), num_warps=8)
    return q


def transpose_triton(q):
    """Quantized [E, M, K] in blocks -> its transpose [E, K, M], K-major for Dgrad."""
    E, M, K = q.values.shape
    t = empty(E, K, M, device=q.values.device)
    transpose_kernel[triton.cdiv(M, BLOCK), triton.cdiv(K, BLOCK), E](
        q.values.view(torch.uint8), t.view(torch.uint8), M, K, *q.values.stride()[:2], *t.stride()[:2], num_warps=8)
    return Quantized(t, q.scale.mT)


def descriptor(q, rows):
    return TensorDescriptor(q.values, list(q.values.shape), list(q.values.stride()), [rows, BLOCK])


def gemm_plain(a, b, y, add=False):
    """gemm_torch into y [M, N], or added to it; the operands' rows begin at multiples of 16 bytes (quantize_triton,
    blocks_triton)."""
    (M, K), N, BLOCK_M = a.values.shape, len(b.values), 64
    # One row of b is both a row and a block, and then either reading is right.
    gemm_kernel[triton.cdiv(M, BLOCK_M) * triton.cdiv(N, BLOCK),](
        descriptor(a, BLOCK_M), descriptor(b, BLOCK), y, a.scale, b.scale, M, N, K, y.stride(0), *a.scale.stride(),
        *b.scale.stride(), len(b.scale) < N, add, BLOCK_M, GROUP=16, num_warps=4)
    return y


def gemm_wide(a, b, y, add=False):
    """gemm_plain on Hopper, for scales of 1x128 tiles whose columns begin at multiples of 16 bytes; add: y FP32."""
    (M, N), blocks = y.shape, len(b.scale) < len(b.values)
    programs = backend.multiprocessors(y.device)
    # 192 rows a tile read less than 128 do, about 7% of the time; but the last turn may leave more programs idle.
    turns = {groups: triton.cdiv(triton.cdiv(M, 64 * groups) * triton.cdiv(N, BLOCK), programs) for groups in (2, 3)}
    GROUPS, SLOTS = (3, 4) if blocks and turns[3] * 3 * 0.93 < turns[2] * 2 else (2, 5)
    tiles = triton.cdiv(M, 64 * GROUPS) * triton.cdiv(N, BLOCK)

    def matrix(x, rows, bits):
        layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=bits, rank=2)
        return SharedDescriptor(x, list(x.shape), list(x.stride()), [rows, 128], layout)

    def column(scale, rows):
        """A descriptor of all its columns in a row, from the storage's start, which is aligned where a slice is not."""
        size, layout = scale.untyped_storage().nbytes() // 4, gl.NVMMASharedLayout(0, 32, 1)
        return SharedDescriptor(scale.as_strided((size,), (1,), 0), [size], [1], [rows], layout)

    stored = y.dtype == torch.bfloat16 and y.stride(0) % 8 == 0 and y.data_ptr() % 16 == 0
    wide_kernel[min(programs, tiles),](
        matrix(a.values, 64, 8), matrix(b.values, BLOCK, 8), matrix(y, 64, 16) if stored else y, column(a.scale, 64),
        b.scale, b.scale if blocks else column(b.scale, BLOCK), a.scale.storage_offset(), b.scale.storage_offset(),
        tiles, M, N, a.scale.shape[1], a.scale.stride(1), *b.scale.stride(), y.stride(0), blocks, add, stored, GROUPS,
        SLOTS, num_warps=4)
    return y


FEW = 128                                     # rows, up to which a product is bound by reading the weight


def gemm_few(a, b, y):
    """gemm_plain for up to FEW rows and b in blocks."""
    (M, N), steps = y.shape, a.scale.shape[1]
    BLOCK_M, blocks = max(16, triton.next_power_of_2(M)), triton.cdiv(N, 64)
    shares = max(1, min(2 * backend.multiprocessors(y.device) // blocks, steps // 12))
    parts = y if shares == 1 else torch.empty(shares, M, N, dtype=torch.float32, device=y.device)
    few_kernel[blocks, shares](
        descriptor(a, BLOCK_M), descriptor(b, 64), parts, a.scale, b.scale, M, N, steps, triton.cdiv(steps, shares),
        M * N, parts.stride(-2), *a.scale.stride(), *b.scale.stride(), BLOCK_M, {16: 6, 32: 6, 64: 4, 128: 3}[BLOCK_M])
    if shares > 1:
        sum_kernel[triton.cdiv(N, 1024), M](parts, y, N, M * N, y.stride(0), shares, 1024)
    return y


def gemm_triton(a, b, y, add=False):
    """gemm_torch into y [M, N], or (add, y FP32) added to it, by the kernel that is made for the shape and the GPU."""
    blocks, wide = len(b.scale) < len(b.values), backend.hopper(y.device)
    if len(y) <= FEW and blocks and not add and wide:
        return gemm_few(a, b, y)
    # TMA loads scales from multiples of 16 bytes on. Rows that begin elsewhere, as an expert's may, go the plain way.
    for q in (a,) if blocks else (a, b):
        wide &= q.scale.stride(0) == 1 and q.scale.stride(1) % 4 == 0 and q.scale.storage_offset() % 4 == 0
    return (gemm_wide if wide else gemm_plain)(a, b, y, add)


def takes_cublas(a, b, y):
    """Whether cuBLASLt has the product: on Hopper, of whole tiles, 1x128 x 128x128 in BF16, 1x128 x 1x128 in FP32."""
    (M, K), N = a.values.shape, len(b.values)
    if not backend.hopper(y.device):
        return False
    if len(b.scale) < N:
        return y.dtype == torch.bfloat16 and M > FEW and M % 4 == 0 and K % BLOCK == 0 and N % BLOCK == 0
    return y.dtype == torch.float32 and M % 16 == 0 and N % 16 == 0 and K % BLOCK == 0


def gemm_cublas(a, b, y):
    """gemm_torch into y [M, N] by cuBLASLt, where takes_cublas says so. It wants scales of 1x128 tiles one row of tiles
    after the other, those of blocks along K in multiples of four. In this form, F.scaled_mm's own, it writes to y."""
    def rows(scale):
        scale = scale.t().contiguous().t()
        return scale.as_strided(scale.shape, (1, len(scale)))                # of one column torch keeps any strides

    tile, block, b_scale, k = F.ScalingType.BlockWise1x128, F.ScalingType.BlockWise1x128, b.scale, a.scale.shape[1]
    if len(b.scale) < len(b.values):
        block, b_scale = F.ScalingType.BlockWise128x128, b.scale.new_empty(len(b.scale), -(-k // 4) * 4).t()
        b_scale[:k] = b.scale.t()
    else:
        b_scale = rows(b_scale)
    return torch.ops.aten._scaled_mm_v2.out(a.values, b.values.t(), [rows(a.scale)], [tile.value], [], [b_scale],
                                            [block.value], [], None, y.dtype, out=y)


# --- which one runs ---------------------------------------------------------------------------------------------------

def fast(x, reference):
    return not reference and backend.fp8_kernels(x.device)[0] == "Triton"


def quantize(x, pow2=False, reference=False):
    """x [M, K] -> Quantized in 1x128 tiles."""
    return quantize_triton(x, pow2)[0] if fast(x, reference) else quantize_torch(x, pow2=pow2)


def quantize_columns(x, pow2=False, reference=False):
    """x [M, K], plain or Quantized in 1x128 tiles -> its 128x1 tiles, as the transpose: Quantized [K, M] in 1x128."""
    q = isinstance(x, Quantized)
    if fast(x.values if q else x, reference):
        return quantize_triton(x, pow2, rows=False, columns=True)[1]
    return quantize_torch((x.dequantize() if q else x).mT, pow2=pow2)


def quantize_swiglu(h, gate=None, pow2=False, reference=False):
    """quantize of swiglu_torch(h, gate)."""
    if fast(h, reference):
        return swiglu_quantize_triton(h, gate, pow2)[0]
    return quantize_torch(swiglu_torch(h, gate), pow2=pow2)


def quantize_swiglu_columns(h, gate=None, pow2=False, reference=False):
    """quantize_columns of swiglu_torch(h, gate); h Quantized in 1x128 tiles."""
    if fast(h.values, reference):
        return swiglu_quantize_triton(h, gate, pow2, rows=False, columns=True)[1]
    return quantize_torch(swiglu_torch(h.dequantize(), gate).mT, pow2=pow2)


def quantize_both(x, reference=False):
    """x [M, K] -> (quantize, quantize_columns) of it: what Dgrad and Wgrad need of a gradient."""
    return quantize_triton(x, columns=True) if fast(x, reference) else (quantize_torch(x), quantize_torch(x.mT))


def quantize_blocks(w, reference=False):
    """w [E, out, in] -> Quantized in 128x128 blocks."""
    return blocks_triton(w) if fast(w, reference) else quantize_torch(w, BLOCK)


def transpose(q, reference=False):
    """Quantized [E, out, in] in blocks -> [E, in, out]: W^T for Dgrad. Hopper reads FP8 along the contraction only, so
    the bytes are moved, each time: 2 bytes of traffic per weight and micro-batch, where a copy would be 1 of memory."""
    return transpose_triton(q) if fast(q.values, reference) else q.mT


def gemm(a, b, y, reference=False, add=False):
    """gemm_torch into y [M, N], in y's dtype; add: y + gemm_torch, for a weight's gradient (y FP32).

    On an H100 our kernels run Fprop at 0.5 to 1.14x cuBLASLt's speed at V3's shapes (results/fp8.json): so it goes
    first, where it has the product. To add to a gradient it has not, and most products of few rows are read faster by
    ours.
    """
    if not fast(y, reference):
        product = gemm_torch(a, b, y.dtype)
        return y.add_(product) if add else y.copy_(product)
    return gemm_triton(a, b, y, add) if add or not takes_cublas(a, b, y) else gemm_cublas(a, b, y)


# --- SwiGLU, between the two products of an FFN -----------------------------------------------------------------------

def swiglu_backward_torch(h, dy, gate=None):
    """The gradients of swiglu_torch for h Quantized [R, 2F], dy [R, F] -> (dh [R, 2F], dgate [R] or None), each in its
    tensor's dtype (dh in dy's)."""
    (a, b), g = h.dequantize().chunk(2, -1), dy.to(torch.float32)
    s = a.sigmoid()
    dgate = None if gate is None else (g * a * s * b).sum(1).to(gate.dtype)
    g = g if gate is None else g * gate.to(torch.float32)[:, None]
    return torch.cat([g * b * (s + a * s * (1 - s)), g * a * s], -1).to(dy.dtype), dgate


if backend.has_triton():
    @triton.jit
    def swiglu_backward_kernel(h, h_scale, dy, gate, dh, dgate, R, F, h_stride, h_scale_m, h_scale_k,
                               GATED: tl.constexpr, BLOCK_R: tl.constexpr):
        """BLOCK_R rows: h read in 8 bits, its gradient written, the gate's summed on the way."""
        r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
        total = tl.zeros([BLOCK_R], tl.float32)
        for start in range(0, F, 128):
            f = start + tl.arange(0, 128)
            inside = (r < R)[:, None] & (f < F)[None, :]
            at, scale_at = r[:, None] * h_stride + f[None, :], r[:, None] * h_scale_m
            a = tl.load(h + at, mask=inside, other=0.0).to(tl.float32) \
                * tl.load(h_scale + scale_at + (f // 128)[None, :] * h_scale_k, mask=inside, other=0.0)
            b = tl.load(h + at + F, mask=inside, other=0.0).to(tl.float32) \
                * tl.load(h_scale + scale_at + ((f + F) // 128)[None, :] * h_scale_k, mask=inside, other=0.0)
            g = tl.load(dy + r[:, None] * F + f[None, :], mask=inside, other=0.0).to(tl.float32)
            s = tl.sigmoid(a)
            if GATED:
                total += tl.sum(g * a * s * b, 1)
                g *= tl.load(gate + r, mask=r < R, other=0.0).to(tl.float32)[:, None]
            at = r[:, None] * (2 * F) + f[None, :]
            tl.store(dh + at, g * b * (s + a * s * (1 - s)), mask=inside)
            tl.store(dh + at + F, g * a * s, mask=inside)
        if GATED:
            tl.store(dgate + r, total, mask=r < R)


def swiglu_backward_triton(h, dy, gate=None):
    """swiglu_backward_torch in one pass; dy contiguous."""
    (R, F_), BLOCK_R = dy.shape, 16
    dh, dgate = dy.new_empty(R, 2 * F_), None if gate is None else torch.empty_like(gate)
    swiglu_backward_kernel[triton.cdiv(R, BLOCK_R),](
        h.values, h.scale, dy, dy if gate is None else gate, dh, dy if gate is None else dgate, R, F_,
        h.values.stride(0), *h.scale.stride(), gate is not None, BLOCK_R, num_warps=4)
    return dh, dgate


def swiglu_backward(h, dy, gate=None, reference=False):
    return (swiglu_backward_triton if fast(dy, reference) else swiglu_backward_torch)(h, dy, gate)


# --- what attention's Linear keeps ------------------------------------------------------------------------------------

if backend.has_triton():
    @triton.jit
    def e5m6_kernel(x, q, q_scale, M, K, x_stride, BLOCK_M: tl.constexpr):
        m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        k = tl.program_id(1) * 128 + tl.arange(0, 128)
        inside = (m < M)[:, None] & (k < K)[None, :]
        tile = tl.load(x + m[:, None] * x_stride + k[None, :], mask=inside, other=0.0).to(tl.float32)
        amax = largest(tile, 1)
        scale = tl.maximum(tl.div_rn(amax, 65024.0), 1.1754943508222875e-38)
        scale = (((scale.to(tl.int32, bitcast=True) + 0x7FFFFF) >> 23) << 23).to(tl.float32, bitcast=True)
        good = amax < float("inf")
        tile = tl.where(good[:, None], tile * tl.div_rn(1.0, scale)[:, None], 0.0)
        exponent = tl.maximum((size(tile) >> 23) - 127, -14)
        large = ((exponent - 6 + 127) << 23).to(tl.float32, bitcast=True) * 12582912.0
        tile = size((tile + large) - large) | (tile.to(tl.int32, bitcast=True) & -0x80000000)
        tl.store(q + m[:, None] * K + k[None, :], tile.to(tl.float32, bitcast=True).to(tl.float16), mask=inside)
        tl.store(q_scale + tl.program_id(1) * M + m, tl.where(good, scale, float("nan")), mask=m < M)


def e5m6_triton(x):
    """quantize_torch(x, fmt=E5M6, pow2=True) of x [M, K] in one pass, bit for bit."""
    x = x if x.stride(1) == 1 else x.contiguous()
    (M, K), k = x.shape, triton.cdiv(x.shape[1], BLOCK)
    q = Quantized(torch.empty(M, K, dtype=torch.float16, device=x.device), torch.empty(k, M, device=x.device).t())
    e5m6_kernel[triton.cdiv(M, 32), k](x, q.values, q.scale, M, K, x.stride(0), 32)
    return q


def e5m6(x, reference=False):
    return e5m6_triton(x) if fast(x, reference) else quantize_torch(x, fmt=E5M6, pow2=True)


# --- Fprop, Dgrad, Wgrad ----------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Recipe:
    """How a Linear, or a stack of experts, runs in FP8."""
    kept: Format = E4M3                       # in which its input waits for Wgrad
    reference: bool = False                   # plain torch, also where the device has FP8

    @property
    def pow2(self):
        return self.kept is E5M6


def quantized(weight, reference):
    """quantize_blocks of a parameter [out, in] or [E, out, in], as a stack, made once per optimizer step: it stays with
    the parameter until somebody writes to that."""
    key = weight._version, weight.data_ptr(), reference
    if getattr(weight, "fp8", (None,))[0] != key:
        weight.fp8 = key, quantize_blocks(weight.detach().view(-1, *weight.shape[-2:]), reference)
    return weight.fp8[1]


def busy(ends):
    """(expert, its rows) of each expert that has rows; ends: for each expert the end of its rows."""
    return [(e, slice(start, end)) for e, (start, end) in enumerate(zip([0, *ends], ends)) if end > start]


def weight_gradient(weight, compute, adds=False):
    """compute(), the gradient of a parameter, for its autograd function to return; or None where the parameter has a
    `queue`: then a closure that computes it and adds it to weight.grad goes there.

    adds: compute(grad) adds to a gradient that is there, in FP32 and inside the product. That is only for a queue. What
    autograd asks for may end in .grad, or be what torch.autograd.grad returns, or have to pass a hook first: it can't
    tell us which, so it gets a tensor of its own. That costs nothing where there is no gradient yet (it becomes
    .grad), and a pass over memory where there is: who accumulates over micro-batches attaches a queue (see AtOnce).
    """
    queue = getattr(weight, "queue", None)
    if queue is None:
        return compute()

    def later():
        if weight.grad is None:
            weight.grad = compute()
        elif adds:
            compute(weight.grad)
        else:
            weight.grad.add_(compute())

    queue.append(later)


class AtOnce:
    """A queue that puts nothing off: for parameters whose gradient only ever goes to .grad by backward()."""

    def append(self, closure):
        closure()


class Products(torch.autograd.Function):
    """y_r = W_e x_r for the rows r of expert e (figure 6), rows sorted by expert.

    x [R, in], weight float32 [E, out, in], or [out, in] for one expert with all the rows, ends: for each expert the
    end of its rows -> [R, out] in x's dtype. swiglu: x is [R, 2 in], and its SwiGLU, times the rows' gate weights [R]
    if they are given, is multiplied; x is what is kept, and the SwiGLU made again in backward.
    """

    @staticmethod
    def forward(ctx, x, weight, ends, recipe, swiglu=False, gate=None):
        a = quantize_swiglu(x, gate, recipe.pow2, recipe.reference) if swiglu else \
            quantize(x, recipe.pow2, recipe.reference)
        w, y = quantized(weight, recipe.reference), x.new_empty(len(x), weight.shape[-2])
        for e, rows in busy(ends):
            gemm(a[rows], w[e], y[rows], recipe.reference)
        if any(ctx.needs_input_grad):
            if recipe.kept is not E4M3:
                a = e5m6(x, recipe.reference)
            elif swiglu:
                a = quantize(x, recipe.pow2, recipe.reference)
            ctx.save_for_backward(a.values, a.scale, gate)
            # The W of this forward pass, and the parameter itself, on which a queue may hang.
            ctx.w, ctx.weight, ctx.ends, ctx.recipe, ctx.swiglu = w, weight, ends, recipe, swiglu
        return y

    @staticmethod
    def backward(ctx, dy):
        values, scale, gate = ctx.saved_tensors
        weight, ends, recipe, swiglu, dgate = ctx.weight, ctx.ends, ctx.recipe, ctx.swiglu, None
        x, dy_columns, dx = Quantized(values, scale), {}, dy.new_empty(len(dy), weight.shape[-1])
        w = transpose(ctx.w, recipe.reference)
        for e, rows in busy(ends):
            dy8, dy_columns[e] = quantize_both(dy[rows], recipe.reference)
            gemm(dy8, w[e], dx[rows], recipe.reference)
        del w                                                                         # before Wgrad asks for its memory
        if swiglu:
            dx, dgate = swiglu_backward(x, dx, gate, recipe.reference)
        dw = lambda grad=None: wgrad(weight, dy_columns, x, ends, recipe, swiglu, gate, grad)
        return dx, weight_gradient(weight, dw, adds=True), None, None, None, dgate


def wgrad(weight, dy_columns, x, ends, recipe, swiglu=False, gate=None, grad=None):
    """Wgrad, dW_e = dy_e^T a_e: dy_columns {busy expert: Quantized [out, its rows]}, x Quantized, in 1x128 tiles, is a,
    or what its SwiGLU is made of -> float32, of the weight's shape, added to `grad` if that is given."""
    add = grad is not None
    if not add:                                                     # zero for an idle expert, written for the others
        grad = (torch.empty_like if len(dy_columns) == len(ends) else torch.zeros_like)(weight)
    stack = grad.view(-1, *weight.shape[-2:])
    for e, rows in busy(ends):
        own = None if gate is None else gate[rows]
        columns = quantize_swiglu_columns(x[rows], own, recipe.pow2, recipe.reference) \
            if swiglu else quantize_columns(x[rows], recipe.pow2, recipe.reference)           # [in, its rows]
        gemm(dy_columns[e], columns, stack[e], recipe.reference, add)
    return grad


# --- the product in high precision ------------------------------------------------------------------------------------

def linear_torch(x, weight, dtype=None):
    """x W^T in `dtype` (None: x's): x [..., in], weight [out, in] -> [..., out]."""
    dtype = dtype or x.dtype
    return F.linear(x.to(dtype), weight.to(dtype))


class Product(torch.autograd.Function):
    """linear_torch in x's dtype, with a Wgrad that can be put off."""

    @staticmethod
    def forward(ctx, x, weight):
        w = weight.to(x.dtype)
        ctx.save_for_backward(x, w)
        ctx.weight = weight                                              # the parameter itself: the queue hangs on it
        return F.linear(x, w)

    @staticmethod
    def backward(ctx, dy):
        (x, w), weight = ctx.saved_tensors, ctx.weight
        dx = dy @ w if ctx.needs_input_grad[0] else None
        wgrad = lambda: (dy.flatten(0, -2).t() @ x.flatten(0, -2)).to(weight.dtype)
        return dx, weight_gradient(weight, wgrad) if ctx.needs_input_grad[1] else None


if backend.has_triton():
    @triton.jit
    def linear_kernel(x, w, y, N, OUT, IN: tl.constexpr, ROWS: tl.constexpr, BLOCK_O: tl.constexpr,
                      BLOCK_I: tl.constexpr):
        """BLOCK_O outputs of ROWS rows. The threads keep their own sums until the loop has ended."""
        n, o = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
        total = tl.zeros([ROWS, BLOCK_O, BLOCK_I], tl.float32)
        for start in range(0, IN, BLOCK_I):
            i = start + tl.arange(0, BLOCK_I)
            weight = tl.load(w + o.to(tl.int64)[:, None] * IN + i[None, :],
                             mask=(o < OUT)[:, None] & (i < IN)[None, :], other=0.0).to(tl.float32)
            rows = tl.load(x + n[:, None] * IN + i[None, :],
                           mask=(n < N)[:, None] & (i < IN)[None, :], other=0.0).to(tl.float32)
            total += rows[:, None, :] * weight[None, :, :]
        tl.store(y + n[:, None] * OUT + o[None, :], tl.sum(total, 2), mask=(n < N)[:, None] & (o < OUT)[None, :])


def linear_triton(x, weight, dtype=None):
    """linear_torch for few rows, which only wait for the weight to be read; summed in float32, without gradients.

    Up to 4 rows read it once; more read it again from the GPU's own cache, in which a small one (the gate's) stays.
    """
    (OUT, IN), power = weight.shape, triton.next_power_of_2
    N = x.numel() // IN
    y = x.new_empty(*x.shape[:-1], OUT, dtype=dtype or x.dtype)
    ROWS, BLOCK_O = min(4, power(N)), 4
    linear_kernel[triton.cdiv(OUT, BLOCK_O), triton.cdiv(N, ROWS)](
        x.contiguous(), weight, y, N, OUT, IN, ROWS, BLOCK_O, BLOCK_I=min(1024, power(IN)), num_warps=4)
    return y


MAX_ROWS = 2                                  # on an H100; from 4 rows cuBLAS reads the head faster


def linear(x, weight):
    """x W^T in x's dtype: with gradients Product, without them linear_torch, or for up to MAX_ROWS rows on a GPU
    linear_triton: 2-5 microseconds for a layer's product where cuBLAS takes 4-6."""
    if torch.is_grad_enabled():
        return Product.apply(x, weight)
    return (linear_triton if backend.use_decode_kernels(x, MAX_ROWS) else linear_torch)(x, weight)


class SwiGLU(torch.autograd.Function):
    """silu(a) * b for h = [a, b], in h's dtype: [N, 2F] -> [N, F]. By hand because autograd would keep silu(a), and pad
    and add the gradients of the two halves: four passes over memory for nothing."""

    @staticmethod
    def forward(ctx, h):
        ctx.save_for_backward(h)
        a, b = h.chunk(2, -1)
        return F.silu(a).mul_(b)

    @staticmethod
    def backward(ctx, grad):
        (h,) = ctx.saved_tensors
        a, b = h.chunk(2, -1)
        dh = torch.empty_like(h)
        da, db = dh.chunk(2, -1)
        torch.mul(grad, F.silu(a), out=db)
        torch.ops.aten.silu_backward.grad_input(grad * b, a, grad_input=da)
        return dh


# --- Linear -----------------------------------------------------------------------------------------------------------

class Linear(nn.Module):
    """y = x W^T without bias: [..., in_features] -> [..., out_features], in x's dtype.

    The one matrix product with a weight that every layer goes through. The weight is FP32, the optimizer's master; the
    product runs in the dtype of the activations that come in, or with a Recipe in FP8. swiglu: x is [..., 2 in], of
    which the SwiGLU is multiplied; it belongs to the Linear so that FP8 can keep its input and make its output again.
    """

    def __init__(self, in_features, out_features):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.recipe = None                    # a Recipe: FP8

    def forward(self, x, swiglu=False):
        if not self.recipe:
            return linear(SwiGLU.apply(x) if swiglu else x, self.weight)
        rows = x.flatten(0, -2)                                                               # [N, ...]
        y = Products.apply(rows, self.weight, [len(rows)], self.recipe, swiglu)
        return y.unflatten(0, x.shape[:-1])


HIGH = {                                      # ends of names that stay in high precision (3.3.1), and why
    "embed": "a lookup and no product", "norm": "a vector, no product", "gate": "near ties choose the experts",
    "head": "the report keeps it", "eh_proj": "BF16 in the released checkpoint"}


def convert(model, reference=False):
    """Give every Linear and every stack of experts of `model` its Recipe, except those that HIGH names.

    reference: plain torch, also where the device has FP8. Returns ([names converted], {name left: why}).
    """
    converted, left = [], {}
    for name, module in model.named_modules():
        why = next((why for end, why in HIGH.items() if name.endswith(end)), None)
        if why and next(module.parameters(recurse=False), None) is not None:
            left[name] = why
        elif hasattr(module, "recipe"):
            # The Linear after attention: attention's backward keeps the same tensor.
            module.recipe = Recipe(E5M6 if name.endswith("wo") else E4M3, reference)
            converted.append(name)
    return converted, left


# --- the optimizer's states -------------------------------------------------------------------------------------------

def adamw_torch(p, grad, m, v, beta1, beta2, eps, decay, rate, root):
    """One step of AdamW, in place: weight p and gradient float32, moments m and v of any dtype, all of one shape.

    decay = 1 - lr * weight decay, rate = lr / (1 - beta1^t), root = sqrt(1 - beta2^t).
    """
    mean = m.to(p.dtype).lerp_(grad, 1 - beta1)
    square = v.to(p.dtype).lerp_(grad * grad, 1 - beta2)
    m.copy_(mean)
    v.copy_(square)
    p.mul_(decay).addcdiv_(mean, square.sqrt().div_(root).add_(eps), value=-rate)


if backend.has_triton():
    @triton.jit
    def adamw_kernel(p, grad, m, v, n, some1, some2, eps, decay, rate, root, BLOCK: tl.constexpr):
        i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        g = tl.load(grad + i, mask=i < n, other=0.0)
        mean, square = tl.load(m + i, mask=i < n, other=0.0).to(tl.float32), tl.load(v + i, mask=i < n, other=0.0)
        mean += (g - mean) * some1
        square = square.to(tl.float32)
        square += (g * g - square) * some2
        tl.store(m + i, mean, mask=i < n)
        tl.store(v + i, square, mask=i < n)
        weight = tl.load(p + i, mask=i < n, other=0.0) * decay
        tl.store(p + i, weight - rate * tl.div_rn(mean, tl.div_rn(tl.sqrt_rn(square), root) + eps), mask=i < n)


def adamw_triton(p, grad, m, v, beta1, beta2, eps, decay, rate, root):
    """adamw_torch in one pass over memory: 20 bytes a parameter with BF16 moments, 28 with FP32 ones."""
    n, BLOCK = p.numel(), 1024
    adamw_kernel[triton.cdiv(n, BLOCK),](p, grad, m, v, n, 1 - beta1, 1 - beta2, eps, decay, rate, root, BLOCK)
    torch.autograd.graph.increment_version(p)            # a kernel doesn't say that it wrote, and `quantized` must know


class AdamW(torch.optim.Optimizer):
    """AdamW with FP32 weights and moments of any dtype, BF16 in V3 (3.3.3): 2 + 2 bytes of moments per parameter.

    The arithmetic is FP32; only what waits for the next step is rounded. With beta2 = 0.95 a moment changes by up to 5%
    a step, far more than BF16's rounding of 0.4%; with the common 0.999 the second one would stop moving.
    """

    def __init__(self, params, lr, betas, eps, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr, (beta1, beta2) = group["lr"], group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                state["step"] += 1
                t = float(state["step"])
                tensors = p, p.grad, state["exp_avg"], state["exp_avg_sq"]
                one_pass = backend.use_small_kernels(p) and all(t.is_contiguous() for t in tensors)
                (adamw_triton if one_pass else adamw_torch)(
                    *tensors, beta1, beta2, group["eps"], 1 - lr * group["weight_decay"], lr / (1 - beta1 ** t),
                    (1 - beta2 ** t) ** 0.5)
