"""Named convolution problems, and the forms in which tensors may arrive.

A problem's name says what it exercises. Edges of the kernels' own blocking are met on both sides:
vectors of 4, 8 and 16 lanes, tiles of 6, 12 and 14 rows, blocks of 256 pixels and 64 filters, a
GEMM blocked by 168 x 1024 x 256. Height and width differ in everything wherever a problem allows
it, so that no exchange of the two can pass.

To add a problem, add a line: every test and every device meets it.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from convext.bench.layers import lesson
from convext.bench.problem import Conv2dProblem

P = Conv2dProblem

LESSON_LAYERS = lesson(batch=5)

# Small enough for plain loops in Python and for numerical derivatives; each a kind of its own.
SMALL = [
    P("one multiplication", 1, 1, 1, 1, 1, (1, 1)),
    P("plain", 2, 3, 5, 6, 4, (3, 2)),
    P("all settings differ", 2, 2, 9, 11, 3, (3, 2), (2, 3), (2, 1), (1, 2)),
    P("asymmetric kernel", 1, 2, 4, 9, 3, (1, 5), (1, 1), (0, 2)),
    P("padding above the kernel", 1, 2, 3, 4, 2, (2, 1), (1, 2), (4, 3)),
    P("stride above the kernel", 2, 2, 9, 8, 3, (2, 1), (3, 4)),
    P("stride above the input", 2, 2, 4, 3, 2, (3, 2), (7, 9), (1, 1)),
    P("one row, strided", 2, 3, 1, 6, 4, (3, 1), (3, 1), (2, 1), (2, 1)),
    P("one pixel, strided", 2, 3, 1, 1, 4, (3, 5), (2, 3), (1, 2)),
    P("kernel as large as the input", 2, 3, 4, 3, 5, (4, 3)),
    P("kernel as large as the padded input", 2, 2, 3, 2, 3, (5, 6), (1, 1), (1, 2)),
    P("dilation", 1, 2, 8, 9, 2, (3, 2), (1, 1), (0, 0), (3, 5)),
    P("dilation and padding", 1, 2, 5, 4, 3, (2, 3), (1, 1), (2, 3), (4, 3)),
    P("dilation and stride with a common factor", 1, 2, 9, 10, 2, (3, 3), (2, 4), (3, 2), (4, 2)),
    P("rows and columns left over", 1, 1, 8, 11, 2, (3, 3), (3, 4)),
    P("pointwise", 2, 5, 3, 4, 6, (1, 1)),
    P("pointwise strided", 2, 3, 5, 8, 4, (1, 1), (2, 3)),
    P("pointwise padded", 1, 2, 2, 3, 2, (1, 1), (2, 1), (1, 2)),
    P("groups", 2, 4, 5, 4, 6, (3, 2), (1, 2), (1, 0), (1, 1), 2),
    P("groups with dilation", 1, 6, 7, 6, 3, (2, 3), (2, 1), (1, 2), (3, 2), 3),
    P("depthwise", 2, 5, 6, 5, 5, (3, 2), (1, 1), (1, 1), (1, 1), 5),
    P("depthwise multiplier", 2, 3, 5, 6, 9, (2, 3), (2, 1), (1, 1), (1, 1), 3),
    P("batch of none", 0, 3, 5, 6, 4, (3, 2), (2, 1), (1, 1)),
    P("no input channels", 2, 0, 5, 6, 4, (3, 2), (2, 1), (1, 1)),
    P("one column", 2, 2, 7, 1, 3, (3, 1), (2, 1)),
    P("3x3", 2, 3, 5, 7, 2, (3, 3), (1, 1), (1, 0)),
    P("3x3 of two pixels", 1, 2, 1, 2, 3, (3, 3), (1, 1), (1, 2)),
    P("3x3 in groups", 2, 4, 7, 4, 6, (3, 3), (1, 1), (2, 1), (1, 1), 2),
    P("3x3, batch of none", 0, 3, 5, 6, 4, (3, 3), (1, 1), (1, 1)),
    P("3x3, no input channels", 2, 0, 5, 6, 4, (3, 3), (1, 1), (1, 1)),
    P("only padding is met", 1, 1, 1, 1, 1, (1, 1), (2, 2), (1, 1)),
]

# Around the edges of vectors, tiles and blocks.
EDGES = [
    *(
        P(f"{c} to {o} channels", 2, c, 5, 7, o, (2, 3), (1, 2), (1, 0))
        for c, o in [(1, 8), (3, 7), (7, 9), (8, 1), (9, 3), (15, 16), (16, 17), (17, 15)]
    ),
    *(
        P(f"{c} to {o} channels", 2, c, 3, 4, o, (3, 2), (2, 1), (1, 1))
        for c, o in [(31, 33), (33, 31), (65, 32), (32, 65), (64, 63)]
    ),
    *(P(f"{w} pixels", 1, 2, 1, w, 9, (1, 1)) for w in (5, 6, 7, 11, 12, 13, 14, 15, 29)),
    P("255 pixels", 1, 3, 17, 17, 5, (3, 1), (1, 1), (0, 0), (1, 1)),
    P("256 pixels", 1, 3, 9, 33, 5, (2, 2)),
    P("257 pixels", 1, 3, 2, 258, 5, (2, 2)),
    P("wider than a block of pixels", 2, 2, 3, 520, 3, (2, 3), (1, 2), (1, 1)),
    *(
        P(f"3x3, {h}x{w} pixels, {c} to {o}", n, c, h, w, o, (3, 3), (1, 1), (py, px))
        for n, c, h, w, o, py, px in [
            (1, 1, 3, 1, 3, 0, 1),
            (2, 3, 4, 5, 1, 1, 1),
            (3, 8, 5, 8, 15, 1, 2),
            (1, 15, 6, 9, 16, 0, 0),
            (2, 16, 8, 7, 8, 2, 1),
            (1, 17, 9, 3, 33, 1, 0),
            (2, 33, 2, 6, 17, 2, 2),
            (1, 64, 14, 15, 3, 1, 1),
            (1, 3, 15, 17, 64, 2, 0),
            (1, 5, 17, 14, 9, 1, 1),
        ]
    ),
    P("3x3, a row of many tiles", 1, 3, 6, 131, 5, (3, 3), (1, 1), (1, 0)),
    P("3x3, parts of a row and of channels", 1, 35, 6, 121, 67, (3, 3), (1, 1), (0, 1)),
    P("3x3, splits of many tiles", 2, 2, 61, 83, 3, (3, 3), (1, 1), (1, 2)),
    P("3x3, splits of many images", 33, 92, 5, 6, 91, (3, 3), (1, 1), (1, 1)),
    P("3x3, filters beyond a cache", 1, 250, 5, 6, 266, (3, 3), (1, 1), (2, 1)),
    P("3x3, many groups", 2, 34, 6, 5, 51, (3, 3), (1, 1), (0, 1), (1, 1), 17),
    P("169 rows of a GEMM", 1, 2, 13, 13, 3, (1, 1)),
    P("181 taps, above 168", 1, 181, 2, 3, 9, (1, 1)),
    P("256 taps", 1, 32, 3, 5, 9, (2, 4)),
    P("257 taps", 1, 257, 2, 3, 17, (1, 1)),
    P("297 taps", 2, 33, 4, 5, 10, (3, 3), (1, 2), (1, 1)),
    P("1040 taps, above 1024", 1, 65, 5, 6, 7, (4, 4), (2, 1)),
    P("1030 filters, above 1024", 1, 3, 2, 3, 1030, (1, 2)),
    P("large kernel", 1, 2, 19, 23, 3, (11, 13), (2, 3), (5, 6)),
    P("several images in a block", 33, 3, 5, 7, 4, (3, 3)),
    P("strided images in a block", 33, 4, 5, 7, 9, (3, 3), (2, 3), (1, 1)),
    P("as many blocks as images", 34, 2, 16, 18, 3, (1, 3)),
    P("batch 257 of one pixel", 257, 4, 3, 2, 5, (3, 2)),
    P("rows split, strided", 2, 3, 61, 83, 5, (3, 4), (3, 2), (1, 2)),
    P("rows split, dilated and strided", 1, 2, 70, 65, 3, (3, 3), (2, 3), (4, 2), (3, 2)),
    P("rows split by the slab", 1, 130, 21, 26, 9, (3, 2), (1, 1), (1, 1)),
    P("rows split, strides above a block", 1, 2, 90, 64, 3, (2, 3), (9, 5), (1, 1)),
    P("stem of 3 channels", 1, 3, 115, 97, 17, (7, 7), (2, 2), (3, 3)),
    P("many groups", 2, 34, 6, 5, 51, (2, 3), (1, 2), (1, 1), (1, 1), 17),
    P("depthwise, odd", 2, 33, 9, 10, 33, (3, 5), (2, 1), (1, 2), (1, 1), 33),
    P("depthwise multiplier, odd", 1, 7, 6, 9, 63, (3, 2), (1, 2), (1, 1), (2, 1), 7),
    P("filters in two ranges per group", 1, 4, 5, 6, 140, (3, 2), (1, 1), (0, 1), (1, 1), 2),
    P("pointwise, wide", 2, 65, 7, 9, 33, (1, 1)),
    P("pointwise strided, wide", 2, 33, 9, 14, 65, (1, 1), (2, 3)),
    P("panels across images", 5, 35, 13, 17, 37, (1, 1)),
    P("panels of rows", 1, 36, 41, 30, 33, (3, 3), (1, 1), (1, 0)),
    P("panels of rows, strided", 1, 35, 62, 59, 40, (3, 3), (2, 2), (1, 1)),
    P("panels of strides 1 and 2", 1, 37, 30, 61, 33, (2, 3), (1, 2), (0, 2)),
    P("panels, pointwise", 3, 66, 27, 20, 40, (1, 1)),
    P("panels, pointwise, strided", 2, 40, 35, 28, 49, (1, 1), (2, 2)),
    P("panels of two groups", 1, 66, 31, 29, 96, (3, 1), (1, 1), (1, 0), (1, 1), 2),
    P("panels of 300 channels", 1, 20, 28, 30, 300, (1, 2)),
    P("panels of 4104 taps", 1, 456, 28, 29, 17, (3, 3), (1, 1), (1, 1)),
]

# Depthwise: around tiles of 6, 8 and 16 pixels, pieces of 1 and 2 vectors, ranges of 32 channels,
# blocks of rows of 512 KB, chains of 16 taps, and at every kind of edge; in planes of rows of 10
# pixels or more, around slabs of 16 KB, tiles of 4 rows and chains of 256 columns. On a GPU around
# tiles of 128 columns and 256 strips of 4 rows, blocks of 128 and 64 channels.
DEPTHWISE = [
    *(
        P(f"depthwise, {w} wide, {c} channels", 2, c, 5, w, c, (3, 3), (1, 1), (1, 1), (1, 1), c)
        for w, c in [(1, 2), (2, 3), (7, 15), (8, 16), (15, 17), (16, 1), (17, 32), (31, 33)]
    ),
    P("depthwise, one column", 2, 3, 33, 1, 3, (3, 3), (1, 1), (1, 1), (1, 1), 3),
    P("depthwise, strides 1 and 2", 2, 16, 6, 33, 16, (3, 3), (1, 2), (1, 1), (1, 1), 16),
    P("depthwise, strides 3 and 2", 2, 17, 14, 19, 17, (3, 3), (3, 2), (1, 0), (1, 1), 17),
    P("depthwise, strides 2 and 3", 1, 3, 11, 20, 3, (3, 4), (2, 3), (2, 1), (1, 1), 3),
    P("depthwise, 5x5", 2, 18, 9, 17, 18, (5, 5), (1, 1), (2, 2), (1, 1), 18),
    P("depthwise, 5x5, strided", 2, 15, 13, 18, 15, (5, 5), (2, 2), (2, 1), (1, 1), 15),
    P("depthwise, 2x4", 2, 34, 8, 12, 34, (2, 4), (1, 1), (1, 2), (1, 1), 34),
    P("depthwise, pointwise", 2, 18, 5, 7, 18, (1, 1), (1, 1), (0, 0), (1, 1), 18),
    P("depthwise, dilated", 1, 16, 9, 14, 16, (3, 3), (1, 1), (2, 3), (2, 3), 16),
    P("depthwise, dilated, strided", 1, 5, 14, 17, 5, (3, 5), (2, 3), (2, 1), (4, 2), 5),
    P("depthwise, padding above the kernel", 1, 3, 4, 6, 3, (2, 3), (1, 2), (3, 4), (1, 1), 3),
    P("depthwise, large kernel", 1, 9, 11, 20, 9, (7, 17), (1, 1), (3, 8), (1, 1), 9),
    P("depthwise, multiplier 2", 2, 17, 7, 9, 34, (3, 3), (2, 1), (1, 1), (1, 1), 17),
    P("depthwise, multiplier 3", 1, 33, 6, 5, 99, (3, 2), (1, 2), (1, 0), (1, 1), 33),
    P("depthwise, rows split", 2, 33, 61, 40, 33, (3, 3), (1, 1), (1, 1), (1, 1), 33),
    P("depthwise, rows split, strided", 1, 34, 76, 46, 34, (3, 3), (2, 2), (1, 1), (1, 1), 34),
    P("depthwise, many images", 35, 4, 5, 6, 4, (3, 3), (1, 1), (1, 1), (1, 1), 4),
    P("depthwise, slabs of many planes", 2, 37, 14, 17, 37, (3, 3), (1, 1), (1, 1), (1, 1), 37),
    P("depthwise, many planes, strided", 3, 37, 19, 28, 37, (3, 3), (2, 2), (1, 1), (1, 1), 37),
    P("depthwise, wide, strides 2 and 3", 2, 3, 9, 40, 3, (3, 3), (2, 3), (1, 2), (1, 1), 3),
    P("depthwise, wide, multiplier 2", 2, 5, 7, 21, 10, (3, 3), (1, 2), (1, 1), (1, 1), 5),
    P("depthwise, wide, dilated", 1, 5, 12, 29, 5, (2, 3), (1, 1), (2, 3), (3, 2), 5),
    P("depthwise, chains of columns", 1, 2, 4, 280, 2, (3, 3), (1, 1), (1, 1), (1, 1), 2),
    P("depthwise, 7x7", 2, 17, 11, 13, 17, (7, 7), (1, 1), (3, 2), (1, 1), 17),
    P("depthwise, 3x3, two tiles of columns", 1, 3, 9, 131, 3, (3, 3), (1, 1), (1, 1), (1, 1), 3),
    P("depthwise, 5x5, tiles, multiplier 2", 1, 2, 29, 263, 4, (5, 5), (2, 2), (2, 1), (1, 1), 2),
    P("depthwise, 3x3, 132 channels", 2, 132, 5, 3, 132, (3, 3), (1, 1), (1, 1), (1, 1), 132),
    P("depthwise, 5x5, 66 channels", 1, 66, 7, 6, 66, (5, 5), (1, 1), (2, 2), (1, 1), 66),
    P("depthwise, 5x5, strided, even", 3, 12, 9, 14, 12, (5, 5), (2, 2), (1, 2), (1, 1), 12),
    P("depthwise, 3x3, far padding", 1, 8, 3, 5, 8, (3, 3), (2, 2), (5, 6), (1, 1), 8),
    P("depthwise, batch of none", 0, 5, 6, 5, 5, (3, 2), (1, 1), (1, 1), (1, 1), 5),
]

PROBLEMS = [*SMALL, *EDGES, *DEPTHWISE, *LESSON_LAYERS]


def named(name: str) -> Conv2dProblem:
    """The problem of PROBLEMS that has this name."""
    return next(problem for problem in PROBLEMS if problem.name == name)


# --------------------------------------------------------------------------------------------------
# Forms: from a contiguous tensor to one of its shape and dtype, laid out in another way. "expanded"
# has other values too; compare with what `form(tensor).contiguous()` gives.


def _sliced(tensor: Tensor) -> Tensor:
    """Gaps on every axis, and an offset."""
    room = tensor.new_full([2 * size + 3 for size in tensor.shape], float("nan"))
    view = room[tuple(slice(2, 2 + 2 * size, 2) for size in tensor.shape)]
    return view.copy_(tensor)


def _transposed(tensor: Tensor) -> Tensor:
    """Strides in the opposite order."""
    order = list(range(tensor.dim()))[::-1]
    return tensor.permute(order).contiguous().permute(order)


def _offset(tensor: Tensor) -> Tensor:
    """Dense, but its first element lies at no vector's boundary."""
    storage = tensor.new_full([tensor.numel() + 3], float("nan"))
    return storage[3:].view(tensor.shape).copy_(tensor)


def _expanded(tensor: Tensor) -> Tensor:
    """One image or filter, and one column, seen many times."""
    first = tensor[:1] if tensor.dim() == 1 else tensor[:1, ..., :1]
    return first.expand(tensor.shape)


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda tensor: tensor.contiguous(),
    "channels_last": _channels_last,
    "channels_last with gaps": lambda tensor: (
        _channels_last(torch.cat([tensor, tensor], dim=1) if tensor.dim() > 1 else tensor)[
            :, : tensor.shape[1]
        ]
        if tensor.dim() > 1
        else tensor
    ),
    "expanded": _expanded,
    "sliced": _sliced,
    "transposed": _transposed,
    "offset": _offset,
    "negated view": lambda tensor: torch._neg_view(-tensor),
}
LAYOUTS = ("contiguous", "channels_last")
