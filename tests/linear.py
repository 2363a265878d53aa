"""A transformer whose results can be worked out by hand."""

import torch
from torch import nn


class Scale(nn.Module):
    """velocity = w · x; so a step from sigma to sigma' multiplies x by 1 + (sigma' - sigma) w."""

    def __init__(self, w: float = 0.5):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w))

    def forward(self, hidden_states, timestep, encoder_hidden_states, attention_mask, return_dict):
        return (self.w * hidden_states,)

    def velocity(self, x_t, t, prompts):
        """As a reference."""
        return (self.w * x_t).detach()
