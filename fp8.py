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
    """x W^T in x's dtype: x [..., in], weight [out, in] -> [..., out]."""

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


class Linear(nn.Module):
    """y = x W^T without bias: [..., in_features] -> [..., out_features], in x's dtype."""

    def __init__(self, in_features, out_features):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))

    def forward(self, x):
        return Product.apply(x, self.weight)
