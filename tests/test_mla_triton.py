"""The kernels of mla.py against the torch forms that specify them: on a CPU in Triton's interpreter (float32, small),
on a GPU compiled (pytest -m gpu)."""
import pytest
import torch
from conftest import GPU, agree, off_hopper, tiny
from torch.utils.checkpoint import checkpoint

import backend
import mla
import mla_attention
from mla import rms_norm_torch, rms_norm_triton, split_rope_torch
from mla_attention import attention_torch, attention_triton, document_starts

pytest.importorskip("triton", reason="triton is not installed: the torch forms are all there is")
interpreted = pytest.mark.skipif(GPU, reason="the kernels are compiled here: pytest -m gpu")
gpu = [pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="needs a CUDA GPU"), off_hopper]

TINY, V3 = (16, 16, 32), (128, 64, 128)                                                       # d_n, d_r, d_v


def operands(B, T, H, dims, dtype=torch.float32, device="cpu", docs=False):
    """As the projections leave them: q [B, T, H, d_n + d_r], kv [B, T, H, d_n + d_v], k_rope; an output gradient; and
    the documents' starts."""
    d_n, d_r, d_v = dims
    generator = torch.Generator(device).manual_seed(T + H)
    shapes = [(B, T, H, d_n + d_r), (B, T, H, d_n + d_v), (B, T, 1, d_r), (B, T, H, d_v)]
    values = [torch.randn(s, generator=generator, device=device).to(dtype) for s in shapes]
    tokens = torch.randint(70, (B, T), generator=generator, device=device)
    return values, document_starts(tokens, 0) if docs else None


def values_and_gradients(form, values, dims, starts, scale=0.1):
    """[out, dq, dkv, dk_rope] of a form of attention."""
    q, kv, k_rope = (t.detach().requires_grad_() for t in values[:3])
    (q_nope, q_rope), (k_nope, v) = q.split(dims[:2], -1), kv.split([dims[0], dims[2]], -1)
    out = form(q_nope, q_rope, k_nope, k_rope, v, scale, starts)
    return [out.detach(), *torch.autograd.grad(out, (q, kv, k_rope), values[3])]


def errors(ours, reference):
    """Relative Frobenius errors, one per tensor."""
    pairs = [(a.double(), b.double()) for a, b in zip(ours, reference)]
    return [((a - b).norm() / b.norm().clamp_min(1e-30)).item() for a, b in pairs]


# --- in the interpreter -----------------------------------------------------------------------------------------------

@interpreted
@pytest.mark.parametrize("docs", [False, True], ids=["one text", "documents"])
@pytest.mark.parametrize("B, T, H, dims", [(2, 17, 3, TINY), (2, 200, 2, TINY), (1, 290, 1, TINY), (1, 130, 2, V3)])
def test_the_kernels_compute_what_torch_does_forward_and_backward(B, T, H, dims, docs):
    values, starts = operands(B, T, H, dims, docs=docs)
    ours = values_and_gradients(attention_triton, values, dims, starts)
    reference = values_and_gradients(attention_torch, [t.double() for t in values], dims, starts)
    found = errors(ours, reference)
    print("relative errors of out, dq, dkv, dk_rope:", " ".join(f"{e:.1e}" for e in found))
    assert max(found) < 3e-6


@interpreted
def test_a_text_of_one_token_is_its_own_value_and_has_no_gradient_but_that():
    values, _ = operands(2, 1, 3, TINY)
    out, dq, dkv, dk_rope = values_and_gradients(attention_triton, values, TINY, None)
    agree(out, values[1][..., 16:], 1e-6, "out = v")
    agree(dkv[..., 16:], values[3], 1e-6, "dv = dout")
    assert max(t.abs().max() for t in (dq, dkv[..., :16], dk_rope)) < 1e-6


@interpreted
def test_operands_may_lie_anywhere_in_memory():
    values, _ = operands(1, 40, 2, TINY)
    q, kv, k_rope, dout = values
    odd = lambda t: torch.nn.functional.pad(t, (1, 0))[..., 1:]                         # no tile can begin there
    expected = attention_torch(q[..., :16], q[..., 16:], kv[..., :16], k_rope, kv[..., 16:], 0.1)
    moved = [odd(t) for t in (q[..., :16], q[..., 16:], kv[..., :16], k_rope, kv[..., 16:])]
    agree(attention_triton(*moved, 0.1), expected, 1e-6, "shifted by one element")
    v = kv[..., 16:].detach().requires_grad_()
    (dv,) = torch.autograd.grad(attention_triton(q[..., :16], q[..., 16:], kv[..., :16], k_rope, v, 0.1).sum(), v)
    expected = torch.autograd.grad(attention_torch(q[..., :16], q[..., 16:], kv[..., :16], k_rope, v, 0.1).sum(), v)[0]
    agree(dv, expected, 1e-5, "a gradient that is one number, expanded")


@interpreted
def test_under_checkpoint_the_output_is_kept_and_the_operands_are_made_again(monkeypatch):
    values, starts = operands(1, 40, 2, TINY, docs=True)
    plain = values_and_gradients(attention_triton, values, TINY, starts)
    kept, runs = [], []
    launch = mla_attention.attention_forward
    class Counted:
        def __getitem__(self, grid):
            runs.append(grid)
            return launch[grid]
    monkeypatch.setattr(mla_attention, "attention_forward", Counted())

    def again(q_nope, q_rope, k_nope, k_rope, v, scale, starts):
        form = lambda *t: attention_triton(*(2 * x / 2 for x in t), scale, starts, kept)
        return checkpoint(form, q_nope, q_rope, k_nope, k_rope, v, use_reentrant=False)

    ours = values_and_gradients(again, values, TINY, starts)
    assert all(torch.equal(a, b) for a, b in zip(ours, plain)) and len(runs) == 1


@interpreted
@pytest.mark.parametrize("dim", [33, 512])
def test_the_fused_norm_computes_what_the_torch_form_does(dim):
    wide, weight, dy = torch.randn(3, 5, dim + 7), torch.rand(dim) + 0.5, torch.randn(3, 5, dim)
    out = []
    for form in (rms_norm_triton, rms_norm_torch):
        x, w = wide[..., :dim].detach().requires_grad_(), weight.detach().requires_grad_()   # rows with a gap between
        y = form(x, w, 1e-6)
        out.append([y.detach(), *torch.autograd.grad(y, (x, w), dy)])
    for ours, theirs, what in zip(*out, ("y", "dx", "dw")):
        agree(ours, theirs, 2e-6, what)


@interpreted
@pytest.mark.parametrize("rows", [False, True], ids=["the same positions", "each row its own"])
@pytest.mark.parametrize("H", [1, 3])
def test_the_fused_rope_turns_as_the_torch_form_does_and_back(H, rows):
    c = tiny(qk_rope_head_dim=16)
    rope = mla.rope_table(c)
    rope = rope[torch.randint(32, (2, 7))] if rows else rope[:7]
    first, dout = torch.randn(2, 7, H * 40), torch.randn(2, 7, H, 40)
    out = []
    for form in (mla.split_rope_triton, split_rope_torch):
        x = first.clone().requires_grad_()
        plain, turned = form(x * 1, H, rope)
        (dx,) = torch.autograd.grad((plain * dout[..., :24]).sum() + (turned * dout[..., 24:]).sum(), x)
        out.append((plain.detach(), turned.detach(), dx))
    for ours, theirs, what in zip(*out, ("plain", "turned", "dx")):
        agree(ours, theirs, 1e-6, what)


# --- anywhere ---------------------------------------------------------------------------------------------------------

def test_documents_begin_after_each_end_of_text():
    tokens = torch.tensor([[5, 0, 6, 7, 0, 0, 8], [0, 1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1, 1]])
    assert document_starts(tokens, 0).tolist() == [[0, 0, 2, 2, 2, 5, 6], [0, 1, 1, 1, 1, 1, 1], [0] * 7]
    assert document_starts(tokens[:, :1], 0).tolist() == [[0], [0], [0]]


def test_a_packed_document_is_attended_to_as_if_it_were_alone():
    values, _ = operands(1, 12, 2, TINY, torch.float64)
    q, kv, k_rope, _ = values
    form = lambda s, starts=None: attention_torch(q[:, s, :, :16], q[:, s, :, 16:], kv[:, s, :, :16], k_rope[:, s],
                                                  kv[:, s, :, 16:], 0.3, starts)
    starts = torch.tensor([[0] * 5 + [5] * 7], dtype=torch.int32)
    agree(form(slice(0, 12), starts), torch.cat([form(slice(0, 5)), form(slice(5, 12))], 1), 1e-12)


def test_a_split_of_what_lies_together_hands_back_the_one_buffer():
    both, seen = torch.randn(2, 3, 10), []
    for parts in (both.split([4, 6], -1), [both[..., :4].clone(), both[..., 4:]], [both[..., 6:], both[..., :6]]):
        whole = torch.randn(2, 3, 10, requires_grad=True) * 1
        whole.register_hook(seen.append)
        torch.autograd.backward(mla.Split.apply(whole, 4), parts)
        assert torch.equal(seen[-1], torch.cat(tuple(parts), -1))
    assert [g.data_ptr() == both.data_ptr() for g in seen] == [True, False, False]


@pytest.mark.parametrize("dims, path", [(V3, "Triton"), (TINY, "Triton"), ((24, 10, 20), "torch SDPA"),
                                        ((256, 64, 128), "torch SDPA"), ((128, 128, 128), "torch SDPA")])
def test_the_table_names_the_path_of_attention_and_why(dims, path, monkeypatch):
    monkeypatch.setattr(backend, "has_triton", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    found, why = backend.attention(torch.device("cuda"), torch.bfloat16, dims)
    assert found == path and (path == "Triton" or str(dims[0]) in why)
    assert backend.attention(torch.device("cuda"), torch.float32, dims)[0] == "torch SDPA"
    assert backend.attention(torch.device("cpu"), torch.bfloat16, dims)[0] == "torch SDPA"


# --- compiled ---------------------------------------------------------------------------------------------------------

def by_heads(form, values, dims, starts, step=16):
    """values_and_gradients, `step` heads at a time: a float32 reference of 128 heads and 4096 tokens fits in memory."""
    q, kv, k_rope, dout = values
    parts = [values_and_gradients(form, [q[:, :, h:h + step], kv[:, :, h:h + step], k_rope, dout[:, :, h:h + step]],
                                  dims, starts) for h in range(0, q.shape[2], step)]
    out, dq, dkv, dk_rope = zip(*parts)
    return [torch.cat(out, 2), torch.cat(dq, 2), torch.cat(dkv, 2), sum(t.double() for t in dk_rope)]


class TestCompiled:
    pytestmark = gpu

    @pytest.mark.parametrize("docs", [False, True], ids=["one text", "documents"])
    @pytest.mark.parametrize("dims", [TINY, V3], ids=["tiny", "V3"])
    @pytest.mark.parametrize("H", [4, 16, 128])
    @pytest.mark.parametrize("T", [1, 17, 128, 1000, 4096])
    def test_in_bf16_the_kernels_err_no_more_than_torchs_own(self, T, H, dims, docs):
        values, starts = operands(1, T, H, dims, torch.bfloat16, "cuda", docs)
        reference = by_heads(attention_torch, [t.float() for t in values], dims, starts)
        ours = errors(values_and_gradients(attention_triton, values, dims, starts), reference)
        theirs = errors(values_and_gradients(attention_torch, values, dims, starts), reference)
        print("ours / torch's:", " ".join(f"{a:.2e}/{b:.2e}" for a, b in zip(ours, theirs)))
        names = ("out", "dkv") if T == 1 else ("out", "dq", "dkv", "dk_rope")         # one token: the others are zero
        for name, a, b in zip(("out", "dq", "dkv", "dk_rope"), ours, theirs):
            assert name not in names or a <= 1.2 * b + 1e-5, f"{name}: {a:.2e} against {b:.2e}"

    @pytest.mark.parametrize("docs", [False, True], ids=["one text", "documents"])
    def test_the_same_bits_come_every_time_and_for_a_row_alone(self, docs):
        values, starts = operands(3, 1000, 16, V3, torch.bfloat16, "cuda", docs)
        runs = [values_and_gradients(attention_triton, values, V3, starts) for _ in range(3)]
        assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0]))
        alone = values_and_gradients(attention_triton, [t[1:2] for t in values], V3, starts[1:2] if docs else None)
        assert all(torch.equal(a[0], b[1]) for a, b in zip(alone, runs[0]))

    @pytest.mark.parametrize("T", [64, 129, 2048])
    def test_scores_of_hundreds_in_any_order_leave_finite_weights(self, T):
        """Keys that beat all before them, tile after tile, and one that beats all: the running maximum is at work."""
        values, _ = operands(2, T, 8, V3, torch.bfloat16, "cuda")
        values[1][..., :128] *= torch.linspace(8, 1, T, device="cuda").bfloat16()[:, None, None]
        reference = values_and_gradients(attention_torch, [t.double() for t in values], V3, None)
        ours = errors(values_and_gradients(attention_triton, values, V3, None), reference)
        theirs = errors(values_and_gradients(attention_torch, values, V3, None), reference)
        assert all(a <= 1.2 * b + 1e-5 for a, b in zip(ours, theirs)), (ours, theirs)

    @pytest.mark.parametrize("dim", [512, 1536, 7168])
    def test_the_fused_norm_in_bf16(self, dim):
        x, dy = torch.randn(2, 1000, 3, dim, device="cuda").bfloat16()[:, :, :2].unbind(2)
        weight, out, bf16 = torch.rand(dim, device="cuda") + 0.5, [], torch.bfloat16
        for form, dtype in ((rms_norm_triton, bf16), (rms_norm_torch, bf16), (rms_norm_torch, torch.float64)):
            a, w = x.to(dtype).requires_grad_(), weight.detach().requires_grad_()
            y = form(a, w, 1e-6)
            out.append([y.detach(), *torch.autograd.grad(y, (a, w), dy.to(dtype))])
        for a, b, name in zip(errors(out[0], out[2]), errors(out[1], out[2]), ("y", "dx", "dw")):
            print(f"{name}: {a:.2e}, torch's {b:.2e}")
            assert a <= 1.05 * b + 1e-6, name

    def test_the_layer_with_every_kernel_equals_the_layer_without(self, monkeypatch):
        c = tiny(dim=256, n_heads=4, q_lora_rank=64, kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16,
                 v_head_dim=32, seq_len=300)
        layer = mla.MLA(c).cuda()
        for p in layer.parameters():
            torch.nn.init.normal_(p, std=0.06)
        x, rope = torch.randn(2, 300, 256, device="cuda"), mla.rope_table(c).cuda()
        def run(dtype):
            layer.zero_grad()
            a = x.to(dtype).requires_grad_()
            y = layer(a, rope)
            y.backward(x.to(dtype).flip(1))
            return [y.detach(), a.grad, *(p.grad.clone() for p in layer.parameters())]
        fused = run(torch.bfloat16)
        monkeypatch.setattr(backend, "use_small_kernels", lambda x: False)
        monkeypatch.setattr(backend, "attention", lambda *a: ("torch SDPA", ""))
        plain, reference = run(torch.bfloat16), run(torch.float32)
        for a, b in zip(errors(fused, reference), errors(plain, reference)):
            assert a <= 1.2 * b + 1e-5
