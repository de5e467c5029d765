"""FP8's kernels against the plain-torch reference: quantization bit for bit, products to the rounding of their sums.

On a GPU the tests run compiled, elsewhere in Triton's interpreter.
"""
import math

import pytest
import torch
from conftest import GPU, no_triton

import backend
import configs
import fp8
import fp8_gemm
import fp8_tiles
from bench_fp8 import cublas
from fp8_gemm import gemm_torch
from fp8_tiles import E4M3, E5M6, Quantized, quantize_torch
from model import V3

DEVICE = "cuda" if GPU else "cpu"
pytestmark = [no_triton, pytest.mark.skipif(GPU and backend.fp8_kernels(torch.device("cuda"))[0] == "torch",
                                            reason="this GPU has no FP8")]
SHAPES = [(1, 1), (3, 127), (129, 130)] + [(128, 128), (70, 300), (300, 40), (1000, 2000)] * GPU


def equal(ours, theirs):
    """The same values, byte for byte, the same scales (NaN equals NaN), and rows that a descriptor can load."""
    assert ours.values.dtype == torch.float8_e4m3fn and ours.values.shape == theirs.values.shape
    assert torch.equal(ours.values.contiguous().view(torch.uint8), theirs.values.contiguous().view(torch.uint8))
    assert ours.scale.shape == theirs.scale.shape
    torch.testing.assert_close(ours.scale, theirs.scale, rtol=0, atol=0, equal_nan=True)
    assert ours.values.stride(-1) == 1 and (ours.values.stride(-2) % 16 == 0 or ours.values.shape[-2] == 1)


def samples(M, K):
    """Matrices in which every branch of the rounding is taken: all sizes within a tile, ties, subnormal numbers of E4M3
    and of float32, huge ones, zeros, NaN and infinities."""
    spread = torch.randn(M, K) * 10.0 ** torch.randint(-6, 3, (M, K))
    ties = (torch.randint(-900, 900, (M, K)) / 2.0).clamp(-448, 448)
    ties[:, ::128] = 448.0                                                     # the scale is 1 and halves stay halves
    bad = torch.randn(M, K)
    bad.view(-1)[torch.randint(M * K, (3,))] = torch.tensor([math.nan, math.inf, -math.inf])
    return {"spread": spread, "ties": ties, "tiny": torch.randn(M, K) * 1e-40, "huge": torch.randn(M, K) * 1e37,
            "zeros": torch.zeros(M, K), "bad": bad, "bf16": spread.to(torch.bfloat16)}


@pytest.mark.parametrize("pow2", [False, True], ids=["float32 scales", "powers of two"])
@pytest.mark.parametrize("M, K", SHAPES)
def test_rows_and_columns_are_quantized_as_the_reference_does_bit_for_bit(M, K, pow2):
    for name, x in samples(M, K).items():
        x = x.to(DEVICE)
        print(name)
        row, none = fp8_tiles.quantize_triton(x, pow2)
        assert none is None
        equal(row, quantize_torch(x, pow2=pow2))
        both = fp8_tiles.quantize_triton(x, pow2, columns=True)
        equal(both[0], row)
        equal(both[1], quantize_torch(x.t(), pow2=pow2))
        none, column = fp8_tiles.quantize_triton(x, pow2, rows=False, columns=True)
        assert none is None
        equal(column, both[1])


@pytest.mark.parametrize("M, K", SHAPES)
def test_what_was_kept_in_fp8_is_requantized_along_the_tokens_bit_for_bit(M, K):
    for name, x in samples(M, K).items():
        print(name)
        kept = fp8_tiles.quantize_triton(x.to(DEVICE))[0]
        rows = slice(M // 3, M)                                                # the rows of one expert
        column = fp8_tiles.quantize_triton(kept[rows], rows=False, columns=True)[1]
        equal(column, quantize_torch(kept[rows].dequantize().t()))


@pytest.mark.parametrize("M, K", SHAPES)
def test_what_the_linear_after_attention_keeps_is_rounded_to_e5m6_on_the_way_bit_for_bit(M, K, monkeypatch):
    monkeypatch.setattr(backend, "fp8_kernels", lambda device: ("Triton", "a test"))
    for name, x in samples(M, K).items():
        print(name)
        rows = x.to(DEVICE)[M // 3:]                                           # of one expert
        kept = quantize_torch(rows, fmt=E5M6, pow2=True)
        equal(fp8_tiles.quantize_columns(rows, E5M6), quantize_torch(kept.dequantize().t(), pow2=True))


def close(ours, theirs):
    """The same, but for a last bit before the rounding: nearly all values equal, none further than one step away."""
    assert ours.scale.shape == theirs.scale.shape and ours.values.shape == theirs.values.shape
    torch.testing.assert_close(ours.scale, theirs.scale, rtol=1e-6, atol=0, equal_nan=True)
    assert (ours.values.view(torch.uint8) == theirs.values.view(torch.uint8)).float().mean() > 0.995
    x, y = ours.dequantize(), theirs.dequantize()
    step = torch.maximum(y.abs() / 8, y.abs().max() / 448 * 2**-9)
    assert ((x - y).abs() <= 1.01 * step)[y.isfinite()].all()


def both(before, x, *extra):
    """The kernel's rows and columns, each alone and the two together."""
    row, column = before(x, *extra, columns=True)
    equal(before(x, *extra)[0], row)
    none, alone = before(x, *extra, rows=False, columns=True)
    assert none is None
    equal(alone, column)
    return row, column


@pytest.mark.parametrize("M, K", [(3, 127), (129, 300)] + [(1000, 7168)] * GPU)
def test_rmsnorm_is_quantized_in_the_pass_that_computes_it(M, K):
    def norm(x):
        mean = x.square().sum(-1, keepdim=True) / torch.full((M, 1), float(K), device=DEVICE)
        root = (mean + 1e-6).double().sqrt().float()                              # a CPU's may be off by a bit
        return x * root.reciprocal() * weight
    weight = torch.randn(K, device=DEVICE)
    whole = torch.randint(-8, 9, (M, K), device=DEVICE).float()                # squares that no order of summing rounds
    row, column = both(fp8_tiles.norm_quantize_triton, whole, weight, 1e-6)
    equal(row, quantize_torch(norm(whole)))
    equal(column, quantize_torch(norm(whole).t()))
    x = samples(M, K)["bf16"].to(DEVICE)
    row, column = fp8_tiles.norm_quantize_triton(x, weight, 1e-6, columns=True)
    close(row, quantize_torch(norm(x.float())))
    close(column, quantize_torch(norm(x.float()).t()))


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "times the gate's weight"])
@pytest.mark.parametrize("M, F", [(3, 127), (129, 256)] + [(1000, 2048)] * GPU)
def test_swiglu_is_quantized_in_the_pass_that_computes_it(M, F, weighted):
    weight = torch.rand(M, device=DEVICE) if weighted else None
    # Where exp is 0 or infinite, silu(a) is a or 0, and nothing depends on how exp rounds.
    certain = torch.randn(M, 2 * F, device=DEVICE)
    certain[:, :F] = torch.tensor([-200.0, 0.0, 120.0, 333.0], device=DEVICE)[torch.randint(4, (M, F), device=DEVICE)]
    plain = torch.randn(M, 2 * F, device=DEVICE).to(torch.bfloat16)
    for h, same in ((certain, equal), (plain, close), (fp8_tiles.quantize_triton(plain)[0], close)):   # kept in FP8
        row, column = both(fp8_tiles.swiglu_quantize_triton, h, weight)
        y = fp8_tiles.swiglu_torch(h.dequantize() if isinstance(h, Quantized) else h, weight)
        same(row, quantize_torch(y))
        same(column, quantize_torch(y.t()))


@pytest.mark.parametrize("E, M, K", [(1, 1, 1), (1, 130, 300), (3, 128, 40), (2, 200, 128)])
def test_blocks_and_their_transpose_are_quantized_bit_for_bit(E, M, K):
    for name, w in samples(E * M, K).items():
        print(name)
        w = w.view(E, M, K).to(DEVICE)
        q, expected = fp8_tiles.blocks_triton(w), quantize_torch(w, 128)
        equal(q, expected)
        equal(fp8_tiles.transpose_triton(q), expected.mT)


def test_every_number_of_the_format_comes_through_the_cast():
    x = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    x = torch.cat([x[:127], x[128:255]])                                       # 127 and 255 are NaN
    x = torch.cat([torch.full((len(x), 1), 448.0), x[:, None]], 1).to(DEVICE)  # scale 1
    assert torch.equal(fp8_tiles.quantize_triton(x)[0].values.float(), x)


HOPPER = GPU and backend.hopper(torch.device("cuda"))
PRODUCTS = [fp8_gemm.gemm_plain, fp8_gemm.gemm_few] + [fp8_gemm.gemm_wide] * HOPPER


def operands(M, N, K, blocks):
    """a and b whose numbers, and whose tiles' scales, differ by orders of magnitude."""
    spread = torch.logspace(-3, 3, K, device=DEVICE)
    a = fp8_tiles.quantize_triton(torch.randn(M, K, device=DEVICE) * spread)[0]
    w = torch.randn(N, K, device=DEVICE) * torch.logspace(-1, 2, N, device=DEVICE)[:, None]
    return a, fp8_tiles.blocks_triton(w[None])[0] if blocks else fp8_tiles.quantize_triton(w)[0]


def relative(y, expected):
    error = ((y.double() - expected.double()).norm() / expected.double().norm()).item()
    print(f"relative Frobenius error {error:.1e}")
    return error


@pytest.mark.parametrize("blocks", [True, False], ids=["Fprop, Dgrad", "Wgrad"])
@pytest.mark.parametrize("M, N, K", [(1, 1, 1), (1, 130, 127), (64, 128, 128), (70, 300, 260), (1100, 130, 50)]
                         + [(4096, 24576, 256), (900, 700, 4000)] * GPU)
@pytest.mark.parametrize("product", PRODUCTS, ids=lambda product: product.__name__)
def test_the_product_is_the_references(M, N, K, blocks, product):
    if product is fp8_gemm.gemm_few and (M > fp8_gemm.FEW or not blocks) \
            or product is fp8_gemm.gemm_wide and (M % 4 or N % 4):
        product = fp8_gemm.gemm_triton                                               # which goes another way
    a, b = operands(M, N, K, blocks)
    for dtype, limit in ((torch.float32, 1e-3 if GPU else 1e-6), (torch.bfloat16, 2**-8)):        # one bit of BF16
        # The hardware keeps 14 bits of the sums inside 128 that the reference and the interpreter take in float32.
        assert relative(product(a, b, torch.empty(M, N, device=DEVICE, dtype=dtype)), gemm_torch(a, b)) < limit


def test_few_rows_share_out_the_length_of_the_sums(monkeypatch):
    monkeypatch.setattr(backend, "multiprocessors", lambda device: 132)
    for M, N, K in ((5, 70, 4100), (33, 200, 2100)):
        a, b = operands(M, N, K, True)
        y = torch.empty(M, 2 * N, device=DEVICE)[:, :N]                                                # rows apart
        assert relative(fp8_gemm.gemm_few(a, b, y), gemm_torch(a, b)) < (1e-3 if GPU else 1e-6)


def test_the_product_goes_to_whoever_is_faster(monkeypatch):
    taken = []
    for name in ("gemm_cublas", "gemm_wide", "gemm_few", "gemm_plain"):
        monkeypatch.setattr(fp8_gemm, name, lambda *_, name=name: taken.append(name))
    monkeypatch.setattr(backend, "fp8_kernels", lambda device: ("Triton", "a test"))
    monkeypatch.setattr(backend, "hopper", lambda device: True)
    monkeypatch.setattr(backend, "multiprocessors", lambda device: 1)                       # no turn is cut short
    for M, blocks, add in ((256, True, False), (16, True, False), (256, False, False), (256, False, True),
                           (254, False, True), (16, False, True), (1536, True, False)):
        a, b = operands(M, 256, 256, blocks)
        y = torch.empty(M, 256, device=DEVICE, dtype=torch.bfloat16 if blocks else torch.float32)
        fp8_gemm.gemm(a, b, y, add=add)
    assert taken == ["gemm_cublas", "gemm_few", "gemm_cublas", "gemm_wide", "gemm_plain", "gemm_wide", "gemm_wide"]


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("M, N, K", [(4096, 4096, 7168), (4096, 24576, 1536), (64, 4096, 7168), (16, 7168, 2048)])
def test_the_products_error_against_float64_is_no_larger_than_cublaslts(M, N, K):
    a, b = operands(M, N, K, True)
    exact = a.dequantize().double() @ b.dequantize().double().t()
    theirs = relative(cublas(a, b)(), exact)
    for product in (fp8_gemm.gemm_plain, fp8_gemm.gemm_wide, fp8_gemm.gemm_few)[:3 if M <= fp8_gemm.FEW else 2]:
        y = product(a, b, torch.empty(M, N, device=DEVICE, dtype=torch.bfloat16))
        assert relative(y, exact) <= 1.05 * theirs
    a, b = operands(256, 384, 4096, False)                                                             # Wgrad's form
    exact = a.dequantize().double() @ b.dequantize().double().t()
    theirs = relative(cublas(a, b, torch.float32)(), exact)
    for product in (fp8_gemm.gemm_plain, fp8_gemm.gemm_wide):
        assert relative(product(a, b, torch.empty(256, 384, device=DEVICE)), exact) <= 1.05 * theirs


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("blocks", [True, False], ids=["Fprop, Dgrad", "Wgrad"])
@pytest.mark.parametrize("M, N, K", [(4096, 512, 7168), (256, 384, 128), (512, 128, 640)])
def test_cublaslt_writes_the_product_where_it_should(M, N, K, blocks):
    a, b = operands(2 * M, N, K, blocks)
    a = a[M // 2:M // 2 + M]                                                   # the rows of one expert
    y = torch.zeros(2 * M, N, device=DEVICE, dtype=torch.bfloat16 if blocks else torch.float32)
    rows = y[M // 2:M // 2 + M]
    assert fp8_gemm.takes_cublas(a, b, rows)
    fp8_gemm.gemm_cublas(a, b, rows)
    assert relative(rows, gemm_torch(a, b)) < (3e-3 if blocks else 1e-3)
    assert (y[:M // 2] == 0).all() and (y[M // 2 + M:] == 0).all()


@pytest.mark.parametrize("blocks", [True, False], ids=["Fprop, Dgrad", "Wgrad"])
def test_where_no_sum_is_rounded_the_product_is_the_references_bit_for_bit(blocks):
    M, N, K = 70, 260, 400
    a, b = (torch.randint(-3, 4, (n, K), device=DEVICE).float() for n in (M, N))
    a, b = fp8_tiles.quantize_triton(a, pow2=True)[0], fp8_tiles.quantize_triton(b, pow2=True)[0]
    if blocks:
        scale = 2.0 ** torch.randint(-2, 3, (3, 4), device=DEVICE)
        b = Quantized(b.values, scale)
    a.scale.copy_(2.0 ** torch.randint(-2, 3, a.scale.shape, device=DEVICE))
    assert torch.equal(fp8_gemm.gemm_triton(a, b, torch.empty(M, N, device=DEVICE)), gemm_torch(a, b))


@pytest.mark.parametrize("product", [fp8_gemm.gemm_plain] + [fp8_gemm.gemm_wide] * HOPPER,
                         ids=lambda product: product.__name__)
def test_a_product_is_added_to_the_gradient_that_is_there(product):
    a, b = (fp8_tiles.quantize_triton(torch.randn(n, 150, device=DEVICE))[0] for n in (72, 140))
    before = torch.randn(72, 140, device=DEVICE)
    expected = before + gemm_torch(a, b)
    for y in (fp8_gemm.gemm(a, b, before.clone(), reference=True, add=True),
              fp8_gemm.gemm(a, b, before.clone(), add=True),
              product(a, b, before.clone(), add=True)):
        assert relative(y, expected) < 1e-3
    assert torch.equal(product(a, b, before.clone(), add=True), y), "the same bits each time"


def test_the_rows_of_one_expert_are_multiplied_where_they_lie():
    x, w = torch.randn(300, 140, device=DEVICE), torch.randn(3, 200, 140, device=DEVICE)
    a, b = fp8_tiles.quantize_triton(x)[0], fp8_tiles.blocks_triton(w)
    t = fp8_tiles.transpose_triton(b)
    y = torch.zeros(300, 200, device=DEVICE)
    fp8_gemm.gemm_triton(a[37:190], b[1], y[37:190])
    expected = gemm_torch(a[37:190], b[1])
    assert ((y[37:190] - expected).norm() / expected.norm()) < 1e-3
    assert (y[:37] == 0).all() and (y[190:] == 0).all()
    dy, dx = fp8_tiles.quantize_triton(y[37:190])[0], torch.empty(153, 140, device=DEVICE)
    expected = gemm_torch(dy, t[1])
    assert ((fp8_gemm.gemm_triton(dy, t[1], dx) - expected).norm() / expected.norm()) < 1e-3


@pytest.mark.parametrize("kept", [E4M3, E5M6], ids=["E4M3", "E5M6"])
def test_a_whole_linear_on_the_kernels_is_the_references(kept, monkeypatch):
    if not GPU:
        monkeypatch.setattr(backend, "fp8_kernels", lambda device: ("Triton", "a test"))
    x, dy = torch.randn(150, 140, device=DEVICE), torch.randn(150, 60, device=DEVICE)
    grads = []
    for reference in (True, False):
        layer = fp8.Linear(140, 60).to(DEVICE)
        with torch.no_grad():
            layer.weight.copy_(torch.linspace(-1, 1, 140 * 60).view(60, 140).sin())
        layer.recipe = fp8.Recipe(kept, kept is E5M6, reference)
        inputs = x.clone().requires_grad_()
        y = layer(inputs)
        y.backward(dy)
        grads.append((y.detach(), inputs.grad, layer.weight.grad))
    for name, ours, theirs in zip(("y", "dx", "dW"), grads[1], grads[0]):
        assert (ours - theirs).norm() / theirs.norm() < (2e-3 if GPU else 1e-6), name


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA GPU")
def test_a_whole_model_on_the_kernels_is_as_far_from_float32_as_the_reference_is():
    c = configs.load(["configs/gpu.py", "--n_layers=4"])
    tokens, gradients = torch.randint(c.vocab_size, (2, 258), device="cuda"), {}
    for precision in ("fp32", "bf16", "fp8_reference", "fp8"):
        with torch.device("cuda"):
            v3 = V3(c.replace(precision=precision)).train()
        loss, _ = v3.loss(tokens)
        loss.backward()
        gradients[precision] = torch.cat([p.grad.flatten() for p in v3.parameters()])
    far = {name: ((g - gradients["fp32"]).norm() / gradients["fp32"].norm()).item() for name, g in gradients.items()}
    print(far)
    assert far["bf16"] < far["fp8"] < 1.05 * far["fp8_reference"]
