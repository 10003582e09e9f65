# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""frequency.py against a discrete Fourier transform in float64 by matrix products."""

import math

import pytest
import torch

from modeling_mlip.frequency import (
    POWER_FLOOR,
    apply_spectral_filter,
    half_spectrum_shape,
    log_amplitude,
    resize_spectral_filter,
)

GRIDS = [(4, 4), (5, 5), (6, 4), (3, 7), (1, 1)]


def random_filter(height: int, width: int, channels: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*half_spectrum_shape(height, width), channels, 2, dtype=dtype)


def dft(grid: torch.Tensor, sign: int) -> torch.Tensor:
    """The unitary two-dimensional DFT of `(B, H, W, C)` by two matrix products."""

    def matrix(size: int) -> torch.Tensor:
        angle = sign * 2 * math.pi / size * torch.outer(torch.arange(size), torch.arange(size)).double()
        return torch.polar(torch.full_like(angle, size**-0.5), angle)

    return torch.einsum("uh,vw,bhwc->buvc", matrix(grid.shape[1]), matrix(grid.shape[2]), grid.to(torch.complex128))


def full_spectrum(half: torch.Tensor, width: int) -> torch.Tensor:
    """The `(H, W, C)` spectrum of a real kernel from its half: K[-u, -v] = conj(K[u, v])."""
    height = half.shape[0]
    full = torch.empty(height, width, half.shape[2], dtype=half.dtype)
    for u in range(height):
        for v in range(width):
            full[u, v] = half[u, v] if v < half.shape[1] else half[-u % height, width - v].conj()
    return full


@pytest.mark.parametrize("grid", GRIDS)
def test_filter_of_ones_is_the_identity(grid):
    patches = torch.randn(2, *grid, 3, dtype=torch.float64)
    ones = torch.zeros(*half_spectrum_shape(*grid), 3, 2, dtype=torch.float64)
    ones[..., 0] = 1
    torch.testing.assert_close(apply_spectral_filter(patches, ones), patches, rtol=0, atol=1e-12)


@pytest.mark.parametrize("grid", [(4, 4), (5, 5), (6, 4), (3, 7)])
def test_filter_equals_a_float64_dft(grid):
    torch.manual_seed(0)
    kernel = torch.randn(*grid, 3, dtype=torch.float64)  # a real kernel, whose spectrum is a valid filter
    half = torch.fft.rfft2(kernel, dim=(0, 1))
    patches = torch.randn(2, *grid, 3, dtype=torch.float64)
    theirs = dft(dft(patches, -1) * full_spectrum(half, grid[1]), +1)
    assert theirs.imag.abs().max() < 1e-10
    ours = apply_spectral_filter(patches, torch.view_as_real(half))
    torch.testing.assert_close(ours, theirs.real, rtol=0, atol=1e-10)


def test_every_filtered_patch_depends_on_every_patch():
    patches = torch.zeros(1, 6, 6, 2, dtype=torch.float64, requires_grad=True)
    filtered = apply_spectral_filter(patches, random_filter(6, 6, 2))
    (gradient,) = torch.autograd.grad(filtered[0, 0, 0, 0], patches)
    assert (gradient[0, :, :, 0] != 0).all()
    assert (gradient[0, :, :, 1].abs() < 1e-12).all()  # one filter per channel


def test_gradients_of_the_filter_equal_finite_differences():
    patches = torch.randn(1, 4, 3, 2, dtype=torch.float64, requires_grad=True)
    spectral_filter = random_filter(4, 3, 2).requires_grad_()
    assert torch.autograd.gradcheck(apply_spectral_filter, (patches, spectral_filter))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    torch.manual_seed(0)
    patches, spectral_filter = torch.randn(2, 4, 4, 3).to(dtype), random_filter(4, 4, 3, torch.float32).to(dtype)
    ours = apply_spectral_filter(patches, spectral_filter)
    theirs = apply_spectral_filter(patches.double(), spectral_filter.double())
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-2, atol=1e-2)


def test_resizing_to_the_same_grid_changes_nothing():
    spectral_filter = random_filter(5, 5, 2)
    assert resize_spectral_filter(spectral_filter, (5, 5), width=5) is spectral_filter


@pytest.mark.parametrize("size", [(8, 8), (7, 9), (3, 2), (4, 6)])
def test_resizing_keeps_a_smooth_filter(size):
    def smooth(height: int, width: int) -> torch.Tensor:
        rows, columns = torch.fft.fftfreq(height).double(), torch.fft.rfftfreq(width).double()
        values = 1 - rows.abs()[:, None] + 0.5 * columns[None]  # linear between its samples, even in the rows
        return torch.stack([values, torch.zeros_like(values)], dim=-1)[:, :, None]

    resized = resize_spectral_filter(smooth(16, 16), size, width=16)
    torch.testing.assert_close(resized, smooth(*size), rtol=0, atol=1e-6)


def test_resizing_keeps_frequency_0_at_index_0():
    spectral_filter = torch.zeros(*half_spectrum_shape(6, 6), 1, 2)
    spectral_filter[0, 0, 0, 0] = 1  # the mean alone passes
    resized = resize_spectral_filter(spectral_filter, (9, 9), width=6)
    assert resized[0, 0, 0, 0] == pytest.approx(1, abs=1e-6)
    assert resized[..., 0].argmax() == 0


@pytest.mark.parametrize("patch_size", [4, 5])
def test_log_amplitude_equals_a_float64_dft_of_each_patch(patch_size):
    pixels = torch.randn(2, 3, 2 * patch_size, 3 * patch_size, dtype=torch.float64)
    outputs = log_amplitude(pixels, patch_size).unflatten(1, (2, 3)).unflatten(3, (3, patch_size, -1))
    for row in range(2):
        for column in range(3):
            rows = slice(row * patch_size, (row + 1) * patch_size)
            columns = slice(column * patch_size, (column + 1) * patch_size)
            spectrum = dft(pixels[:, :, rows, columns].permute(0, 2, 3, 1), sign=-1).permute(0, 3, 1, 2)
            expected = (spectrum.abs().square() + POWER_FLOOR).sqrt().log()[..., : patch_size // 2 + 1]
            torch.testing.assert_close(outputs[:, row, column], expected, rtol=0, atol=1e-10)


def test_log_amplitude_does_not_depend_on_the_phase_of_stripes():
    position = torch.arange(16).double()
    stripes = torch.stack([torch.cos(math.pi / 4 * (position + shift)) for shift in range(8)])  # a period of 8 pixels
    images = stripes[:, None, None, :].expand(8, 3, 16, 16)
    amplitude = log_amplitude(images, patch_size=8)
    torch.testing.assert_close(amplitude, amplitude[:1].expand_as(amplitude), rtol=0, atol=1e-10)
    finer = log_amplitude(torch.cos(math.pi / 2 * position).expand(1, 3, 16, 16), patch_size=8)
    assert (finer - amplitude[:1]).abs().max() > 1


def test_log_amplitude_of_half_precision_is_computed_in_float32():
    pixels = torch.randn(2, 3, 16, 16).bfloat16()
    outputs = log_amplitude(pixels, 8)
    assert outputs.dtype == torch.bfloat16
    torch.testing.assert_close(outputs, log_amplitude(pixels.float(), 8).bfloat16(), rtol=0, atol=0)
