"""The kernels of generation, gate, experts and Linear, against their plain-torch forms.

Where there is a GPU the tests run compiled on it. Elsewhere Triton's interpreter runs the kernels on the CPU; it has to
be asked for before Triton is imported, and so in a process of its own: the first test starts it.
"""
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import lively, tiny

import backend
import moe
from fp8 import linear_torch, linear_triton
from moe import MoE, experts_torch, experts_triton, route_torch, route_triton

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
kernels = pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(),
                             reason="compiled kernels need a GPU; the interpreter runs them in a process of its own")
gpu = pytest.mark.gpu


@pytest.mark.skipif(INTERPRETED or not backend.has_triton(), reason="needs Triton, and is not its own child")
def test_the_kernels_pass_these_tests_under_tritons_interpreter():
    run = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__],
                         env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]


def random(*shape, dtype=torch.float32, std=1.0):
    return (std * torch.randn(*shape)).to(dtype).to(DEVICE)


def close(ours, theirs, limit, what):
    """Relative Frobenius error, printed."""
    assert ours.shape == theirs.shape and ours.isfinite().all()
    error = ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()
    print(f"{what}: relative Frobenius error {error:.1e} (limit {limit:.0e})")
    assert error <= limit, f"{what}: relative Frobenius error {error:.1e}, limit {limit:.0e}"


# --- the gate ---------------------------------------------------------------------------------------------------------

def far_apart(N, E):
    """Logits in which no two experts of a token are closer than rounding can bring together."""
    steps = torch.linspace(-3, 3, E)
    return torch.stack([steps[torch.randperm(E)] for _ in range(N)]).to(DEVICE)


@kernels
@pytest.mark.parametrize("E, K, groups, limited", [(1, 1, 1, 1), (8, 2, 1, 1), (64, 6, 1, 1), (60, 6, 1, 1), (64, 8, 8, 4),
                                                   (12, 3, 4, 2)])
@pytest.mark.parametrize("mean_bias", [0.0, -0.6])
def test_the_gates_kernel_chooses_and_weighs_as_torch_does(E, K, groups, limited, mean_bias):
    logits, bias = far_apart(16, E), mean_bias + 0.1 * random(E)
    indices, weights = route_triton(logits, bias, K, groups, limited, 2.5)
    expected, theirs = route_torch(logits.sigmoid(), bias, K, groups, limited, 2.5)
    assert indices.dtype == torch.int64 and torch.equal(indices, expected)
    close(weights, theirs, 1e-6, "weights")
