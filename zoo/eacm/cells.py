"""GRU cells whose gates and candidate an emotion may shift."""

from __future__ import annotations

import torch
from torch import Tensor, nn

CELLS = ("ecm", "torch")


class BiasedGRUCell(nn.Module):
    """The recurrent half of a GRU cell; what the input and an emotion add to it comes from outside, for all steps.

    With the parts `(x_r, x_u, x_k)` of the input,

    - "ecm" resets the state before its product: `k = tanh(x_k + W_k (r * s))`, as TensorFlow and the EACM do;
    - "torch" after it: `k = tanh(x_k + r * (W_k s + b_k))`.

    In both, `r = sigmoid(x_r + W_r s)`, `u = sigmoid(x_u + W_u s)`, and the new state is `u * s + (1 - u) * k`.

    Args:
        hidden_size: Size of the state.
        kind: "ecm" or "torch".

    Raises:
        ValueError: If the kind is unknown.
    """

    def __init__(self, hidden_size: int, kind: str = "ecm") -> None:
        super().__init__()
        if kind not in CELLS:
            raise ValueError(f"cell must be one of {', '.join(CELLS)}, got {kind!r}")
        self.hidden_size, self.kind = hidden_size, kind
        self.gates = nn.Linear(hidden_size, 2 * hidden_size, bias=False)
        self.candidate = nn.Linear(hidden_size, hidden_size, bias=kind == "torch")
        for layer in (self.gates, self.candidate):
            nn.init.orthogonal_(layer.weight)

    def forward(self, parts: Tensor, state: Tensor) -> Tensor:
        """One step.

        Args:
            parts: `(batch, 3 * hidden_size)`, what the input adds to reset gate, update gate and candidate.
            state: `(batch, hidden_size)`.

        Returns:
            The new state `(batch, hidden_size)`.
        """
        size = self.hidden_size
        gates = torch.sigmoid(parts[:, : 2 * size] + self.gates(state))
        reset, update = gates[:, :size], gates[:, size:]
        if self.kind == "ecm":
            candidate = torch.tanh(parts[:, 2 * size :] + self.candidate(reset * state))
        else:
            candidate = torch.tanh(parts[:, 2 * size :] + reset * self.candidate(state))
        # Not `lerp`, which asks for one dtype.
        return candidate + update * (state - candidate)


def input_parts(input_size: int, hidden_size: int, bias: bool = True) -> nn.Linear:
    """A layer that makes what an input adds to a `BiasedGRUCell`; the biases of the gates begin at 1."""
    layer = nn.Linear(input_size, 3 * hidden_size, bias=bias)
    nn.init.xavier_uniform_(layer.weight)
    if bias:
        with torch.no_grad():
            layer.bias.fill_(1.0)
            layer.bias[2 * hidden_size :].zero_()
    return layer
