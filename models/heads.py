"""The layers that make classes, boxes and features of hidden states: float32 also under autocast.

A box in bfloat16 has eight significant bits: too few for COCO's higher IoU thresholds.
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class HeadLinear(nn.Linear):
    """A linear layer that computes in its weights' type, whatever autocast asks for: [..., n] -> [..., k]."""

    def forward(self, input: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return F.linear(input, self.weight, self.bias)
        if not torch.is_autocast_enabled(input.device.type):  # programs that are exported then hold no such scope
            return F.linear(input, self.weight, self.bias)
        with torch.autocast(input.device.type, enabled=False):
            return F.linear(input.to(self.weight.dtype), self.weight, self.bias)


class MLP(nn.Module):
    """Linear layers with ReLU between them: input_dim -> hidden_dim (num_layers - 1 times) -> output_dim."""

    def __init__(self, input_dim: int, hidden_dim: int, output_dim: int, num_layers: int) -> None:
        super().__init__()
        widths = [input_dim] + [hidden_dim] * (num_layers - 1) + [output_dim]
        self.layers = nn.ModuleList([HeadLinear(n, k) for n, k in zip(widths[:-1], widths[1:])])
        self.num_layers = num_layers

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i < self.num_layers - 1:
                x = F.relu(x)
        return x
