"""What the tests share: a tiny Config, a model in which nothing is neutral, and a comparison that prints its error."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"                   # before Triton is imported: its kernels run on the CPU then

import backend  # noqa: E402
from configs import Config  # noqa: E402
from model import V3  # noqa: E402
from tokenizer import tokenizer_json  # noqa: E402

GPU = torch.cuda.is_available()
no_triton = pytest.mark.skipif(not backend.has_triton(), reason="Triton is not installed")
off_hopper = pytest.mark.skipif(GPU and not backend.hopper(torch.device("cuda")), reason="the kernel is Hopper's")

torch.set_num_threads(1)                                   # tiny matrices: a second thread only waits for the first


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)                                   # whatever ran before, a test sees the same numbers


def tiny(**changes):
    """A Config of a few thousand parameters in which no two dims are equal, so that no mixed-up pair can pass."""
    fields = dict(vocab_size=61, dim=32, n_layers=3, n_dense_layers=1, inter_dim=44, moe_inter_dim=12, n_heads=3,
                  kv_lora_rank=16, qk_nope_head_dim=24, qk_rope_head_dim=10, v_head_dim=20, n_routed_experts=8,
                  n_activated_experts=2, route_scale=1.7, n_mtp=1, init_std=0.2, seq_len=32)
    return Config(**{**fields, **changes})


YARN = dict(seq_len=16, original_seq_len=16, max_seq_len=64)            # short enough that a test walks far beyond it
GROUPS = dict(n_routed_experts=16, n_activated_experts=4, n_expert_groups=4, n_limited_groups=2)


def lively(module, bias=0.0):
    """Norm weights off one and gate biases around `bias`: at their initial values a forgotten one would not show."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if name.endswith("norm.weight"):
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
            if name.endswith("gate.bias"):
                tensor.copy_(bias + 0.1 * torch.randn(tensor.shape, generator=generator))
    return module


def build(bias=0.0, **changes):
    """A lively V3 in float64."""
    return lively(V3(tiny(**changes)), bias).double()


def random_tokens(*shape, vocab=61, seed=0):
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


def agree(ours, theirs, limit, what="values", least=1e-30):
    """Same shape, and the largest difference at most `limit` times the largest value (counted as `least` where all
    vanish); prints it (pytest -rP shows it)."""
    assert ours.shape == theirs.shape, f"{what}: {tuple(ours.shape)} against {tuple(theirs.shape)}"
    error = ((ours - theirs).abs().max() / theirs.abs().max().clamp_min(least)).item()
    print(f"{what}: max relative error {error:.1e} (limit {limit:.0e})")
    assert error <= limit, f"{what}: max relative error {error:.1e}, limit {limit:.0e}"


def gradients(module):
    """{name: gradient} of every parameter, zeros where there is none; forgets them."""
    out = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in module.named_parameters()}
    module.zero_grad()
    return out


def run_ranks(file, folder, timeout):
    """Run a test file as a script, whose ranks, processes forked from one that has torch, leave results in `folder`.
    They compute on the CPU, and see no GPU: a fork can't use one that its parent has but looked for."""
    return subprocess.run([sys.executable, file, folder], cwd=ROOT, capture_output=True, text=True, timeout=timeout,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
                               "CUDA_VISIBLE_DEVICES": ""})


def save_tokenizer(encoding, path):
    """A tokenizer.json at `path`, or in it where that is a folder."""
    (path / "tokenizer.json" if path.is_dir() else path).write_bytes(tokenizer_json(encoding))
