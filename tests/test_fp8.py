"""FP8 (report 3.3): formats, tiles and scales, the promoted product, the three products of a Linear, what is kept, and
AdamW's BF16 moments. All on the plain-torch reference."""
import copy
import json
import math
import re

import pytest
import torch
import torch.nn.functional as F
from conftest import GPU, gradients, lively, no_triton, random_tokens, tiny
from safetensors.torch import load_file

import backend
import fp8
import fp8_gemm
import fp8_tiles
from fp8 import Linear, Products, Recipe
from fp8_gemm import gemm_torch
from fp8_tiles import E4M3, E5M6, LEAST, Quantized, quantize_torch
from mla import MLA, rope_table
from model import V3, from_hf, official_tensors, save_hf
from moe import FFN, MoE, SwiGLU, weighted_swiglu

SHAPES = [(1, 1), (3, 127), (128, 128), (129, 130), (200, 300), (5, 1024)]


def error(ours, theirs):
    """Relative Frobenius error."""
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


# --- formats ----------------------------------------------------------------------------------------------------------

def numbers_of(mantissa, lowest, largest):
    """Every number of a format that is not negative, in order, made from its definition."""
    below = [i * 2.0 ** (lowest - mantissa) for i in range(2 ** mantissa)]
    above = [(1 + i / 2 ** mantissa) * 2.0 ** e for e in range(lowest, 17) for i in range(2 ** mantissa)]
    return torch.tensor([x for x in below + above if x <= largest], dtype=torch.float32)


@pytest.mark.parametrize("fmt", [E4M3, E5M6], ids=["E4M3", "E5M6"])
def test_rounding_goes_to_the_nearest_number_of_the_format_and_at_a_tie_to_the_even_one(fmt):
    grid = numbers_of(fmt.mantissa, fmt.lowest, fmt.largest)
    assert torch.equal(grid.to(fmt.dtype).float(), grid)                       # its dtype holds all of them
    assert torch.equal(fp8_tiles.round_to(grid, fmt), grid)
    middle = (grid[1:] + grid[:-1]) / 2
    even = torch.where(torch.arange(len(middle)) % 2 == 0, grid[:-1], grid[1:])
    for sign in (1, -1):
        assert torch.equal(fp8_tiles.round_to(sign * middle, fmt), sign * even)
        nudged = torch.nextafter(middle, torch.tensor(math.inf))
        assert torch.equal(fp8_tiles.round_to(sign * nudged, fmt), sign * grid[1:])
        nudged = torch.nextafter(middle, torch.tensor(0.0))
        assert torch.equal(fp8_tiles.round_to(sign * nudged, fmt), sign * grid[:-1])


def test_e4m3_is_torchs_own_format_and_its_rounding_torchs_own_cast():
    x = torch.randn(100_000) * torch.logspace(-8, 3, 100_000)
    x = x.clamp(-448, 448)
    assert torch.equal(fp8_tiles.round_to(x, E4M3), x.to(torch.float8_e4m3fn).float())


def test_a_scale_is_rounded_up_to_a_power_of_two_and_a_power_of_two_stays():
    powers = 2.0 ** torch.arange(-120, 121, 10).float()
    assert torch.equal(fp8_tiles.round_up(powers), powers)
    assert torch.equal(fp8_tiles.round_up(torch.nextafter(powers, torch.tensor(math.inf))), 2 * powers)
    assert torch.equal(fp8_tiles.round_up(torch.nextafter(powers, torch.tensor(0.0))), powers)


# --- tiles and scales -------------------------------------------------------------------------------------------------

def by_hand(x, rows, fmt, pow2):
    """Quantization written as the report says it, one tile at a time, in float64 where it can be."""
    M, K = x.shape
    values, scales = torch.empty(M, K), torch.empty(-(-M // rows), -(-K // 128))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            cut = slice(i * rows, (i + 1) * rows), slice(j * 128, (j + 1) * 128)
            scale = x[cut].abs().max() / torch.tensor(fmt.largest)
            if pow2:
                scale = torch.tensor(2.0 ** math.ceil(math.log2(scale)))
            y = (x[cut] * (1 / scale)).clamp(-fmt.largest, fmt.largest).double()
            step = 2.0 ** (torch.floor(torch.log2(y.abs().clamp_min(1e-30))).clamp_min(fmt.lowest) - fmt.mantissa)
            values[cut], scales[i, j] = ((y / step).round() * step).float(), scale
    return values, scales


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rows, fmt, pow2", [(1, E4M3, False), (1, E4M3, True), (128, E4M3, False), (128, E4M3, True),
                                             (1, E5M6, True)], ids=["1x128", "1x128 pow2", "128x128", "128x128 pow2",
                                                                    "E5M6"])
def test_every_tile_is_quantized_by_its_own_largest_number_bit_for_bit(shape, rows, fmt, pow2):
    x = torch.randn(shape) * torch.logspace(-4, 4, shape[1])
    q = quantize_torch(x, rows, fmt, pow2)
    values, scales = by_hand(x, rows, fmt, pow2)
    assert q.values.dtype == fmt.dtype and q.scale.dtype == torch.float32
    assert torch.equal(q.values.float(), values) and torch.equal(q.scale, scales)


@pytest.mark.parametrize("rows", [1, 128])
@pytest.mark.parametrize("fmt, pow2, limit", [(E4M3, False, 2**-4), (E4M3, True, 2**-4), (E5M6, True, 2**-7)],
                         ids=["E4M3", "pow2", "E5M6"])
def test_what_comes_back_is_off_by_at_most_half_a_step(rows, fmt, pow2, limit):
    x = torch.randn(300, 517)
    back = quantize_torch(x, rows, fmt, pow2).dequantize()
    assert back.shape == x.shape
    # Half a step: relative to a normal number, to the tile's largest one below the normal numbers.
    floor = x.abs().max() / fmt.largest * (2 if pow2 else 1) * 2.0 ** (fmt.lowest - fmt.mantissa - 1)
    assert ((back - x).abs() <= (x.abs() * limit).clamp_min(floor) * 1.0001).all()


def test_an_outlier_costs_its_own_tile_and_no_other():
    x = torch.randn(4, 512)
    x[1, 200] = 1e6
    clean, spoilt = quantize_torch(torch.randn(4, 512)), quantize_torch(x)
    off = (spoilt.dequantize() - x).abs()
    assert off[1, 128:256].max() > 0.5 and off[0].max() < 0.2 and off[1, 256:].max() < 0.2
    assert spoilt.scale[1, 1] > 1000 * clean.scale.max()


def test_tiles_of_128x1_are_the_1x128_tiles_of_the_transpose():
    x = torch.randn(200, 70) * torch.logspace(-3, 3, 200)[:, None]
    _, columns = fp8_tiles.quantize_both(x)
    assert columns.values.shape == (70, 200) and columns.scale.shape == (70, 2)
    assert torch.equal(columns.scale[:, 0], x[:128].abs().amax(0) / torch.tensor(448.0))
    assert error(columns.dequantize().t(), x) < 0.04


def test_a_power_of_two_scale_is_rounded_before_it_divides():
    x = torch.full((1, 128), 300.0)                                            # 300 / 448 rounds up to 1
    x[0, 1] = 301.0
    q = quantize_torch(x, pow2=True)
    assert q.scale.item() == 1.0 and q.values[0, 0].item() == 288.0            # and not 448, to be read as 448 * 1
    assert quantize_torch(torch.full((1, 5), 448.0), pow2=True).scale.item() == 1.0


def test_with_powers_of_two_going_from_1x128_to_128x1_tiles_only_moves_exponents():
    x = torch.randn(128, 128)
    row = quantize_torch(x, pow2=True)
    again = quantize_torch(row.dequantize().t(), pow2=True).dequantize().t()
    normal = row.dequantize().abs() > 2.0 ** -5 * x.abs().max()                # above what falls below the normal range
    assert normal.float().mean() > 0.8 and torch.equal(again[normal], row.dequantize()[normal])
    row = quantize_torch(x)
    assert not torch.equal(fp8_tiles.quantize_columns(row).dequantize().t()[normal], row.dequantize()[normal])


@pytest.mark.parametrize("rows", [1, 128])
def test_tiles_of_zeros_are_zeros_and_tiny_numbers_divide_by_no_zero(rows):
    x = torch.zeros(130, 256)
    x[:, 128:] = 1e-44                                                         # subnormal in float32 itself
    q = quantize_torch(x, rows)
    assert (q.scale == LEAST).all() and not q.dequantize().isnan().any() and (q.values[:, :128].float() == 0).all()
    x = torch.full((1, 128), 1e-9)                                             # a gradient of a token: not floored away
    assert error(quantize_torch(x).dequantize(), x) < 1e-6
    huge = torch.full((1, 128), torch.finfo(torch.float32).max)
    assert error(quantize_torch(huge).dequantize(), huge) < 1e-6


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rows", [1, 128])
def test_a_number_that_is_none_makes_its_whole_tile_nan_and_no_other(bad, rows):
    x = torch.randn(256, 256)
    x[3, 200] = bad
    q = quantize_torch(x, rows)
    expected = torch.zeros(256, 256, dtype=torch.bool)
    expected[3 if rows == 1 else slice(0, 128), 128:] = True
    assert torch.equal(q.dequantize().isnan(), expected)
    assert (q.values.float()[expected] == 0).all() and q.scale.isnan().sum() == 1              # the scale alone says it
    assert gemm_torch(q if rows == 1 else quantize_torch(x), quantize_torch(torch.randn(7, 256), 128))[3].isnan().all()


# --- the product ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("b_rows", [1, 128])
@pytest.mark.parametrize("M, N, K", [(1, 1, 1), (5, 130, 127), (130, 7, 300), (64, 200, 512)])
def test_the_product_is_that_of_the_dequantized_operands(M, N, K, b_rows):
    spread = torch.logspace(-3, 3, K)                                          # a scale forgotten or mixed up shows
    a, b = quantize_torch(torch.randn(M, K) * spread), quantize_torch(torch.randn(N, K) * spread.flip(0), b_rows)
    exact = a.dequantize().double() @ b.dequantize().double().t()
    assert error(gemm_torch(a, b), exact) < 1e-6
    assert gemm_torch(a, b, torch.bfloat16).dtype == torch.bfloat16


def test_a_tensor_cores_sum_drops_what_lies_below_its_14_bits():
    a, b = torch.ones(1, 33), torch.full((1, 33), 2.0 ** -14)
    b[0, 0] = 1.0                                     # 1 and 31 numbers below its last bit, then one more, all lost
    assert fp8_gemm.dot_limited(a, b, torch.zeros(1, 1)).item() == 1.0
    assert fp8_gemm.dot_limited(a, b, torch.zeros(1, 1), kept=15).item() == 1.0 + 32 * 2.0 ** -14
    assert fp8_gemm.dot_limited(a[:, 1:], b[:, 1:], torch.zeros(1, 1)).item() == 32 * 2.0 ** -14
    assert fp8_gemm.dot_limited(-a, b, torch.zeros(1, 1)).item() == -1.0            # cut off towards zero


def test_a_tensor_core_shifts_a_product_by_its_factors_exponents_and_cuts_the_sum_off_once_more():
    a, b = torch.tensor([[1.5, 2.0 ** -6, 2.0 ** -6]]), torch.tensor([[1.5, 2.0 ** -7, 2.0 ** -7]])
    sums = [fp8_gemm.dot_limited(a[:, :n], b[:, :n], torch.zeros(1, 1)).item() for n in (1, 2, 3)]
    # A last bit of 2^-13, as 1.5 * 1.5 has the exponent of 1. Of the sum, which has that of 2, it is 2^-12.
    assert sums == [2.25, 2.25, 2.25 + 2.0 ** -12]


def test_promotion_keeps_a_long_sum_as_good_as_a_short_one():
    a, b = (quantize_torch(torch.rand(16, 4096)) for _ in range(2))
    a, b = (Quantized(q.values, torch.ones_like(q.scale)) for q in (a, b))
    exact = a.values.double() @ b.values.double().t()
    promoted = error(gemm_torch(a, b, kept=14), exact)
    alone = error(fp8_gemm.dot_limited(a.values.float(), b.values.float(), torch.zeros(16, 16)), exact)
    print(f"relative error at K = 4096: promoted {promoted:.1e}, not {alone:.1e}")
    assert promoted < 1e-3 and alone > 20 * promoted


# --- Fprop, Dgrad, Wgrad ----------------------------------------------------------------------------------------------

def linear_fp8(N, inner, out, recipe=None):
    """A Linear in FP8, an input whose tokens differ a thousandfold, and the gradient of its output."""
    layer = Linear(inner, out)
    torch.nn.init.normal_(layer.weight)
    layer.recipe = recipe or Recipe(reference=True)
    x = (torch.randn(N, inner) * torch.logspace(-1, 2, N)[:, None]).requires_grad_()
    return layer, x, torch.randn(N, out) * torch.logspace(1, -2, N)[:, None]


@pytest.mark.parametrize("N, inner, out", [(7, 30, 50), (130, 200, 140), (300, 128, 256)])
def test_the_three_products_are_those_of_figure_6(N, inner, out):
    layer, x, dy = linear_fp8(N, inner, out)
    y = layer(x)
    y.backward(dy)
    x8, dy8 = quantize_torch(x.detach()), quantize_torch(dy)                                   # 1x128
    w = quantize_torch(layer.weight.detach(), 128)
    assert torch.equal(y.detach(), gemm_torch(x8, w))
    assert torch.equal(x.grad, gemm_torch(dy8, w.mT))
    # Wgrad: x from what was kept in FP8, dy from itself, both quantized along the tokens.
    x_columns = quantize_torch(x8.dequantize().t())
    assert torch.equal(layer.weight.grad, gemm_torch(quantize_torch(dy.t()), x_columns))
    assert layer.weight.grad.dtype == torch.float32
    for ours, exact in ((y, x @ layer.weight.t()), (x.grad, dy @ layer.weight), (layer.weight.grad, dy.t() @ x)):
        assert error(ours.detach(), exact.detach()) < 0.06


def test_only_fp8_is_kept_of_an_input_and_no_copy_of_the_weight():
    layer, x, _ = linear_fp8(256, 384, 128)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    assert {t.dtype for t in kept} == {torch.float8_e4m3fn, torch.float32}
    assert sum(t.nbytes for t in kept) == 256 * 384 + 256 * 3 * 4


def test_the_linear_after_attention_keeps_its_input_itself_and_rounds_it_to_12_bits_in_backward():
    layer, x, dy = linear_fp8(140, 200, 60, Recipe(E5M6, pow2=True, reference=True))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer(x)
    assert [t.data_ptr() for t in kept] == [x.data_ptr()]
    y.backward(dy)
    w, q = quantize_torch(layer.weight.detach(), 128), quantize_torch(x.detach(), fmt=E5M6, pow2=True)
    assert q.values.dtype == torch.float16 and (q.values.view(torch.int16) & 15 == 0).all()    # 6 of FP16's 10 bits
    assert torch.equal(fp8_tiles.round_up(q.scale), q.scale)
    assert torch.equal(y.detach(), gemm_torch(quantize_torch(x.detach(), pow2=True), w))
    x12 = q.dequantize()
    assert error(x12, x.detach()) < 0.008
    assert torch.equal(layer.weight.grad, gemm_torch(quantize_torch(dy.t()), quantize_torch(x12.t(), pow2=True)))


@pytest.mark.parametrize("path", ["torch SDPA", pytest.param("Triton", marks=no_triton)])
def test_attentions_output_waits_once_for_its_own_backward_and_for_the_linear_after_it(path, monkeypatch):
    monkeypatch.setattr(backend, "attention", lambda *_: (path, "a test"))
    c = tiny(n_heads=2, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=32, seq_len=16)
    layer, kept, device = MLA(c).to("cuda" if GPU else "cpu"), {}, "cuda" if GPU else "cpu"
    for p in layer.parameters():
        torch.nn.init.normal_(p)
    fp8.convert(layer, reference=True)
    x = torch.randn(2, 16, c.dim, dtype=torch.bfloat16 if GPU else torch.float32, device=device, requires_grad=True)

    def keep(t):
        kept.setdefault(t.untyped_storage().data_ptr(), []).append(t)
        return t
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        layer(x, rope_table(c).to(device))
    (output, waits), = [ts for ts in kept.values() if ts[-1].shape == (32, 64)]                # wo's input
    assert output.shape in ((2, 16, 2, 32), (2, 2, 16, 32))                                    # as attention wrote it
    assert output.untyped_storage().nbytes() == output.nbytes == waits.nbytes


def test_weights_are_quantized_once_per_step_and_again_when_somebody_wrote_to_them(monkeypatch):
    made = []
    whole = fp8_tiles.quantize_blocks
    monkeypatch.setattr(fp8, "quantize_blocks", lambda w, reference: made.append(1) or whole(w, reference))
    layer, x, dy = linear_fp8(8, 16, 24)
    for _ in range(3):                                                         # micro-batches
        layer(x).backward(dy)
    assert len(made) == 1
    optimizer = fp8.AdamW([layer.weight], 0.1, (0.9, 0.95), 1e-8)
    optimizer.state[layer.weight] = {"step": torch.zeros(()), "exp_avg": torch.zeros(24, 16),
                                     "exp_avg_sq": torch.zeros(24, 16)}
    optimizer.step()
    after = layer(x)
    assert len(made) == 2 and torch.equal(after, gemm_torch(quantize_torch(x), quantize_torch(layer.weight, 128)))
    with torch.no_grad():
        layer.state_dict()["weight"].mul_(2.0)                                 # as a checkpoint is loaded
    assert error(layer(x), 2 * after) < 1e-6 and len(made) == 3
    layer.to(torch.float64)                                                    # a new tensor under the same parameter
    layer(x.double())
    assert len(made) == 4


def test_recomputing_a_layer_quantizes_no_weight_again(monkeypatch):
    made, whole = [], fp8_tiles.quantize_blocks
    monkeypatch.setattr(fp8, "quantize_blocks", lambda w, reference: made.append(1) or whole(w, reference))
    v3 = V3(tiny(precision="fp8_reference", recompute=True))
    v3.loss(random_tokens(2, 34))[0].backward()
    assert len(made) == sum(1 + isinstance(m, MoE) for m in v3.modules() if getattr(m, "recipe", None))


def test_backward_uses_the_weight_of_its_forward_pass():
    layer, x, dy = linear_fp8(8, 16, 24)
    w, y = quantize_torch(layer.weight.detach(), 128), layer(x)
    with torch.no_grad():
        layer.weight.mul_(2.0)
    y.backward(dy)
    assert torch.equal(x.grad, gemm_torch(quantize_torch(dy), w.mT))


@pytest.mark.parametrize("experts", [False, True])
def test_wgrad_can_be_put_off_into_a_queue(experts):
    w = torch.randn(2, 40, 30) if experts else torch.randn(40, 30)
    x, dy, ends = torch.randn(50, 30), torch.randn(50, 40), [20, 50] if experts else [50]
    now, later = w.clone().requires_grad_(), w.clone().requires_grad_()
    later.queue = []
    for weight in (now, now, later, later):                                    # two micro-batches each
        Products.apply(x.clone().requires_grad_(), weight, ends, Recipe(reference=True)).backward(dy)
    assert later.grad is None and len(later.queue) == 2
    for put_off in later.queue:
        put_off()
    assert torch.equal(later.grad, now.grad) and now.grad.abs().sum() > 0


@pytest.mark.parametrize("experts", [False, True])
def test_a_queue_that_waits_for_nothing_adds_inside_the_product_and_autograd_gets_a_tensor_of_its_own(experts):
    w = torch.randn(2, 40, 30) if experts else torch.randn(40, 30)
    x, dy, ends = torch.randn(50, 30), torch.randn(50, 40), [20, 50] if experts else [50]
    plain, at_once = w.clone().requires_grad_(), w.clone().requires_grad_()
    at_once.queue = fp8.AtOnce()
    run = lambda weight: Products.apply(x.clone().requires_grad_(), weight, ends, Recipe(reference=True))
    for weight in (plain, plain, at_once):
        run(weight).backward(dy)
    there = at_once.grad
    run(at_once).backward(dy)
    assert at_once.grad is there and torch.equal(there, plain.grad)            # the same tensor: nothing was copied
    before = plain.grad.clone()
    (own,) = torch.autograd.grad(run(plain), plain, dy)
    assert torch.equal(plain.grad, before) and torch.equal(own + own, before)
    seen = []
    plain.register_hook(lambda grad: seen.append(grad) or 3 * grad)            # a hook sees it, and may change it
    run(plain).backward(dy)
    assert torch.equal(seen[0], own) and error(plain.grad, before + 3 * own) < 1e-6


def test_the_weights_follow_the_optimizer_of_train():
    from train import make_optimizer
    for moments in ("fp32", "bf16"):
        v3 = V3(tiny(precision="fp8_reference", moments=moments))
        optimizer, tokens = make_optimizer(v3.config, v3.parameters()), random_tokens(2, 34)
        v3.loss(tokens)[0].backward()
        optimizer.step()
        fresh = V3(v3.config)
        fresh.load_state_dict(v3.state_dict())
        assert torch.equal(v3.loss(tokens)[0], fresh.loss(tokens)[0])


def test_without_gradients_nothing_is_kept():
    layer, x, _ = linear_fp8(8, 16, 24)
    with torch.no_grad():
        assert layer(x).grad_fn is None
    layer(x).sum().backward()


# --- SwiGLU and experts -----------------------------------------------------------------------------------------------

def test_an_ffn_keeps_the_input_of_its_swiglu_in_fp8_and_makes_the_output_again():
    ffn = FFN(96, 160)
    for p in ffn.parameters():
        torch.nn.init.normal_(p, 0.0, 0.1)
    plain = copy.deepcopy(ffn)
    fp8.convert(ffn, reference=True)
    x, dy, kept = torch.randn(64, 96), torch.randn(64, 96), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ffn(x.requires_grad_()).backward(dy)
    assert [t.shape[1] for t in kept if t.dtype == torch.float8_e4m3fn] == [96, 320]           # x and [a, b], no hidden
    h = gemm_torch(quantize_torch(x.detach()), quantize_torch(ffn.w13.weight.detach(), 128))
    hidden = SwiGLU.apply(quantize_torch(h).dequantize())
    assert error(ffn.w2.weight.grad, gemm_torch(quantize_torch(dy.t()), quantize_torch(hidden.t()))) < 1e-6
    plain(x.detach()).backward(dy)
    for (name, ours), theirs in zip(ffn.named_parameters(), plain.parameters()):
        assert error(ours.grad, theirs.grad) < 0.08, name


def test_a_row_of_a_group_meets_its_own_expert_and_an_idle_experts_gradient_is_zero():
    E, inner, out, ends = 4, 140, 36, [50, 50, 183, 200]                       # the second has no rows
    w = torch.randn(E, out, inner, requires_grad=True)
    x, dy = torch.randn(200, inner, requires_grad=True), torch.randn(200, out)
    Products.apply(x, w, ends, Recipe(reference=True)).backward(dy)
    for e, (start, end) in enumerate(zip([0, *ends], ends)):
        own = w[e].detach().clone().requires_grad_()
        rows = x[start:end].detach().requires_grad_()
        if end > start:
            Products.apply(rows, own, [end - start], Recipe(reference=True)).backward(dy[start:end])
            assert torch.equal(w.grad[e], own.grad) and torch.equal(x.grad[start:end], rows.grad)
        else:
            assert (w.grad[e] == 0).all()


class Doubled(torch.autograd.Function):
    """In place, as RoPE turns."""

    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


def test_what_is_done_in_place_to_the_output_of_a_linear_copies_no_gradient():
    layer, x = Linear(40, 60), torch.randn(2, 3, 40, requires_grad=True)
    torch.nn.init.normal_(layer.weight)
    layer.recipe = Recipe(reference=True)
    y = Doubled.apply(layer(x))
    assert type(y.grad_fn.next_functions[0][0]).__name__ == "ProductsBackward"             # for a view: CopySlices
    y.sum().backward()
    assert x.grad.shape == x.shape and error(x.grad, 2 * torch.ones(2, 3, 60) @ layer.weight.detach()) < 0.1


def test_a_float32_product_in_three_bf16_parts_loses_nothing_of_its_factors(monkeypatch):
    x, dy = torch.randn(2, 30, 300).bfloat16(), torch.randn(2, 30, 17)
    weight = torch.randn(17, 300) * torch.logspace(-3, 3, 17)[:, None]
    assert torch.equal(sum(part.float() for part in fp8.parts(weight)), weight)
    monkeypatch.setattr(backend, "multiply_in_parts", lambda x, dtype: dtype == torch.float32)
    leaf, w = x.clone().requires_grad_(), torch.nn.Parameter(weight.clone())
    y = fp8.linear(leaf, w, torch.float32)
    assert y.dtype == torch.float32 and error(y, x.double() @ weight.double().t()) < 5e-7
    y.backward(dy)
    exact = dy.double() @ weight.double()
    assert leaf.grad.dtype == torch.bfloat16 and error(leaf.grad, exact) < 1.01 * error(exact.bfloat16(), exact)
    assert error(w.grad, dy.double().flatten(0, 1).t() @ x.double().flatten(0, 1)) < 5e-7
    queue = []
    w.queue, before = queue, w.grad.clone()
    fp8.linear(leaf, w, torch.float32).backward(dy)
    assert torch.equal(w.grad, before)
    queue[0]()
    assert torch.equal(w.grad, 2 * before)


def test_the_gate_weight_of_a_row_gets_its_gradient_through_the_recomputed_swiglu():
    h, weight, w = torch.randn(60, 48), torch.rand(60), torch.randn(2, 30, 24)
    grads = []
    for recipe in (None, Recipe(reference=True)):
        inputs = [t.clone().requires_grad_() for t in (h, weight, w)]
        if recipe:
            y = Products.apply(inputs[0], inputs[2], [20, 60], recipe, True, inputs[1])
        else:
            hidden = weighted_swiglu(*inputs[:2])
            y = torch.cat([hidden[:20] @ inputs[2][0].t(), hidden[20:] @ inputs[2][1].t()])
        y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape))
        grads.append([t.grad for t in inputs])
    for name, ours, theirs in zip(("h", "gate weight", "w"), grads[1], grads[0]):
        assert error(ours, theirs) < 0.08, name


def test_a_mixture_in_fp8_computes_the_mixture():
    c = tiny(dim=64, moe_inter_dim=40, balance_alpha=0.0)
    plain = MoE(c)
    for p in plain.parameters():
        torch.nn.init.normal_(p, 0.0, 0.2)
    low = copy.deepcopy(plain)
    converted, _ = fp8.convert(low, reference=True)
    assert sorted(converted) == ["", "shared.w13", "shared.w2"]
    x = torch.randn(2, 50, 64)
    ours, theirs = low(x)[0], plain(x)[0]
    assert error(ours.detach(), theirs.detach()) < 0.08
    dy = torch.randn_like(ours)
    ours.backward(dy)
    theirs.backward(dy)
    for (name, a), b in zip(low.named_parameters(), plain.parameters()):
        assert error(a.grad, b.grad) < 0.12, name


# --- the model --------------------------------------------------------------------------------------------------------

def test_convert_leaves_embedding_head_gates_norms_and_eh_proj_and_says_so():
    v3 = V3(tiny(q_lora_rank=14, precision="fp8_reference"))
    converted, left = v3.converted
    attention = {"attn.wq_a", "attn.wq_b", "attn.wkv_a", "attn.wkv_b", "attn.wo"}
    blocks = ["layers.0", "layers.1", "layers.2", "mtp.0.block"]
    expected = {f"{b}.{name}" for b in blocks for name in attention} | {"layers.0.ffn.w13", "layers.0.ffn.w2"} \
        | {f"{b}.ffn{part}" for b in blocks[1:] for part in ("", ".shared.w13", ".shared.w2")}
    assert set(converted) == expected
    assert {"embed", "head", "norm", "layers.1.ffn.gate", "mtp.0.eh_proj", "layers.0.attn.kv_norm"} <= left.keys()
    owners = {name.rpartition(".")[0] for name, _ in v3.named_parameters()}
    assert owners == expected | left.keys() and not expected & left.keys()     # nobody is forgotten
    recipes = {name: m.recipe for name, m in v3.named_modules() if getattr(m, "recipe", None)}
    after = {f"{b}.attn.wo" for b in blocks}
    assert {name for name, recipe in recipes.items() if recipe.kept is E5M6} == after
    assert {name for name, recipe in recipes.items() if recipe.pow2} == after | {
        name for name, m in v3.named_modules() if isinstance(m, MoE)}


def test_the_gradients_of_an_fp8_model_point_where_those_of_a_float32_one_do():
    plain, low = lively(V3(tiny(init_std=0.05))), lively(V3(tiny(init_std=0.05, precision="fp8_reference")))
    tokens, losses = random_tokens(4, 34), []
    for model in (plain, low):
        loss, _ = model.loss(tokens)
        loss.backward()
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=0.01) and losses[0] != losses[1]
    for (name, theirs), ours in zip(gradients(plain).items(), gradients(low).values()):
        assert F.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0) > 0.9, name
        assert ours.dtype == torch.float32


@pytest.mark.parametrize("what", ["recompute", "recompute_mla"])
def test_recomputing_changes_no_bit_of_the_gradients(what):
    found = []
    for on in (False, True):
        v3 = lively(V3(tiny(precision="fp8_reference", **{what: on})))
        v3.loss(random_tokens(2, 34))[0].backward()
        found.append(gradients(v3))
    assert [name for name, g in found[0].items() if not torch.equal(g, found[1][name])] == []


@pytest.mark.parametrize("moments", ["fp32", "bf16"])
def test_training_in_fp8_follows_training_in_float32(moments):
    from train import make_optimizer
    finals = []
    for precision in ("fp32", "fp8_reference"):
        v3 = V3(tiny(precision=precision, moments=moments, init_std=0.1, lr=3e-3))
        optimizer = make_optimizer(v3.config, v3.parameters())
        for step in range(25):
            loss, parts = v3.loss(random_tokens(8, 34, vocab=9, seed=step % 4))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        finals.append(parts["loss"].item())
    print(f"loss after 25 steps: float32 {finals[0]:.4f}, FP8 {finals[1]:.4f}")
    assert finals[0] < 2.5 and finals[1] == pytest.approx(finals[0], rel=0.01)                  # from 4.2


def test_fp8_on_a_machine_without_it_is_refused_in_one_line_that_names_the_reference(monkeypatch):
    import train
    from configs import UserError
    with pytest.raises(UserError, match="no GPU.*fp8_reference") as e:
        train.main(["configs/char.py", "--precision=fp8", "--device=cpu"])
    assert "\n" not in str(e.value)
    with pytest.raises(UserError, match="--compile.*does not go with precision = 'fp8_reference'"):
        train.main(["configs/char.py", "--precision=fp8_reference", "--compile"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    monkeypatch.setattr(backend, "has_triton", lambda: True)
    path, why = backend.fp8_kernels(torch.device("cuda"))
    assert path == "torch" and "A100" in why and "8.9" in why


# --- the released checkpoint's format ---------------------------------------------------------------------------------

def test_a_folder_saved_in_fp8_has_the_released_ones_names_dtypes_and_blocks_and_comes_back(tmp_path, monkeypatch):
    v3 = lively(V3(tiny(dim=136, inter_dim=300, moe_inter_dim=140, q_lora_rank=14, kv_lora_rank=130)))
    monkeypatch.setattr("model.SHARD_BYTES", 400_000)
    save_hf(v3, tmp_path / "hf", fp8=True)
    index = json.loads((tmp_path / "hf/model.safetensors.index.json").read_text())
    stored = {}
    for file in set(index["weight_map"].values()):
        stored |= load_file(tmp_path / "hf" / file)
    assert stored.keys() == index["weight_map"].keys() and len(set(index["weight_map"].values())) > 2
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in stored.values())
    eight = {name for name, t in stored.items() if t.dtype == torch.float8_e4m3fn}
    assert {name for name in stored if name.endswith("_scale_inv")} == {name + "_scale_inv" for name in eight}
    kinds = {re.sub(r"\.\d+", "", name) for name in eight}
    assert kinds == {f"model.layers.{name}.weight" for name in (
        "self_attn.q_a_proj", "self_attn.q_b_proj", "self_attn.kv_a_proj_with_mqa", "self_attn.kv_b_proj",
        "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "mlp.experts.gate_proj",
        "mlp.experts.up_proj", "mlp.experts.down_proj", "mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj",
        "mlp.shared_experts.down_proj")}
    up = stored["model.layers.0.mlp.up_proj.weight_scale_inv"]                 # [300, 136]: blocks of its own
    assert up.shape == (3, 2) and up.dtype == torch.float32
    for name, ours in official_tensors(v3).items():
        if name in eight:
            q = quantize_torch(ours, 128)
            assert torch.equal(stored[name].view(torch.uint8), q.values.view(torch.uint8))
            assert torch.equal(stored[name + "_scale_inv"], q.scale)
        else:
            assert stored[name].dtype == (torch.float32 if name.endswith("_bias") else torch.bfloat16)
    back, config = from_hf(tmp_path / "hf"), json.loads((tmp_path / "hf/config.json").read_text())
    assert config["quantization_config"] == {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
                                             "weight_block_size": [128, 128]}
    for (name, ours), theirs in zip(official_tensors(v3).items(), official_tensors(back).values()):
        expected = quantize_torch(ours, 128).dequantize() if name in eight else stored[name].float()
        assert torch.equal(theirs, expected), name
        assert error(theirs, ours) < 0.04, name


# --- the optimizer's states -------------------------------------------------------------------------------------------

def optimizers(dtype, steps=20):
    """Weights after some steps of our AdamW with moments of `dtype`, after the same steps of torch's, and ours."""
    ours = [torch.randn(40, 30), torch.randn(17)]
    theirs = [p.clone() for p in ours]
    options = dict(lr=0.02, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    a, b = fp8.AdamW(ours, **options), torch.optim.AdamW(theirs, **options)
    for p in ours:
        a.state[p] = {"step": torch.zeros(()), "exp_avg": torch.zeros_like(p, dtype=dtype),
                      "exp_avg_sq": torch.zeros_like(p, dtype=dtype)}
    for _ in range(steps):
        for p, q in zip(ours, theirs):
            p.grad = q.grad = torch.randn_like(p) * 10.0 ** torch.randint(-4, 2, p.shape)
        a.step()
        b.step()
    return ours, theirs, a


def test_adamw_with_float32_moments_is_torchs_adamw():
    ours, theirs, _ = optimizers(torch.float32)
    for p, q in zip(ours, theirs):
        assert error(p, q) < 1e-6


def test_adamw_with_bf16_moments_stays_near_it_with_half_the_moments_bytes():
    ours, theirs, optimizer = optimizers(torch.bfloat16)
    for p, q in zip(ours, theirs):
        assert 1e-6 < error(p, q) < 0.01
        assert {t.element_size() for key, t in optimizer.state[p].items() if key != "step"} == {2}
