"""IRMv1 (Arjovsky et al., 2019): a penalty on features whose best classifier differs between environments."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def irm_penalty(environments: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Sum over environments of (d/dw CE(w z, y) at w = 1)^2; each is its logits z (N, K) and labels y (N,).

    The dummy scale w multiplies the logits.  (On the loss, as the first versions had it, the penalty is the squared
    loss.)  The derivative is mean(sum_k p_k z_k - z_y), so no second backward is needed.
    """
    slopes = [
        ((logits.softmax(1) * logits).sum(1) - logits.gather(1, labels[:, None]).squeeze(1)).mean()
        for logits, labels in environments
    ]
    return torch.stack(slopes).square().sum()
