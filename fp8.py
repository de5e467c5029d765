"""Linear: the one matrix product with a weight that every layer of the model goes through.

The weights are kept in FP32 (they are the optimizer's master copy); the product runs in the dtype of the activations
that come in, so one cast here decides the precision of the whole model, and the gradient of that cast hands an FP32
gradient back to the weight. In V3 (section 3.3) all three products of a Linear run in FP8 with fine-grained scales,

    Fprop  y  = x  W^T        x  [N, in]    W [out, in]
    Dgrad  dx = dy W          dy [N, out]
    Wgrad  dW = dy^T x

and because there is one Linear, there is one place for that. Nobody waits for Wgrad, so a pipeline (dualpipe.py) may
have it put off.
"""
import torch
import torch.nn.functional as F
from torch import nn

import backend

if backend.has_triton():
    import triton
    import triton.language as tl

# --- the product ------------------------------------------------------------------------------------------------------

def linear_torch(x, weight, dtype=None):
    """x W^T in `dtype` (None: x's): x [..., in], weight [out, in] -> [..., out]."""
    dtype = dtype or x.dtype
    return F.linear(x.to(dtype), weight.to(dtype))


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


class Linear(nn.Module):
    """y = x W^T without bias: [..., in_features] -> [..., out_features], in x's dtype."""

    def __init__(self, in_features, out_features):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))

    def forward(self, x):
        return linear(x, self.weight)
