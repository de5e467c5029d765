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
    Dgrad   dx = dy W       dy in 1x128 along out     W^T in 128x128: the same bytes, read the other way
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


if backend.has_triton():
    INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

    @triton.jit
    def size(x):
        """|x| as an integer, in the same order: NaN is above infinity, and that above all numbers."""
        return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF

    @triton.jit
    def scale_of(largest, POW2: tl.constexpr):
        """The scale of a tile; largest: the size of its largest number."""
        amax = largest.to(tl.float32, bitcast=True)
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
            scale = scale_of(tl.max(size(value), 1), POW2)
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
            scale = scale_of(tl.max(size(tile), 1), POW2)
            tl.store(row_scale + tl.program_id(1) * M + m, scale, mask=m < M)
            tl.store(row + m[:, None] * row_stride + k[None, :], to_e4m3(tile, scale[:, None]), mask=inside)
        if COLUMNS:
            scale = scale_of(tl.max(size(tile), 0), POW2)
            tl.store(column_scale + tl.program_id(0) * K + k, scale, mask=k < K)
            q = to_e4m3(tile, scale[None, :])
            q = tl.trans(q.reshape(BLOCK_M // APART, APART, 128), 2, 1, 0).reshape(128, BLOCK_M)    # in x's own order
            m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
            tl.store(column + k[:, None] * column_stride + m[None, :], q, mask=(k < K)[:, None] & (m < M)[None, :])

    @triton.jit
    def blocks_kernel(w, q, q_scale, t, t_scale, M, K, q_stride, t_stride):
        """One 128x128 block of one of E matrices, and the same transposed."""
        i, j, e = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
        m, k = i * 128 + tl.arange(0, 128), j * 128 + tl.arange(0, 128)
        inside = (m < M)[:, None] & (k < K)[None, :]
        block = tl.load(w + e * M * K + m.to(tl.int64)[:, None] * K + k[None, :], mask=inside, other=0.0).to(tl.float32)
        scale = scale_of(tl.max(size(block)), False)
        block = to_e4m3(block, scale)
        tl.store(q_scale + (e * tl.num_programs(0) + i) * tl.num_programs(1) + j, scale)
        tl.store(t_scale + (e * tl.num_programs(1) + j) * tl.num_programs(0) + i, scale)
        tl.store(q + e * M * q_stride + m.to(tl.int64)[:, None] * q_stride + k[None, :], block, mask=inside)
        tl.store(t + e * K * t_stride + k.to(tl.int64)[:, None] * t_stride + m[None, :], block.T,
                 mask=(k < K)[:, None] & (m < M)[None, :])

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


def launch(x, M, K, pow2, rows, columns, before=None, weight=None, r=None):
    """quantize_kernel on before(x), an M x K matrix -> its 1x128 tiles or None, its 128x1 tiles or None."""
    q = x if isinstance(x, Quantized) else None
    x = q.values if q else x if x.stride(1) == 1 else x.contiguous()
    make = lambda *shape: torch.empty(*shape, dtype=torch.float32, device=x.device)
    m, k, BLOCK_M, warps = triton.cdiv(M, BLOCK), triton.cdiv(K, BLOCK), *((BLOCK, 8) if columns else (32, 4))
    row = Quantized(empty(M, K, device=x.device), make(k, M).t()) if rows else None
    column = Quantized(empty(K, M, device=x.device), make(m, K).t()) if columns else None
    a, b, s = row or column, column or row, q.scale if q else x            # what is not asked for is not written
    APART = warps * 32 * 16 // (BLOCK * x.element_size())                  # each thread loads 16 bytes of a row
    quantize_kernel[triton.cdiv(M, BLOCK_M), k](
        x, s, weight, r, a.values, a.scale, b.values, b.scale, M, K, x.stride(0), *s.stride(), a.values.stride(0),
        b.values.stride(0), q is not None, before, rows, columns, pow2, BLOCK_M, APART, num_warps=warps)
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
    r, scale = (torch.empty(*shape, dtype=torch.float32, device=x.device) for shape in ((M,), (k if rows else 0, M)))
    row = Quantized(empty(M if rows else 0, K, device=x.device), scale.t())
    norm_kernel[M,](x, weight, r, row.values, row.scale, M, K, eps, x.stride(0), row.values.stride(0), rows, pow2,
                    triton.next_power_of_2(k), num_warps=8)
    column = launch(x, M, K, pow2, False, True, "norm", weight, r)[1] if columns else None
    return row if rows else None, column


def blocks_triton(w):
    """w [E, out, in] -> (W, W^T) in 128x128 blocks; the bits are quantize_torch's."""
    (E, M, K), w = w.shape, w.contiguous()
    m, k, make = triton.cdiv(M, BLOCK), triton.cdiv(K, BLOCK), lambda *shape: torch.empty(*shape, device=w.device)
    q, t = Quantized(empty(E, M, K, device=w.device), make(E, m, k)), Quantized(empty(E, K, M, device=w.device),
                                                                                make(E, k, m))
    blocks_kernel[m, k, E](w, q.values, q.scale, t.values, t.scale, M, K, q.values.stride(1), t.values.stride(1),
                           num_warps=8)
    return q, t


def gemm_triton(a, b, y, add=False):
    """gemm_torch into y [M, N], or added to it; the operands' rows begin at multiples of 16 bytes (quantize_triton,
    blocks_triton)."""
    (M, K), N, BLOCK_M = a.values.shape, len(b.values), 64
    a8, b8 = (TensorDescriptor(q.values, list(q.values.shape), list(q.values.stride()), [rows, BLOCK])
              for q, rows in ((a, BLOCK_M), (b, BLOCK)))
    # One row of b is both a row and a block, and then either reading is right.
    gemm_kernel[triton.cdiv(M, BLOCK_M) * triton.cdiv(N, BLOCK),](
        a8, b8, y, a.scale, b.scale, M, N, K, y.stride(0), *a.scale.stride(), *b.scale.stride(), len(b.scale) < N, add,
        BLOCK_M, GROUP=16, num_warps=4)
    return y


def takes_cublas(a, b, y):
    """Whether cuBLASLt has the product: on Hopper, BF16 out, 1x128 x 128x128, whole blocks of N."""
    (M, K), N = a.values.shape, len(b.values)
    return backend.hopper(y.device) and y.dtype == torch.bfloat16 \
        and len(b.scale) < N and M % 4 == 0 and K % 16 == 0 and N % BLOCK == 0


def gemm_cublas(a, b, y):
    """gemm_torch into y [M, N] BF16 by cuBLASLt, where takes_cublas says so. It wants the scales of a one row of tiles
    after the other, those of b along K in multiples of four."""
    k, tile, block = a.scale.shape[1], F.ScalingType.BlockWise1x128, F.ScalingType.BlockWise128x128
    padded = -(-k // 4) * 4
    b_scale = b.scale.new_empty(len(b.scale), padded).t()                                     # [padded k, n]
    b_scale[:k] = b.scale.t()
    y.copy_(F.scaled_mm(a.values, b.values.t(), a.scale.t().contiguous().t(), tile, b_scale, block,
                        output_dtype=torch.bfloat16))
    return y


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


def quantize_both(x, reference=False):
    """x [M, K] -> (quantize, quantize_columns) of it: what Dgrad and Wgrad need of a gradient."""
    return quantize_triton(x, columns=True) if fast(x, reference) else (quantize_torch(x), quantize_torch(x.mT))


def quantize_blocks(w, reference=False):
    """w [E, out, in] -> (W [E, out, in], W^T [E, in, out]), Quantized in 128x128 blocks."""
    if fast(w, reference):
        return blocks_triton(w)
    w = quantize_torch(w, BLOCK)
    return w, w.mT


def gemm(a, b, y, reference=False, add=False):
    """gemm_torch into y [M, N], in y's dtype; add: y + gemm_torch, for a weight's gradient (y FP32). At V3's
    shapes cuBLASLt reached 1016-1176 TFLOP/s on an H100 and a kernel like ours 835-918, so cuBLASLt goes first where it
    has the product."""
    if not fast(y, reference):
        product = gemm_torch(a, b, y.dtype)
        return y.add_(product) if add else y.copy_(product)
    return gemm_triton(a, b, y, add) if add or not takes_cublas(a, b, y) else gemm_cublas(a, b, y)


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
    """quantize_blocks of a parameter [out, in] or [E, out, in], made once per optimizer step: it stays with the
    parameter until somebody writes to that."""
    key = weight._version, weight.data_ptr(), reference
    if getattr(weight, "fp8", (None,))[0] != key:
        weight.fp8 = key, *quantize_blocks(weight.detach().view(-1, *weight.shape[-2:]), reference)
    return weight.fp8[1:]


def busy(ends):
    """(expert, its rows) of each expert that has rows; ends: for each expert the end of its rows."""
    return [(e, slice(start, end)) for e, (start, end) in enumerate(zip([0, *ends], ends)) if end > start]


def weight_gradient(weight, compute):
    """compute(), the gradient of a parameter, for its autograd function to return; or None where the parameter has a
    list as `queue`: then a closure that computes it and adds it to weight.grad goes there."""
    queue = getattr(weight, "queue", None)
    if queue is None:
        return compute()

    def later():
        grad = compute()
        weight.grad = grad if weight.grad is None else weight.grad.add_(grad)

    queue.append(later)


class Products(torch.autograd.Function):
    """y_r = W_e before(x)_r for the rows r of expert e (figure 6), rows sorted by expert.

    x [R, ...], weight float32 [E, out, in], or [out, in] for one expert with all the rows, ends: for each expert the
    end of its rows -> [R, out] in x's dtype. before(x, *extra) -> [R, in] is made again in backward from what is kept
    of x; None: x itself.
    """

    @staticmethod
    def forward(ctx, x, weight, ends, recipe, before, *extra):
        a = quantize(before(x, *extra) if before else x, recipe.pow2, recipe.reference)
        # W^T of this forward pass, and the parameter itself, on which a queue may hang.
        (w, ctx.w), ctx.weight, y = quantized(weight, recipe.reference), weight, x.new_empty(len(x), weight.shape[-2])
        for e, rows in busy(ends):
            gemm(a[rows], w[e], y[rows], recipe.reference)
        if any(ctx.needs_input_grad):
            if recipe.kept is not E4M3:
                a = quantize_torch(x, fmt=recipe.kept, pow2=recipe.pow2)
            elif before:
                a = quantize(x, recipe.pow2, recipe.reference)
            ctx.save_for_backward(a.values, a.scale, *extra)
            ctx.ends, ctx.recipe, ctx.before = ends, recipe, before
        return y

    @staticmethod
    def backward(ctx, dy):
        values, scale, *extra = ctx.saved_tensors
        weight, ends, before, recipe, a = ctx.weight, ctx.ends, ctx.before, ctx.recipe, Quantized(values, scale)
        if before:
            inputs = [t.detach().requires_grad_() for t in (a.dequantize().to(dy.dtype), *extra)]
            with torch.enable_grad():
                a = before(*inputs)                                                           # [R, in]
        dy_columns, da = {}, dy.new_empty(len(dy), weight.shape[-1])
        for e, rows in busy(ends):
            dy8, dy_columns[e] = quantize_both(dy[rows], recipe.reference)
            gemm(dy8, ctx.w[e], da[rows], recipe.reference)
        dx, *d_extra = torch.autograd.grad(a, inputs, da) if before else [da]
        a = a.detach() if before else a
        dw = weight_gradient(weight, lambda: wgrad(weight, dy_columns, a, ends, recipe))
        return dx, dw, None, None, None, *d_extra


def wgrad(weight, dy_columns, a, ends, recipe):
    """Wgrad, dW_e = dy_e^T a_e: dy_columns {busy expert: Quantized [out, its rows]}, a [R, in], plain or Quantized in
    1x128 tiles -> float32, of the weight's shape. An idle expert's is zero."""
    dw = torch.zeros_like(weight)
    stack = dw.view(-1, *weight.shape[-2:])
    for e, rows in busy(ends):
        columns = quantize_columns(a[rows], recipe.pow2, recipe.reference)                    # [in, its rows]
        gemm(dy_columns[e], columns, stack[e], recipe.reference)
    return dw


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


# --- Linear -----------------------------------------------------------------------------------------------------------

class Linear(nn.Module):
    """y = before(x) W^T without bias: [..., in_features] -> [..., out_features], in x's dtype.

    The one matrix product with a weight that every layer goes through. The weight is FP32, the optimizer's master; the
    product runs in the dtype of the activations that come in, or with a Recipe in FP8. `before` (SwiGLU) belongs to
    the Linear so that FP8 can keep its input and make its output again.
    """

    def __init__(self, in_features, out_features):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.recipe = None                    # a Recipe: FP8

    def forward(self, x, before=None):
        if not self.recipe:
            return linear(before(x) if before else x, self.weight)
        rows = x.flatten(0, -2)                                                               # [N, ...]
        y = Products.apply(rows, self.weight, [len(rows)], self.recipe, before)
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
            beta1, beta2 = group["betas"]
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                state = self.state[p]
                state["step"] += 1
                t = float(state["step"])
                m = state["exp_avg"].to(p.dtype).lerp_(p.grad, 1 - beta1)
                v = state["exp_avg_sq"].to(p.dtype).mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                state["exp_avg"].copy_(m)
                state["exp_avg_sq"].copy_(v)
                length = v.sqrt().div_((1 - beta2 ** t) ** 0.5).add_(group["eps"])
                p.addcdiv_(m, length, value=-group["lr"] / (1 - beta1 ** t))
