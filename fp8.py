"""Linear: the one matrix product with a weight that every layer of the model goes through.

The weights are kept in FP32 (they are the optimizer's master copy); the product runs in the dtype of the activations
that come in, so one cast here decides the precision of the whole model, and the gradient of that cast hands an FP32
gradient back to the weight. In V3 (section 3.3) all three products of a Linear run in FP8 with fine-grained scales,

    Fprop  y  = x  W^T        x  [N, in]    W [out, in]
    Dgrad  dx = dy W          dy [N, out]
    Wgrad  dW = dy^T x

and because there is one Linear, there is one place for that.
"""
import torch
import torch.nn.functional as F
from torch import nn


class Linear(nn.Module):
    """y = x W^T without bias: [..., in_features] -> [..., out_features], in x's dtype."""

    def __init__(self, in_features, out_features):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))
