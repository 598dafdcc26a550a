"""Triton kernels of 3x3 convolutions with stride 1 and padding 1, and of the conversion to 8-bit floating point.

Triton comes with builds of torch for GPUs; only code that has such a tensor in hand imports this file. Nothing tunes
itself: what a kernel is cut into is an argument, and the results do not depend on the order of arrival.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Tiles(NamedTuple):
    """How a matrix product is cut: rows x columns of the result a program, `depth` of the sum at a time.

    promote: tensor cores of compute capability 9.0 sum products of 8-bit numbers in about 14 bits; True adds each
    depth to the float32 sum outside of them, which takes time and registers. 16-bit numbers do not need it.
    """

    rows: int
    columns: int
    depth: int
    stages: int
    warps: int
    promote: bool = False


PROGRAMS = 528
"""How many programs a weight gradient is cut into at most: four for each processor of an H100, which runs one."""
PARTS = 512
"""How many programs look for the largest value of a tensor at most."""


@triton.jit
def convolve_kernel(
    x, weight, out, scale, bias, height, width, pixels,
    CHANNELS: tl.constexpr, OUTPUTS: tl.constexpr,
    BIAS: tl.constexpr, RELU: tl.constexpr, SCALE: tl.constexpr, PROMOTE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """out [pixels, outputs] = scale * sum over taps and channels of x [pixels, channels], shifted, times weight
    [outputs, 9, channels] (+ bias), (ReLU). Programs next to each other share their rows of x."""
    across = tl.cdiv(OUTPUTS, COLUMNS)
    p = tl.program_id(0) // across * ROWS + tl.arange(0, ROWS)
    k = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)
    c = tl.arange(0, DEPTH)
    row, column = p // width % height, p % width
    x_at = x + p.to(tl.int64)[:, None] * CHANNELS + c[None, :]
    weight_at = weight + k[None, :] * (9 * CHANNELS) + c[:, None]
    deep = tl.cdiv(CHANNELS, DEPTH)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in range(9 * deep):
        tap = step // deep
        start = step % deep * DEPTH
        down, right = tap // 3 - 1, tap % 3 - 1
        inside = (p < pixels) & (row + down >= 0) & (row + down < height)
        inside = inside & (column + right >= 0) & (column + right < width)
        left = c + start < CHANNELS
        a = tl.load(x_at + ((down * width + right) * CHANNELS + start), mask=inside[:, None] & left[None, :], other=0.0)
        b = tl.load(weight_at + (tap * CHANNELS + start), mask=(k < OUTPUTS)[None, :] & left[:, None], other=0.0)
        if PROMOTE:
            total += tl.dot(a, b, max_num_imprecise_acc=DEPTH)
        else:
            total = tl.dot(a, b, total)
    if SCALE:
        total *= tl.load(scale)
    if BIAS:
        total += tl.load(bias + k, mask=k < OUTPUTS, other=0.0)[None, :]
    if RELU:
        total = tl.where(total < 0, 0.0, total)  # NaN stays NaN
    out_at = out + p.to(tl.int64)[:, None] * OUTPUTS + k[None, :]
    tl.store(out_at, total.to(out.dtype.element_ty), mask=(p < pixels)[:, None] & (k < OUTPUTS)[None, :])


@triton.jit
def weight_gradient_kernel(
    grad, x, partial, height, width, pixels, part,
    CHANNELS: tl.constexpr, OUTPUTS: tl.constexpr, HALF: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """partial [parts, outputs, 9, channels]: sums over `part` pixels each of grad [pixels, outputs] times shifted x
    [pixels, channels]. HALF: 8-bit numbers become float16, exactly, since tensor cores take 8-bit numbers only where
    those of a sum lie side by side in memory; here pixels do not."""
    across = tl.cdiv(CHANNELS, COLUMNS)
    k = tl.program_id(0) // across * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)
    tap = tl.program_id(1)
    down, right = tap // 3 - 1, tap % 3 - 1
    first = tl.program_id(2) * part
    last = tl.minimum(first + part, pixels)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(first, last, DEPTH):
        p = start + tl.arange(0, DEPTH)
        row, column = p // width % height + down, p % width + right
        inside = (p < last) & (row >= 0) & (row < height) & (column >= 0) & (column < width)
        wide = p.to(tl.int64)
        a = tl.load(
            grad + wide[None, :] * OUTPUTS + k[:, None], mask=inside[None, :] & (k < OUTPUTS)[:, None], other=0.0
        )
        b = tl.load(
            x + (wide + (down * width + right))[:, None] * CHANNELS + c[None, :],
            mask=inside[:, None] & (c < CHANNELS)[None, :],
            other=0.0,
        )
        if HALF:
            a, b = a.to(tl.float16), b.to(tl.float16)
        total = tl.dot(a, b, total)
    at = partial + ((tl.program_id(2) * OUTPUTS + k)[:, None] * 9 + tap).to(tl.int64) * CHANNELS + c[None, :]
    tl.store(at, total, mask=(k < OUTPUTS)[:, None] & (c < CHANNELS)[None, :])


@triton.jit
def largest_kernel(x, largest, count, each, BLOCK: tl.constexpr):
    """largest [programs]: the bits of the largest |x| of `each` values. Bits of non-negative numbers are ordered as
    the numbers are, with infinity and then NaN above all."""
    first = tl.program_id(0).to(tl.int64) * each
    found = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, each, BLOCK):
        at = first + start + tl.arange(0, BLOCK)
        values = tl.load(x + at, mask=(start + tl.arange(0, BLOCK) < each) & (at < count), other=0.0).to(tl.float32)
        found = tl.maximum(found, values.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    tl.store(largest + tl.program_id(0), tl.max(found, 0))


@triton.jit
def narrow_kernel(
    x, largest, out, scale, rows, channels, padded, top,
    PARTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out [rows, padded] = x [rows, channels] / scale, zeros beside it; scale [1] by `quantise_reference`'s rule."""
    most = tl.max(tl.load(largest + tl.arange(0, PARTS)), 0)
    exponent = tl.maximum(((most + 0x1FFFFF) >> 23) - top, 1)
    finite = most < 0x7F800000
    nan = 0x7FC00000
    if tl.program_id(0) == 0:
        tl.store(scale, tl.where(finite, exponent << 23, nan).to(tl.float32, bitcast=True))
    inverse = tl.where(finite, (254 - exponent) << 23, nan).to(tl.float32, bitcast=True)
    across = tl.cdiv(padded, COLUMNS)
    row = tl.program_id(0) // across * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)
    wide = row.to(tl.int64)[:, None]
    values = tl.load(
        x + wide * channels + column[None, :], mask=(row < rows)[:, None] & (column < channels)[None, :], other=0.0
    )
    narrow = (values.to(tl.float32) * inverse).to(out.dtype.element_ty)
    tl.store(out + wide * padded + column[None, :], narrow, mask=(row < rows)[:, None] & (column < padded)[None, :])


def _rows(x: Tensor) -> Tensor:
    """[N, C, H, W] as [N, H, W, C], contiguous: no copy of a tensor in channels_last."""
    return x.permute(0, 2, 3, 1).contiguous()


def convolve(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    relu: bool,
    dtype: torch.dtype,
    cut: tuple | None = None,
) -> Tensor:
    """`detcore.ops.conv3x3.convolve` by the kernel, in tiles of one's choice."""
    n, channels, height, width = x.shape
    outputs = len(weight)
    cut = Tiles(*cut) if cut else convolution_tiles(x.dtype, outputs, channels)
    out = torch.empty((n, height, width, outputs), dtype=dtype, device=x.device)
    pixels = n * height * width
    grid = (triton.cdiv(pixels, cut.rows) * triton.cdiv(outputs, cut.columns),)
    convolve_kernel[grid](
        _rows(x), _rows(weight), out, scale, bias, height, width, pixels,
        channels, outputs, bias is not None, relu, scale is not None, cut.promote, cut.rows, cut.columns, cut.depth,
        num_stages=cut.stages, num_warps=cut.warps,
    )  # fmt: skip
    return out.permute(0, 3, 1, 2)


def convolution_tiles(dtype: torch.dtype, outputs: int, channels: int) -> Tiles:
    """Tiles of a convolution from so many channels to `outputs`, within the 227 KiB of shared memory of an H100.

    A sum over many channels is promoted; then a tile is half as wide, or its two sums would not fit the registers.
    """
    narrow = 128 if outputs > 64 else 64 if outputs > 32 else 32
    if dtype.itemsize == 1 and channels > 1024:
        return Tiles(128, narrow, 128, 4, 8, True)
    return Tiles(128, 256 if outputs > 128 else narrow, 128 // dtype.itemsize, 4, 8)


def weight_gradient_tiles(outputs: int, channels: int) -> Tiles:
    """Tiles of a weight gradient [outputs, 9, channels]; the sum is over pixels."""
    return Tiles(128 if outputs > 64 else 64, 256 if channels > 128 else 128 if channels > 64 else 64, 64, 4, 8)


def weight_gradient(grad: Tensor, x: Tensor, scale: Tensor | None, cut: tuple | None = None) -> Tensor:
    """`detcore.ops.conv3x3.weight_gradient` by the kernel, in tiles of one's choice."""
    n, channels, height, width = x.shape
    outputs = grad.shape[1]
    cut = Tiles(*cut) if cut else weight_gradient_tiles(outputs, channels)
    across = triton.cdiv(outputs, cut.rows) * triton.cdiv(channels, cut.columns)
    pixels = n * height * width
    part = triton.cdiv(triton.cdiv(pixels, max(1, PROGRAMS // (9 * across))), cut.depth) * cut.depth
    parts = triton.cdiv(pixels, part)
    partial = torch.empty((parts, outputs, 3, 3, channels), dtype=torch.float32, device=x.device)
    weight_gradient_kernel[(across, 9, parts)](
        _rows(grad), _rows(x), partial, height, width, pixels, part,
        channels, outputs, grad.dtype.itemsize == 1, cut.rows, cut.columns, cut.depth,
        num_stages=cut.stages, num_warps=cut.warps,
    )  # fmt: skip
    total = partial.sum(0)
    return (total if scale is None else total * scale).permute(0, 3, 1, 2)


def quantise(x: Tensor, dtype: torch.dtype, padded: int, top: int) -> tuple[Tensor, Tensor]:
    """`detcore.ops.conv3x3.quantise` by the kernels; 1.75 * 2^top dtype's largest."""
    n, channels, height, width = x.shape
    count, block = x.numel(), 4096
    parts = min(PARTS, triton.next_power_of_2(triton.cdiv(count, block)))
    each = triton.cdiv(triton.cdiv(count, parts), block) * block
    last = _rows(x)
    largest = torch.empty((parts,), dtype=torch.int32, device=x.device)
    largest_kernel[(parts,)](last, largest, count, each, block, num_warps=8)
    out = torch.empty((n, height, width, padded), dtype=dtype, device=x.device)
    scale = torch.empty((1,), dtype=torch.float32, device=x.device)
    columns = min(256, triton.next_power_of_2(padded))
    rows, pixels = 16384 // columns, n * height * width
    narrow_kernel[(triton.cdiv(pixels, rows) * triton.cdiv(padded, columns),)](
        last, largest, out, scale, pixels, channels, padded, top, parts, rows, columns, num_warps=8
    )
    return out.permute(0, 3, 1, 2), scale
