"""Products of FP8 numbers, promoted to FP32 every 128 along K (section 3.3.2, figure 7b).

gemm_torch is the specification; dot_limited shows what Hopper's 14 bits would make of a sum without promotion. Then
three kernels, for operands of any shape (plain), for large ones (wide: Gluon, one warp loads for four groups that
multiply) and for few rows (few), beside cuBLASLt; gemm picks.

Shapes: M x K times N x K -> M x N; m n k in tiles of 128.
"""
import torch
import torch.nn.functional as F

import backend
from fp8_tiles import BLOCK, E4M3, fast, step_of

if backend.has_triton():
    import triton
    import triton.language as tl
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia import hopper
    from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as SharedDescriptor
    from triton.tools.tensor_descriptor import TensorDescriptor


# --- the product ------------------------------------------------------------------------------------------------------

def dot_limited(a, b, y, kept=14):
    """y [M, N] + a [M, K] b [N, K]^T, numbers of E4M3, as Hopper's tensor cores add up: 32 products and the sum so far
    are shifted to the largest of their exponents, cut off below `kept` bits, and added, and the sum keeps as many bits
    (3.3.2). A product's exponent is what its factors' add up to: 1.5 * 1.5 = 2.25 still has that of 1, and not of 2.
    (So it is bit for bit, found arXiv 2511.10909.)"""
    cut = lambda x, step: (x / step).trunc() * step
    for start in range(0, a.shape[1], 32):
        left, right = a[:, None, start:start + 32], b[None, :, start:start + 32]
        terms = torch.cat([y[..., None], left * right], -1)                                   # [M, N, 1 + 32], exact
        powers = step_of(left, 0, E4M3.lowest) * step_of(right, 0, E4M3.lowest)               # 2^exponent
        powers = torch.cat([step_of(y[..., None], 0, -100), powers], -1).masked_fill(terms == 0, 2.0 ** -100)
        y = cut(terms, powers.amax(-1, keepdim=True) * 2.0 ** (1 - kept)).sum(-1)
        y = cut(y, step_of(y, kept - 1, -100))
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

if backend.has_triton():
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

    @gluon.jit(do_not_specialize=["tiles", "M", "steps", "a_start", "t_start"])        # one kernel for all lengths
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


def groups_of(y, blocks):
    """How many groups of four warps multiply for gemm_wide. Three, 192 rows a tile, read less than two do, about 7% of
    the time; but the last turn may leave more multiprocessors idle."""
    (M, N), programs = y.shape, backend.multiprocessors(y.device)
    turns = {groups: triton.cdiv(triton.cdiv(M, 64 * groups) * triton.cdiv(N, BLOCK), programs) for groups in (2, 3)}
    return 3 if blocks and turns[3] * 3 * 0.93 < turns[2] * 2 else 2


def gemm_wide(a, b, y, add=False):
    """gemm_plain on Hopper, for scales of 1x128 tiles whose columns begin at multiples of 16 bytes; add: y FP32."""
    (M, N), blocks = y.shape, len(b.scale) < len(b.values)
    programs, GROUPS = backend.multiprocessors(y.device), groups_of(y, blocks)
    SLOTS = {2: 5, 3: 4}[GROUPS]
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
    shares = max(1, min(2 * backend.multiprocessors(y.device) // blocks, steps // 9))
    parts = y if shares == 1 else torch.empty(shares, M, N, dtype=torch.float32, device=y.device)
    few_kernel[blocks, shares](
        descriptor(a, BLOCK_M), descriptor(b, 64), parts, a.scale, b.scale, M, N, steps, triton.cdiv(steps, shares),
        M * N, parts.stride(-2), *a.scale.stride(), *b.scale.stride(), BLOCK_M, 6 if BLOCK_M <= 32 else 4)
    if shares > 1:
        sum_kernel[triton.cdiv(N, 1024), M](parts, y, N, M * N, y.stride(0), shares, 1024)
    return y


def takes_wide(a, b, y):
    """Whether gemm_wide has the product: TMA loads scales from multiples of 16 bytes on. Rows that begin elsewhere, as
    an expert's may, go the plain way."""
    tiled = (a,) if len(b.scale) < len(b.values) else (a, b)
    return backend.hopper(y.device) and all(
        q.scale.stride(0) == 1 and q.scale.stride(1) % 4 == 0 and q.scale.storage_offset() % 4 == 0 for q in tiled)


def gemm_triton(a, b, y, add=False):
    """gemm_torch into y [M, N], or (add, y FP32) added to it, by the kernel that is made for the shape and the GPU."""
    if len(y) <= FEW and len(b.scale) < len(b.values) and not add and backend.hopper(y.device):
        return gemm_few(a, b, y)
    return (gemm_wide if takes_wide(a, b, y) else gemm_plain)(a, b, y, add)


def takes_cublas(a, b, y):
    """Whether cuBLASLt has the product: on Hopper, of whole tiles, 1x128 x 128x128 in BF16, 1x128 x 1x128 in FP32."""
    (M, K), N = a.values.shape, len(b.values)
    if not backend.hopper(y.device):
        return False
    if len(b.scale) < N:
        rows = b.scale.stride(0) % 4 == 0 and b.scale.stride(1) == 1
        return y.dtype == torch.bfloat16 and M > FEW and M % 4 == 0 and K % BLOCK == 0 and N % BLOCK == 0 and rows
    return y.dtype == torch.float32 and M % 16 == 0 and N % 16 == 0 and K % BLOCK == 0


def gemm_cublas(a, b, y):
    """gemm_torch into y [M, N] by cuBLASLt, where takes_cublas says so. It wants scales of 1x128 tiles one row of tiles
    after the other, those of blocks as block_scales lays them out. In this form, F.scaled_mm's own, it writes to y."""
    def rows(scale):
        scale = scale.t().contiguous().t()
        return scale.as_strided(scale.shape, (1, len(scale)))                # of one column torch keeps any strides

    tile, block, step = F.ScalingType.BlockWise1x128, F.ScalingType.BlockWise1x128, b.scale.stride(0)
    if len(b.scale) < len(b.values):
        block, b_scale = F.ScalingType.BlockWise128x128, b.scale.as_strided((step, len(b.scale)), (1, step))
    else:
        b_scale = rows(b.scale)
    return torch.ops.aten._scaled_mm_v2.out(a.values, b.values.t(), [rows(a.scale)], [tile.value], [], [b_scale],
                                            [block.value], [], None, y.dtype, out=y)


# --- which one runs ---------------------------------------------------------------------------------------------------

def gemm(a, b, y, reference=False, add=False):
    """gemm_torch into y [M, N], in y's dtype; add: y + gemm_torch, for a weight's gradient (y FP32).

    On an H200 our tiles of 192 rows run Fprop and Dgrad as fast as cuBLASLt or faster at most of V3's shapes, those of
    128 rows and Wgrad more slowly (results/fp8.json): these are cuBLASLt's, where it has the product. To add to a
    gradient it has not, and most products of few rows are read faster by ours.
    """
    if not fast(y, reference):
        product = gemm_torch(a, b, y.dtype)
        return y.add_(product) if add else y.copy_(product)
    blocks = len(b.scale) < len(b.values)
    ours = add or not takes_cublas(a, b, y) or takes_wide(a, b, y) and groups_of(y, blocks) == 3
    return gemm_triton(a, b, y, add) if ours else gemm_cublas(a, b, y)
