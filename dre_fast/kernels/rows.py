"""Device functions that turn stored rows into operands of matrix products, and the weight that goes with each.

A row stands for x~ = weight * operand. Plain rows are their own operands. 8-bit rows (``operand``) become fp16 without
rounding; their scale is the weight. A row to be normalised (``unit_weight``) has the weight 1 / ||x~||, of which the
power of two goes into the operand (``shifted``) and the rest, in [1, 2), stays the weight (``split_weight``): so operands
of rows of any size keep to fp16's range, and what a small entry loses to it is below 2^-25 of the row's norm. A product
with weighted operands takes the weight in two fp16 parts (``halves``), which keep 2^-23 of it.
"""

# Kernel arguments are Triton's own kinds of values, which annotations other than constexpr cannot name.
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def operand(x):
    """8-bit rows as fp16, exactly: int8 values; e4m3, which come as uint8, as their value / 2^8. Others as they are.

    By bits, which takes fewer instructions than conversions and works on every architecture: 1152 + q has the bits of q
    + 128 at the low end of its mantissa, and e4m3 has fp16's layout with a shorter exponent, biased by 8 less.
    """
    if x.dtype == tl.int8:
        bits = (x.to(tl.uint8, bitcast=True) ^ 0x80).to(tl.uint16) | 0x6400
        return bits.to(tl.float16, bitcast=True) - 1152.0
    elif x.dtype == tl.uint8:
        magnitude = (x & 0x7F).to(tl.uint16) << 7
        magnitude = tl.where(magnitude == 0x3F80, 0x7E00, magnitude).to(tl.uint16)  # not a number
        return (magnitude | ((x & 0x80).to(tl.uint16) << 8)).to(tl.float16, bitcast=True)
    else:
        return x


@triton.jit
def scale_of(row_scale_ptr, row, live, x_ptr):
    """What the operands of 8-bit rows are to be multiplied by."""
    scale = tl.load(row_scale_ptr + row, mask=live, other=0.0)
    if x_ptr.dtype.element_ty == tl.uint8:
        scale = scale * 256.0
    return scale


@triton.jit
def add_squares(x, total, large):
    """Add the sums of squares of a tile's rows [R, D] to ``total`` [R]; to ``large`` those of x / 2^64.

    The second is for rows whose squares overflow fp32; of fp16 values only infinite ones do, and may stay so.
    """
    values = x.to(tl.float32)
    total += tl.sum(values * values, 1)
    if x.dtype != tl.float16:
        values = values * 2.0**-64
        large += tl.sum(values * values, 1)
    else:
        large = total
    return total, large


@triton.jit
def unit_weight(total, large, scale):
    """2^24 / max(||x~||, 1e-12) * scale, [R], and ||u||^2 of the unit row, from sums of squares of the operand.

    x~ is ``scale`` (or 1) times the operand. The factor 2^24 keeps the weight of every row a normal number.
    """
    overflowed = total == float("inf")
    total = tl.where(overflowed, large, total)
    inverse = tl.rsqrt(tl.where(total == 0.0, 1.0, total))
    inverse = inverse * (
        1.5 - 0.5 * total * inverse * inverse
    )  # Newton: full fp32 from the fast approximation
    norm = total * inverse
    least = 2.0**24 * 1e12
    if scale is not None:
        norm = norm * scale
        least = scale * least
    weight = tl.where(norm > 1e-12, inverse * tl.where(overflowed, 2.0**-40, 2.0**24), least)
    square = tl.where(norm > 1e-12, 1.0, (norm * 1e12) * (norm * 1e12))
    return weight, square


@triton.jit
def split_weight(weight):
    """A positive weight as (power of two, factor in [1, 2)); 0 as (0, 1), NaN as (inf, 1.5)."""
    bits = weight.to(tl.int32, bitcast=True)
    power = (bits & 0x7F800000).to(tl.float32, bitcast=True)
    factor = ((bits & 0x007FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    return power, factor


@triton.jit
def shifted(x, power):
    """The operand [R, D] times its row's power of two / 2^24, in fp16."""
    return (x.to(tl.float32) * power[:, None] * 2.0**-24).to(tl.float16)


@triton.jit
def halves(weight, place):
    """An fp32 weight as fp16 (high, low): high + low / 2^11 is it to 2^-23, low being no smaller a number than high.

    One bit of fp32's 24 can be left over, always half a unit of ``low``. Odd places round it away from zero and even
    ones towards it, so that the errors of many equal weights do not add up.
    """
    high = weight.to(tl.float16)
    low = (weight - high.to(tl.float32)) * 2048.0
    low = tl.where((place & 1) == 1, low * (1.0 + 2.0**-14), low * (1.0 - 2.0**-14))
    return high, low.to(tl.float16)
