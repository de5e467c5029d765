"""Numbers in FP8: formats, tiles with a scale each, and how a tensor is cut into them (section 3.3.2).

quantize_torch says what every kernel here gives, bit for bit. The kernels make one pass over memory: they read a tensor
once and write its 1x128 tiles, its 128x1 tiles as the transpose, or both; and a SwiGLU before the quantization (or an
RMSNorm, which no layer here asks for) is computed on the way. fp8.py tells what the tiles are for.

Shapes: M rows, K columns, the numbers along K sharing scales; m = ceil(M/128), k = ceil(K/128).
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import backend

if backend.has_triton():
    import triton
    import triton.language as tl
    from triton.language.extra import libdevice

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


def block_scales(E, m, k, device):
    """float32 [E, m, k] whose rows begin at multiples of 16 bytes: so cuBLASLt wants them."""
    return torch.empty(E, m, -(-k // 4) * 4, dtype=torch.float32, device=device)[..., :k]


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

    # A division is twenty instructions, and every thread divides for all rows and columns that it holds numbers of.
    # These two are as exact: the quotient corrected by what it leaves over, and the GPU's own reciprocal. (Below LEAST,
    # where the first is not, the scale is LEAST.)

    @triton.jit
    def over(x, LARGEST: tl.constexpr):
        """x / LARGEST, 448 or 65024."""
        if INTERPRETED:
            return tl.div_rn(x, LARGEST)
        quotient = x * (1 / LARGEST)
        return tl.fma(tl.fma(-quotient, LARGEST, x), 1 / LARGEST, quotient)

    @triton.jit
    def one_over(x):
        return tl.div_rn(1.0, x) if INTERPRETED else libdevice.rcp_rn(x)

    @triton.jit
    def sigmoid(x):
        """By the GPU's own exp2 and quotient, without what a division and exp do for the ends of their ranges."""
        if INTERPRETED:
            return tl.sigmoid(x)
        return libdevice.fast_dividef(1.0, 1.0 + tl.exp2(-1.4426950408889634 * x))

    @triton.jit
    def scale_of(amax, POW2: tl.constexpr, LARGEST: tl.constexpr = 448.0):
        """The scale of a tile with the largest number amax, NaN if one of them is."""
        scale = tl.maximum(over(amax, LARGEST), 1.1754943508222875e-38)
        if POW2:
            scale = (((scale.to(tl.int32, bitcast=True) + 0x7FFFFF) >> 23) << 23).to(tl.float32, bitcast=True)
        return tl.where(amax < float("inf"), scale, float("nan"))

    @triton.jit
    def to_e4m3(x, scale):
        """x / scale in E4M3. A GPU's cast rounds as the reference does; the interpreter's cuts off, so there it gets
        what is already rounded."""
        x = tl.where(scale == scale, x * one_over(scale), 0.0)
        if INTERPRETED:
            clamped = tl.minimum(tl.maximum(x, -448.0), 448.0)
            exponent = tl.maximum((size(clamped) >> 23) - 127, -6)
            large = ((exponent - 3 + 127) << 23).to(tl.float32, bitcast=True) * 12582912.0
            sign = x.to(tl.int32, bitcast=True) & -0x80000000
            x = (size((clamped + large) - large) | sign).to(tl.float32, bitcast=True)
        return x.to(tl.float8e4nv)

    @triton.jit
    def through_e5m6(tile):
        """What is left of a tile [rows, 128] rounded to E5M6, NaN in a row that has one."""
        scale = scale_of(largest(tile, 1), True, 65024.0)[:, None]
        scaled = tile * one_over(scale)
        exponent = tl.maximum((size(scaled) >> 23) - 127, -14)
        large = ((exponent - 6 + 127) << 23).to(tl.float32, bitcast=True) * 12582912.0
        rounded = size((scaled + large) - large) | (tile.to(tl.int32, bitcast=True) & -0x80000000)
        return rounded.to(tl.float32, bitcast=True) * scale

    # A tile that is read row by row and written column by column: a thread holds some columns of rows that come in
    # steps of APART, as many as all threads load at once. If these are neighbours in x, it holds what lies together in
    # the transpose, and moves words and not single bytes.

    @triton.jit
    def neighbours(ROWS: tl.constexpr, APART: tl.constexpr):
        """Which row of x stands in each of ROWS rows of a tile."""
        order = tl.arange(0, ROWS)
        return order % APART * (ROWS // APART) + order // APART

    @triton.jit
    def turned(tile, ROWS: tl.constexpr, APART: tl.constexpr):
        """The transpose of a tile whose rows stand as `neighbours` says, in x's own order."""
        tile = tile.reshape(ROWS // APART, APART, tile.shape[1])
        return tl.trans(tile, 2, 1, 0).reshape(tile.shape[2], ROWS)

    @triton.jit
    def tile_at(ROWS, COLUMNS, DOWN: tl.constexpr):
        """(row, column) of this program's tile, of ROWS x COLUMNS: one column after the other if DOWN."""
        if DOWN:
            return tl.program_id(0) % ROWS, tl.program_id(0) // ROWS
        return tl.program_id(0) // COLUMNS, tl.program_id(0) % COLUMNS

    @triton.jit
    def norm_kernel(x, weight, r, row, row_scale, M, K, eps, x_stride, row_stride, ROWS: tl.constexpr,
                    TILES: tl.constexpr):
        """1 / rms of a row of x, and (ROWS) what RMSNorm makes of it in 1x128 tiles."""
        m = tl.program_id(0).to(tl.int64)
        tile, k = tl.arange(0, TILES), tl.arange(0, TILES)[:, None] * 128 + tl.arange(0, 128)[None, :]
        value = tl.load(x + m * x_stride + k, mask=k < K, other=0.0).to(tl.float32)                     # [TILES, 128]
        mean = tl.div_rn(tl.sum(tl.sum(value * value, 1), 0), K + 0.0)
        inverse = tl.div_rn(1.0, tl.sqrt_rn(mean + eps))
        tl.store(r + m, inverse)
        if ROWS:
            value = value * inverse * tl.load(weight + k, mask=k < K, other=0.0).to(tl.float32)
            scale = scale_of(largest(value, 1), False)
            tl.store(row_scale + tile * M + m, scale, mask=tile * 128 < K)
            tl.store(row + m * row_stride + k, to_e4m3(value, scale[:, None]), mask=k < K)

    @triton.jit
    def quantize_kernel(x, x_scale, weight, r, row, row_scale, column, column_scale, M, K, x_stride, x_scale_m,
                        x_scale_k, row_stride, column_stride, SCALED: tl.constexpr, BEFORE: tl.constexpr,
                        ROWS: tl.constexpr, COLUMNS: tl.constexpr, POW2: tl.constexpr, BLOCK_M: tl.constexpr,
                        BLOCK_K: tl.constexpr, APART: tl.constexpr):
        """BLOCK_M x BLOCK_K of before(x): read once, written in 1x128 tiles (BLOCK_K = 128) and (BLOCK_M = 128)
        transposed in 128x1. Programs that run together write along the rows, of x or of its transpose."""
        i, j = tile_at(tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_K), COLUMNS)
        order = neighbours(BLOCK_M, APART) if COLUMNS else tl.arange(0, BLOCK_M)
        m, k = i.to(tl.int64) * BLOCK_M + order, j.to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
        inside = (m < M)[:, None] & (k < K)[None, :]
        x += m[:, None] * x_stride + k[None, :]
        x_scale += m * x_scale_m + j * BLOCK_K // 128 * x_scale_k
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
            tile = tile * sigmoid(tile) * up
            if weight is not None:
                tile *= tl.load(weight + m, mask=m < M, other=0.0).to(tl.float32)[:, None]
        if BEFORE == "E5M6":
            tile = through_e5m6(tile)
        if ROWS:
            scale = scale_of(largest(tile, 1), POW2)
            tl.store(row_scale + j * M + m, scale, mask=m < M)
            tl.store(row + m[:, None] * row_stride + k[None, :], to_e4m3(tile, scale[:, None]), mask=inside)
        if COLUMNS:
            scale = scale_of(largest(tile, 0), POW2)
            tl.store(column_scale + i * K + k, scale, mask=k < K)
            q = turned(to_e4m3(tile, scale[None, :]), BLOCK_M, APART)
            m = i.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
            tl.store(column + k[:, None] * column_stride + m[None, :], q, mask=(k < K)[:, None] & (m < M)[None, :])

    @triton.jit
    def blocks_kernel(w, q, q_scale, M, K, q_stride, scale_stride):
        """One 128x128 block of one of E matrices."""
        i, j, e = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
        m, k = i * 128 + tl.arange(0, 128), j * 128 + tl.arange(0, 128)
        inside = (m < M)[:, None] & (k < K)[None, :]
        block = tl.load(w + e * M * K + m.to(tl.int64)[:, None] * K + k[None, :], mask=inside, other=0.0).to(tl.float32)
        scale = scale_of(largest(largest(block, 1), 0), False)
        tl.store(q_scale + (e * tl.num_programs(0) + i) * scale_stride + j, scale)
        tl.store(q + e * M * q_stride + m.to(tl.int64)[:, None] * q_stride + k[None, :], to_e4m3(block, scale),
                 mask=inside)

    @triton.jit
    def transpose_kernel(q, t, q_scale, t_scale, M, K, q_matrix, q_stride, t_matrix, t_stride, q_scale_stride,
                         t_scale_stride):
        """One 128x128 block of one of E matrices, written the other way round."""
        i, j, e = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
        m, k = i * 128 + tl.arange(0, 128), j * 128 + tl.arange(0, 128)
        scale = tl.load(q_scale + (e * tl.num_programs(0) + i) * q_scale_stride + j)
        tl.store(t_scale + (e * tl.num_programs(1) + j) * t_scale_stride + i, scale)
        q += e * q_matrix
        t += e * t_matrix
        inside = (m < M)[:, None] & (k < K)[None, :]
        block = tl.load(q + m.to(tl.int64)[:, None] * q_stride + k[None, :], mask=inside, other=0.0)
        tl.store(t + k.to(tl.int64)[:, None] * t_stride + m[None, :], block.T, mask=(k < K)[:, None] & (m < M)[None, :])


def launch(x, M, K, rows, columns, pow2=False, before=None, weight=None, r=None):
    """quantize_kernel on before(x), an M x K matrix -> its 1x128 tiles or None, its 128x1 tiles or None."""
    q = x if isinstance(x, Quantized) else None
    x = q.values if q else x if x.stride(1) == 1 else x.contiguous()
    m, k = triton.cdiv(M, BLOCK), triton.cdiv(K, BLOCK)
    # Smaller tiles, where no scale wants whole ones: more programs on a multiprocessor.
    BLOCK_M, BLOCK_K = BLOCK if columns else 32, BLOCK if rows or before == "E5M6" else 64
    row = Quantized(empty(M, K, device=x.device), tile_scales(M, k, x.device)) if rows else None
    column = Quantized(empty(K, M, device=x.device), tile_scales(K, m, x.device)) if columns else None
    a, b, s = row or column, column or row, q.scale if q else x            # what is not asked for is not written
    APART = 128 * 16 // (BLOCK_K * x.element_size())                       # 128 threads load 16 bytes of a row each
    quantize_kernel[triton.cdiv(M, BLOCK_M) * triton.cdiv(K, BLOCK_K),](
        x, s, weight, r, a.values, a.scale, b.values, b.scale, M, K, x.stride(0), *s.stride(), a.values.stride(0),
        b.values.stride(0), q is not None, before, rows, columns, pow2, BLOCK_M, BLOCK_K, APART, num_warps=4)
    return row, column


def quantize_triton(x, pow2=False, rows=True, columns=False):
    """x [M, K], plain or Quantized in 1x128 -> (its 1x128 tiles or None, its 128x1 tiles as the transpose or None), in
    one pass over x. The bits are quantize_torch's."""
    return launch(x, *(x.values if isinstance(x, Quantized) else x).shape, rows, columns, pow2)


def swiglu_quantize_triton(h, weight=None, rows=True, columns=False):
    """quantize_triton of swiglu_torch(h, weight), which is never written; h plain or Quantized in 1x128. The bits are
    those of quantize_torch but for the last two of exp."""
    if isinstance(h, Quantized) and h.values.shape[1] % (2 * BLOCK):                       # its halves share a tile
        h = h.dequantize()
    M, K = (h.values if isinstance(h, Quantized) else h).shape
    return launch(h, M, K // 2, rows, columns, before="SwiGLU", weight=weight)


def norm_quantize_triton(x, weight, eps, rows=True, columns=False):
    """quantize_triton of RMSNorm(x) * weight in float32, which is never written: x [M, K] with rows of up to 16384.
    The bits are those of quantize_torch but for the order in which a row's squares are summed."""
    x = x if x.stride(1) == 1 else x.contiguous()
    (M, K), k = x.shape, triton.cdiv(x.shape[1], BLOCK)
    r = torch.empty(M, dtype=torch.float32, device=x.device)
    row = Quantized(empty(M if rows else 0, K, device=x.device), tile_scales(M, k if rows else 0, x.device))
    norm_kernel[M,](x, weight, r, row.values, row.scale, M, K, eps, x.stride(0), row.values.stride(0), rows,
                    triton.next_power_of_2(k), num_warps=8)
    column = launch(x, M, K, False, True, before="norm", weight=weight, r=r)[1] if columns else None
    return row if rows else None, column


def blocks_triton(w):
    """w [E, out, in] -> Quantized in 128x128 blocks; the bits are quantize_torch's."""
    (E, M, K), w = w.shape, w.contiguous()
    m, k = triton.cdiv(M, BLOCK), triton.cdiv(K, BLOCK)
    q = Quantized(empty(E, M, K, device=w.device), block_scales(E, m, k, w.device))
    blocks_kernel[m, k, E](w, q.values, q.scale, M, K, q.values.stride(1), q.scale.stride(1), num_warps=8)
    return q


def transpose_triton(q):
    """Quantized [E, M, K] in blocks (blocks_triton's) -> its transpose [E, K, M], K-major for Dgrad."""
    (E, M, K), device = q.values.shape, q.values.device
    m, k = triton.cdiv(M, BLOCK), triton.cdiv(K, BLOCK)
    t = Quantized(empty(E, K, M, device=device), block_scales(E, k, m, device))
    transpose_kernel[m, k, E](q.values.view(torch.uint8), t.values.view(torch.uint8), q.scale, t.scale, M, K,
                              *q.values.stride()[:2], *t.values.stride()[:2], q.scale.stride(1), t.scale.stride(1),
                              num_warps=8)
    return t


# --- which one runs ---------------------------------------------------------------------------------------------------

def fast(x, reference):
    return not reference and backend.fp8_kernels(x.device)[0] == "Triton"


def quantize(x, pow2=False, reference=False):
    """x [M, K] -> Quantized in 1x128 tiles."""
    return quantize_triton(x, pow2)[0] if fast(x, reference) else quantize_torch(x, pow2=pow2)


def quantize_columns(x, kept=E4M3, pow2=False, reference=False):
    """x [M, K] as it was kept, Quantized in 1x128 tiles, or plain and now rounded to E5M6 in such tiles -> its 128x1
    tiles, as the transpose: Quantized [K, M] in 1x128."""
    if kept is E4M3:
        if fast(x.values, reference):
            return quantize_triton(x, pow2, rows=False, columns=True)[1]
        return quantize_torch(x.dequantize().mT, pow2=pow2)
    if fast(x, reference):
        return launch(x, *x.shape, rows=False, columns=True, pow2=True, before="E5M6")[1]
    return quantize_torch(quantize_torch(x, fmt=E5M6, pow2=True).dequantize().mT, pow2=True)


def quantize_swiglu(h, gate=None, reference=False):
    """quantize of swiglu_torch(h, gate)."""
    return swiglu_quantize_triton(h, gate)[0] if fast(h, reference) else quantize_torch(swiglu_torch(h, gate))


def quantize_swiglu_columns(h, gate=None, reference=False):
    """quantize_columns of swiglu_torch(h, gate); h Quantized in 1x128 tiles."""
    if fast(h.values, reference):
        return swiglu_quantize_triton(h, gate, rows=False, columns=True)[1]
    return quantize_torch(swiglu_torch(h.dequantize(), gate).mT)


def quantize_both(x, pow2=False, reference=False):
    """x [M, K] -> (quantize, quantize_columns) of it: what Dgrad and Wgrad need of a gradient."""
    if fast(x, reference):
        return quantize_triton(x, pow2, columns=True)
    return quantize_torch(x, pow2=pow2), quantize_torch(x.mT, pow2=pow2)


def quantize_blocks(w, reference=False):
    """w [E, out, in] -> Quantized in 128x128 blocks."""
    return blocks_triton(w) if fast(w, reference) else quantize_torch(w, BLOCK)


def transpose(q, reference=False):
    """Quantized [E, out, in] in blocks -> [E, in, out]: W^T for Dgrad. Hopper reads FP8 along the contraction only, so
    the bytes are moved, each time: 2 bytes of traffic per weight and micro-batch, where a copy would be 1 of memory."""
    return transpose_triton(q) if fast(q.values, reference) else q.mT


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
            s = sigmoid(a)
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
