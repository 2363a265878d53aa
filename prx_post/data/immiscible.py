"""Immiscible noise: which of a batch's noises each of its samples is mixed with."""

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor


def immiscible_order(x0: Tensor, noise: Tensor) -> Tensor:
    """Which noise goes to which sample so that the total distance is smallest (Li et al. 2024, alg. 1). [B] int64."""
    distance = torch.cdist(x0.float().flatten(1), noise.float().flatten(1))
    return torch.as_tensor(linear_sum_assignment(distance.cpu().numpy())[1])
