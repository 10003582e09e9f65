# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""The amplitude spectrum of patches, and a global filter on the patch grid, as pure functions.

The global filter follows GFNet (Rao et al. 2021, arXiv 2107.00645, equations 4 to 6): multiplication in the half
spectrum of a real grid. Axes: B images, H x W patches, C channels.
"""

import torch
from torch import nn

# Added to the power of normalised pixel values before the logarithm, so that amplitudes below 0.1 hardly count.
POWER_FLOOR = 0.01


def no_autocast(device: torch.device) -> torch.autocast:
    """Turns autocast off. The meta device has no autocast, so the CPU's stands in."""
    return torch.autocast("cpu" if device.type == "meta" else device.type, enabled=False)


def log_amplitude(pixel_values: torch.Tensor, patch_size: int) -> torch.Tensor:
    """The log-amplitude of every spatial frequency within each patch.

    A cyclic shift of a patch changes only the phases of its spectrum, so the amplitudes describe the texture of a patch
    independent of its position. A linear patch embedding cannot compute them.

    Args:
        pixel_values: `(B, C, H * patch_size, W * patch_size)`.
        patch_size: side of a patch in pixels.

    Returns:
        `(B, H * W, C * patch_size * (patch_size // 2 + 1))` in the dtype of `pixel_values`; computed in at least
        float32.
    """
    with no_autocast(pixel_values.device):
        compute_dtype = torch.promote_types(pixel_values.dtype, torch.float32)
        patches = pixel_values.to(compute_dtype).unflatten(3, (-1, patch_size)).unflatten(2, (-1, patch_size))
        patches = patches.permute(0, 2, 4, 1, 3, 5)  # (B, C, H, p, W, p) -> (B, H, W, C, p, p)
        grid = patches.shape[:4]
        # One axis of patches, because torch 2.11 compiles the FFT of permuted axes with wrong strides.
        spectrum = torch.view_as_real(torch.fft.rfft2(patches.flatten(0, 3), norm="ortho"))  # (BHWC, p, p//2+1, 2)
        spectrum = spectrum.unflatten(0, grid)
        real, imaginary = spectrum.unbind(dim=-1)
        amplitude = (real.square() + imaginary.square() + POWER_FLOOR).log() / 2
        return amplitude.flatten(3).flatten(1, 2).to(pixel_values.dtype)


def half_spectrum_shape(height: int, width: int) -> tuple[int, int]:
    """Shape `(height, width // 2 + 1)` of the half spectrum of a real `height x width` grid."""
    return height, width // 2 + 1


def apply_spectral_filter(patches: torch.Tensor, spectral_filter: torch.Tensor) -> torch.Tensor:
    """Multiplies every frequency of every channel by a complex number: irfft2(K * rfft2(patches)).

    Args:
        patches: `(B, H, W, C)`.
        spectral_filter: K as pairs of real and imaginary part, `(H, W // 2 + 1, C, 2)`. K = 1 is the identity.

    Returns:
        `(B, H, W, C)` in the dtype of `patches`; computed in at least float32, because FFTs reject half precision.
    """
    height, width = patches.shape[1:3]
    # Autocast is off, because FFTs and complex products do not support half precision.
    with no_autocast(patches.device):
        compute_dtype = torch.promote_types(patches.dtype, torch.float32)
        grids = patches.to(compute_dtype).permute(0, 3, 1, 2)  # (B, C, H, W)
        # One axis of grids, for the same reason as in log_amplitude.
        spectrum = torch.fft.rfft2(grids.flatten(0, 1), norm="ortho").unflatten(0, grids.shape[:2])
        spectrum = spectrum * torch.view_as_complex(spectral_filter.to(compute_dtype).contiguous()).permute(2, 0, 1)
        filtered = torch.fft.irfft2(spectrum.flatten(0, 1), s=(height, width), norm="ortho")  # (BC, H, W)
        filtered = filtered.unflatten(0, grids.shape[:2]).permute(0, 2, 3, 1)
    return filtered.to(patches.dtype)


def resize_spectral_filter(spectral_filter: torch.Tensor, size: tuple[int, int], width: int) -> torch.Tensor:
    """Interpolates a filter linearly at the frequencies of another grid, in cycles per patch.

    Args:
        spectral_filter: `(H, W // 2 + 1, C, 2)`, for a grid of `H x width` patches.
        size: `(new_height, new_width)` of the other grid, in patches.
        width: W, which does not follow from the shape of the half spectrum.

    Returns:
        `(new_height, new_width // 2 + 1, C, 2)`; the filter itself if the grid is the same.
    """
    height, half, channels, _ = spectral_filter.shape
    new_height, new_width = size
    if (new_height, new_width) == (height, width):
        return spectral_filter
    dtype = torch.promote_types(spectral_filter.dtype, torch.float32)
    device = spectral_filter.device
    # Rows have the order 0, 1, ..., -1. Sort the frequencies before interpolating between neighbours.
    ascending = torch.fft.fftshift(spectral_filter.to(dtype), dim=0).flatten(2).permute(2, 0, 1)  # (2C, H, W//2+1)
    rows = torch.fft.fftfreq(new_height, device=device, dtype=dtype) * height + height // 2
    columns = torch.fft.rfftfreq(new_width, device=device, dtype=dtype) * width
    # grid_sample takes positions from -1 (first) to 1 (last), x before y.
    y = rows / max(height - 1, 1) * 2 - 1
    x = columns / max(half - 1, 1) * 2 - 1
    grid = torch.stack(torch.broadcast_tensors(x[None, :], y[:, None]), dim=-1)[None]  # (1, H', W'//2+1, 2)
    resized = nn.functional.grid_sample(ascending[None], grid, padding_mode="border", align_corners=True)[0]
    resized = resized.permute(1, 2, 0).unflatten(2, (channels, 2))  # (H', W'//2+1, C, 2)
    return resized.to(spectral_filter.dtype)
