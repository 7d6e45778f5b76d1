"""Key smearing: a learned fraction of the preceding key is added to every key.

To find what followed an earlier occurrence of a token, a query must match that token in the key *after* it. Without
smearing, an earlier layer has to copy it there first; with smearing one layer is enough, and the descriptor of a
region contains the token right before the region.

Source: Olsson et al. 2022, In-context Learning and Induction Heads (arXiv:2209.11895), "smeared key".

Shapes: B sequences, G key/value heads, S tokens, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

INITIAL_SHARE = 0.5  # starting from 0, it would grow only once lookups work, and they need it to work


class KeySmear(nn.Module):
    """k_t + a * k_(t-1), element by element; the token before the first one counts as zero.

    Weights: `share` [G * D], an a for each element of this tensor rank's groups, split like the groups' projections.
    With a single a for a whole group, recall is learned far later (docs/routing.md). It is stored as a vector
    because weight decay leaves vectors out.
    """

    def __init__(self, num_groups: int, head_size: int) -> None:
        super().__init__()
        self.share = nn.Parameter(torch.full((num_groups * head_size,), INITIAL_SHARE))
        # Megatron-core's mark of a weight that tensor ranks split; checkpoints and gradient norms use it.
        for name, value in (("tensor_model_parallel", True), ("partition_dim", 0), ("partition_stride", 1)):
            setattr(self.share, name, value)

    def forward(self, k: Tensor, before: Tensor | None = None) -> Tensor:
        """Smear keys.

        Args:
            k: [B, G, S, D], before RoPE.
            before: [B, G, 1, D], the key before the first one, where another rank has it; None: there is none.

        Returns:
            [B, G, S, D] in k's dtype.
        """
        if before is None:
            before = torch.zeros_like(k[:, :, :1])
        share_G1D = self.share.view(k.shape[1], 1, k.shape[3])
        preceding = before if k.shape[2] == 1 else torch.cat((before, k[:, :, :-1]), 2)
        return k + share_G1D * preceding
