"""Memory for the partial results of tree attention's splits."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dflash_kernels.tree_attn.configs import architecture, plan_splits, tile_config


class TreeAttentionWorkspace:
    """Partial results of the splits; one instance serves every layer of a step in turn.

    Args:
        max_bs: largest batch.
        num_nodes: every N that a step may have.
        num_q_heads, num_kv_heads, head_dim: Hq, Hkv and max(Dk, Dv) of this rank.

    The buffers are sized for the worst N and batch size up to `max_bs`, since smaller ones take more splits.
    """

    def __init__(
        self,
        max_bs: int,
        num_nodes: Sequence[int],
        num_q_heads: int,
        num_kv_heads: int,
        head_dim: int,
        device: torch.device | str,
    ) -> None:
        device = torch.device(device)
        cells = 0
        for nodes in num_nodes:
            rows = nodes * (num_q_heads // num_kv_heads)
            config = tile_config(architecture(device), head_dim, rows)
            for bs in range(1, max_bs + 1):
                splits = plan_splits(bs, num_kv_heads, rows, config, device)
                if splits > 1:
                    cells = max(cells, bs * num_kv_heads * splits * rows)
        self.lse = torch.empty(cells, dtype=torch.float32, device=device)
        self.out = torch.empty(cells * head_dim, dtype=torch.float32, device=device)

    def buffers(self, cells: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(out, lse) for `cells` rows.

        Raises:
            ValueError: the workspace was built for smaller shapes.
        """
        if cells > self.lse.numel() or cells * head_dim > self.out.numel():
            raise ValueError(
                f"tree attention needs {cells} partial rows of {head_dim}; the workspace holds "
                f"{self.lse.numel()}: build it with the largest batch, node budget and head count"
            )
        return self.out, self.lse
