"""Attention over the latent cache: the kernels against their torch form, and the FP8 cache.

The kernel tests run compiled on a GPU, and elsewhere in Triton's interpreter.
"""
import math

import pytest
import torch
from conftest import GPU, no_triton, off_hopper, tiny

import backend
import bench_mla
import configs
import mla_decode
from mla_decode import Fp8Latents, LatentCache, decode_torch, decode_triton, dequantize, quantize
from model import V3

DEVICE = "cuda" if GPU else "cpu"
DTYPE = torch.bfloat16 if GPU else torch.float32          # the interpreter can't multiply BF16, a GPU can't hold FP32
SCALE = 192 ** -0.5


def kernel(test):
    """A test of the kernels: compiled on a GPU, interpreted elsewhere."""
    return pytest.mark.gpu(no_triton(off_hopper(test)))


DIMS = (256, 64) if GPU else (64, 16)                      # r_kv, d_r


def inputs(lengths, T, H, r_kv=DIMS[0], d_r=DIMS[1], capacity=None, beyond=math.nan):
    """q_latent, q_rope, the whole buffer of a cache of two layers' first layer, positions: rows of the given lengths,
    of which the T queries are the last. What lies beyond them is poison."""
    B, capacity = len(lengths), capacity or max(lengths) + 3
    generator = torch.Generator().manual_seed(sum(lengths) + T + H)
    random = lambda *shape: torch.randn(*shape, generator=generator).to(DEVICE, DTYPE)
    latents = random(2, B, capacity, r_kv + d_r)[0]
    positions = torch.tensor(lengths, device=DEVICE)[:, None] - T + torch.arange(T, device=DEVICE)
    latents[torch.arange(capacity, device=DEVICE) >= torch.tensor(lengths, device=DEVICE)[:, None]] = beyond
    return 2 * random(B, T, H, r_kv), random(B, T, H, d_r), latents, positions


def reference(q_latent, q_rope, latents, positions, scale):
    """decode_torch in float64, of clean latents."""
    return decode_torch(q_latent.double(), q_rope.double(), latents.double().nan_to_num(), positions, scale)


def error(x, exact):
    return ((x.double() - exact).norm() / exact.norm()).item()


def close(out, q_latent, q_rope, latents, positions):
    """At most 1.2 times the error of plain BF16; in float32 as good as exact."""
    args = q_rope, latents.nan_to_num(), positions, SCALE
    exact = reference(q_latent, *args)
    ours, plain = error(out, exact), error(decode_torch(q_latent, *args), exact)
    print(f"relative error {ours:.2e}, of the torch form {plain:.2e}")
    assert ours <= (1.2 * plain if DTYPE == torch.bfloat16 else 2e-6)


# --- the kernels against their torch form -----------------------------------------------------------------------------

@kernel
@pytest.mark.parametrize("T", [1, 2, 3, 4])
@pytest.mark.parametrize("H", [8, 16, 20, 128])
def test_queries_of_any_number_and_rows_of_any_length(T, H):
    args = inputs([T, 31, 33, 64, 7 + T, 200], T, H)
    close(decode_triton(*args, SCALE), *args)


@kernel
@pytest.mark.parametrize("splits", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("lengths", [[1, 1], [4], [65, 1, 513], [32, 64, 96], [700]])
@pytest.mark.parametrize("H", [16, 24])
def test_any_number_of_shares_merges_to_the_same_softmax(lengths, splits, H):
    args = inputs(lengths, 1, H)
    close(decode_triton(*args, SCALE, splits), *args)


@kernel
@pytest.mark.parametrize("r_kv, d_r", [(512, 64), (256, 64), (32, 16)])
@pytest.mark.parametrize("T, H", [(1, 16), (2, 16), (3, 32)])
def test_the_dims_of_v3_of_bench_1b_and_of_tiny(r_kv, d_r, T, H):
    args = inputs([100, 37], T, H, r_kv, d_r)
    close(decode_triton(*args, SCALE, 2), *args)


@kernel
@pytest.mark.parametrize("splits", [1, 4])
def test_scores_of_hundreds_neither_overflow_nor_lose_the_largest(splits):
    """A share whose scores are all far below another's has no weight; in exp without the running maximum this is
    inf / inf."""
    q_latent, q_rope, latents, positions = inputs([256, 129], 2, 16)
    latents[:, 70] *= 40
    args = 20 * q_latent, q_rope, latents, positions
    close(decode_triton(*args, SCALE, splits), *args)


@kernel
def test_a_query_sees_its_own_token_and_none_after_it():
    """One key at a time is made the winner of every score: the query's output is that key's value, if it sees it."""
    q_latent, q_rope, latents, positions = inputs([40], 3, 16, beyond=0.0)
    q_latent[:], latents[:] = 1, 0.01 * latents
    for key in (36, 37, 38, 39):
        marked = latents.clone()
        marked[0, key, :DIMS[0]] = 50
        out = decode_triton(q_latent, q_rope, marked, positions, 1.0, 2)
        assert [bool((out[0, t] > 49).all()) for t in range(3)] == [key <= p for p in (37, 38, 39)]


@kernel
def test_a_chunk_of_a_prompt_is_many_queries():
    args = inputs([70, 130], 70, 8)
    close(decode_triton(*args, SCALE), *args)


@kernel
def test_short_rows_beside_a_very_long_one():
    args = inputs([1, 2500, 2, 3], 1, 16)
    close(decode_triton(*args, SCALE, 20), *args)


@kernel
@pytest.mark.parametrize("T, H", [(1, 16), (4, 32)])
def test_an_fp8_cache_gives_what_its_dequantized_copy_gives(T, H):
    q_latent, q_rope, latents, positions = inputs([150, T, 67], T, H, 256, 64, beyond=0.0)
    packed = quantize(latents, 64)
    plain = dequantize(packed, DTYPE)
    packed = Fp8Latents(*(part.clone() for part in packed))
    beyond = torch.arange(latents.shape[1], device=DEVICE) > positions[:, -1:]
    packed.scale[beyond], packed.k_rope[beyond] = math.nan, math.nan
    close(decode_triton(q_latent, q_rope, packed, positions, SCALE, 3), q_latent, q_rope, plain, positions)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU: CUDA graphs")
@pytest.mark.parametrize("fp8", [False, True], ids=["BF16", "FP8"])
def test_a_captured_graph_stays_right_while_rows_grow(fp8):
    cache = LatentCache(2, 3, 600, 576, "cuda", torch.float8_e4m3fn if fp8 else torch.bfloat16, 64)
    q_latent, q_rope, latents, positions = inputs([1, 1, 1], 1, 16, 512, 64, 600, beyond=0.0)
    latents.normal_()
    cache.static = True
    positions = cache.positions(1)                                                         # [3, 1], though all are even
    cache.write(1, torch.arange(600, device="cuda").expand(3, -1), latents)
    step = lambda: mla_decode.decode(q_latent, q_rope, cache.write(1, positions, latents[:, :1]), positions, SCALE)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()                                                                         # compiled before the capture
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for lengths in ([0, 0, 0], [5, 300, 64], [599, 301, 65]):
        positions.copy_(torch.tensor(lengths)[:, None])
        graph.replay()
        held = Fp8Latents(*(b[1] for b in cache.buffers)) if fp8 else cache.latents[1]
        close(out, q_latent, q_rope, dequantize(held, torch.bfloat16) if fp8 else held, positions)


# --- which path runs --------------------------------------------------------------------------------------------------

def test_without_a_gpu_the_torch_form_runs_and_says_why(monkeypatch):
    assert backend.latent_decode(torch.device("cpu"), torch.bfloat16, 512, 64) == ("torch", "no GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    gpu = lambda *dims, dtype=torch.bfloat16: backend.latent_decode(torch.device("cuda"), dtype, *dims)
    if backend.has_triton():
        assert gpu(512, 64)[0] == gpu(256, 64)[0] == gpu(32, 16)[0] == "Triton"
        assert gpu(384, 64) == ("torch", "r_kv = 384 and d_r = 64 are not both powers of two from 16 to 512")
        assert gpu(512, 8)[0] == gpu(1024, 64)[0] == "torch"
        assert "BF16" in gpu(512, 64, dtype=torch.float32)[1]
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
        assert "Hopper" in gpu(512, 64)[1]
    monkeypatch.setattr(backend, "has_triton", lambda: False)
    assert gpu(512, 64) == ("torch", "Triton is not installed")


# --- the cache, in 8 bits ---------------------------------------------------------------------------------------------

def test_each_tile_of_128_channels_has_its_own_scale():
    latent = torch.randn(3, 5, 576)
    latent[..., 128:256] *= 1000
    latent[1, 2] = 0
    packed = quantize(latent, 64)
    assert [p.shape[-1] for p in packed] == [512, 4, 64] and packed.c_kv.dtype == torch.float8_e4m3fn
    back = dequantize(packed, torch.float32)
    size = latent[..., :512].unflatten(-1, (4, 128)).abs().amax(-1)
    off = (back - latent)[..., :512].unflatten(-1, (4, 128)).abs().amax(-1)
    assert (off <= size / 28 + 1e-12).all()                     # half a step of E4M3's topmost binade, 32 of 448
    assert torch.equal(back[..., 512:], latent[..., 512:].bfloat16().float()) and not back[1, 2].any()
    assert torch.equal(packed.c_kv.float().unflatten(-1, (4, 128)).abs().amax(-1)[0], torch.full((5, 4), 448.0))


def test_a_latent_narrower_than_a_tile_is_one_tile():
    assert [p.shape[-1] for p in quantize(torch.randn(2, 26), 10)] == [16, 1, 10]


def test_the_fp8_cache_of_v3_takes_656_bytes_a_layer_where_bf16_takes_1152():
    cache = LatentCache(61, 1, 2, 576, dtype=torch.float8_e4m3fn, d_r=64)
    assert cache.bytes_per_token == 61 * (512 + 4 * 4 + 2 * 64) == 61 * 656
    assert cache.bytes_per_token == sum(b.nbytes for b in cache.buffers) / 2
    assert LatentCache(61, 1, 2, 576, dtype=torch.bfloat16).bytes_per_token == 61 * 1152 == 70_272


def test_the_figure_of_cache_per_token_is_the_arithmetic():
    sizes = bench_mla.cache_per_token(configs.load(["v3_671b"]))
    assert sizes == {"MHA": 61 * 128 * 256 * 2, "GQA-8": 61 * 8 * 256 * 2, "MLA": 70_272, "MLA, FP8": 61 * 656}


def test_a_model_decodes_from_an_fp8_cache_nearly_as_from_its_own():
    v3, tokens = V3(tiny(n_dense_layers=3)).eval(), torch.randint(61, (2, 12))

    def run(cache):
        out = []
        for piece in tokens.split([5, 1, 2, 4], 1):
            out.append(v3(piece, cache))
            cache.advance(piece.shape[1])
        return torch.cat(out, 1)

    with torch.no_grad():
        exact, packed = run(v3.cache(2, 12)), run(v3.cache(2, 12, fp8=True))
    assert torch.equal(exact[:, :5], packed[:, :5])                                    # prefill doesn't read the cache
    assert 1e-5 < error(packed[:, 5:], exact[:, 5:].double()) < 0.05
    assert v3.cache(2, 12, fp8=True).bytes_per_token == 3 * (16 + 4 + 2 * 10)


# --- lengths and rollback ---------------------------------------------------------------------------------------------

def test_a_rejected_draft_is_forgotten_by_not_counting_it():
    cache = LatentCache(1, 2, 6, 3)
    cache.write(0, cache.positions(2), torch.ones(2, 2, 3))
    cache.advance(torch.tensor([2, 1]))                                     # row 1's second token was rejected
    assert cache.lengths.tolist() == [2, 1] and cache.longest == 2
    seen = cache.write(0, cache.positions(2), torch.full((2, 2, 3), 2.0))
    assert seen[:, :, 0].tolist() == [[1, 1, 2, 2], [1, 2, 2, 0]]
    cache.advance(2)
    cache.advance(-1)                                                       # and of both rows the last
    assert cache.lengths.tolist() == [3, 2] and cache.longest == 3 and not cache.even
