# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Rotary position embedding of image patches as pure functions (Su et al. 2021, arXiv 2104.09864).

Pairs of channels of queries and keys rotate by angles that are proportional to the coordinates of a patch: the first
half of the pairs by one coordinate, the second half by the other, as in EVA-02 (arXiv 2303.11331) and the Perception
Encoder (arXiv 2504.13181). Coordinates are real numbers, so a merged token can have the mean of its patches'
coordinates. Source: `RotaryEmbeddingCat` of timm 1.0.

Axes: B images, N patches, K prefix tokens, h heads, S = K + N tokens, d width of a head.
"""

import torch

# Angles per unit of distance fall from 1 to nearly 1 / TEMPERATURE over the pairs of channels.
TEMPERATURE = 10000.0


def patch_positions(
    grid: tuple[int, int], reference_side: int, offset: float, x_first: bool, device: torch.device | None = None
) -> torch.Tensor:
    """The coordinates of the patches, row by row.

    Args:
        grid: number of rows and of columns of patches.
        reference_side: rows and columns of the grid to which the coordinates are scaled.
        offset: coordinate of the first row and column before scaling.
        x_first: the order of the coordinates: column and row, or row and column.

    Returns:
        `(N, 2)` float32.
    """
    rows, columns = (
        (torch.arange(count, device=device, dtype=torch.float32) + offset) / count * reference_side for count in grid
    )
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([x, y] if x_first else [y, x], dim=-1).flatten(0, 1)


def rotation_of(positions: torch.Tensor, num_prefix_tokens: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of the angle of every channel; prefix tokens do not rotate.

    Args:
        positions: `(B, N, 2)` or `(1, N, 2)` float32.
        width: d, divisible by 4.

    Returns:
        Two tensors `(B, 1, S, d)` float32, for `rotate`.
    """
    num_angles = width // 4
    exponents = torch.arange(num_angles, device=positions.device, dtype=torch.float32) / num_angles
    angles = positions[..., None] * (1.0 / TEMPERATURE**exponents)  # (B, N, 2, d/4)
    angles = angles.flatten(2).repeat_interleave(2, dim=-1)  # (B, N, d), both channels of a pair
    angles = torch.nn.functional.pad(angles, (0, 0, num_prefix_tokens, 0))[:, None]  # (B, 1, S, d)
    return angles.cos(), angles.sin()


def rotate(states: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotates each pair of channels of queries or keys `(B, h, S, d)`; computes in float32, returns their dtype."""
    cos, sin = rotation
    turned = torch.stack([-states[..., 1::2], states[..., ::2]], dim=-1).flatten(-2)  # (a, b) -> (-b, a)
    return (states * cos + turned * sin).to(states.dtype)
