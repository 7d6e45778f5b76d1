"""Key smearing: every key takes in a learned fraction of the key before it.

To find what followed an earlier occurrence of a token, a query has to meet that token in the key *after* it. Without
smearing an earlier layer must first write it there; with it a lookup needs one layer, and the descriptor of a region
knows the token that stands right before the region.

Shapes: B sequences, G key/value heads, S tokens, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

INITIAL_SHARE = 0.5  # from 0 the share grows only once the lookup works, which it does not without a share


class KeySmear(nn.Module):
    """k_t + a * k_(t-1), element by element; the token before the first one counts as zero.

    Weights: `share` [G * D], an a for each element of this tensor rank's groups, split like the groups' projections.
    With a single one for a group both tokens share all elements, and recall is learned far later. It is a vector
    because vectors do not decay.
    """

    def __init__(self, num_groups: int, head_size: int) -> None:
        super().__init__()
        self.share = nn.Parameter(torch.full((num_groups * head_size,), INITIAL_SHARE))
        # How Megatron-core's own layers mark a weight that tensor ranks split; checkpoints and norms go by it.
        for name, value in (("tensor_model_parallel", True), ("partition_dim", 0), ("partition_stride", 1)):
            setattr(self.share, name, value)

    def forward(self, k: Tensor, before: Tensor | None = None) -> Tensor:
        """k [B, G, S, D] before RoPE -> the same shape and dtype.

        `before` [B, G, 1, D]: the key before the first one, where another rank has it.
        """
        if before is None:
            before = torch.zeros_like(k[:, :, :1])
        share_G1D = self.share.view(k.shape[1], 1, k.shape[3])
        return k + share_G1D * torch.cat((before, k[:, :, :-1]), 2)
