"""What "auto" chooses on CUDA: a table of reasons, read through the kernels' C interface."""

import itertools

import pytest
import torch
from emulated_cuda import FORMATS
from problems import LESSON_LAYERS, PROBLEMS, Conv2dProblem
from reference import FLOATS, HALVES, PASSES, declines

from convext.bench.layers import lesson, mobilenet_v2, resnet50, vgg16

P = Conv2dProblem
DTYPES = (*FLOATS, *HALVES)
PRODUCTS = ("implicit_gemm", "im2col", "direct")  # for large ones, in the order of preference
WIDE = P("", 8, 64, 28, 30, 72, (3, 3), (1, 1), (1, 1))


def every_call(p, dtypes=DTYPES):
    return itertools.product([p], PASSES, dtypes, FORMATS)


def first_of(kernels, names):
    """Of the algorithms that this build has."""
    return next(name for name in names if name in kernels.algorithms())


def algorithms_of(kernels, p, dtypes=DTYPES):
    """What the calls of a layer take."""
    return {kernels.auto(*call)[0] for call in every_call(p, dtypes)}


def test_the_last_row_takes_what_is_left(kernels):
    names = [name for name, _ in kernels.auto_rows()]
    assert names[-1] == "direct"
    assert set(names) >= set(kernels.algorithms())
    assert len(set(names)) == len(names)


def test_every_row_decides(kernels):
    depthwise = P("", 2, 6, 9, 8, 6, (3, 3), groups=6)
    taken = set()
    for p in (WIDE, depthwise, LESSON_LAYERS[0]):
        taken |= {kernels.auto(*call) for call in every_call(p)}
    assert taken == {row for row in kernels.auto_rows() if row[0] in kernels.algorithms()}


@pytest.mark.parametrize("p", PROBLEMS, ids=str)
def test_never_what_declines(kernels, p):
    for call in every_call(p):
        name, reason = kernels.auto(*call)
        assert (name, reason) in kernels.auto_rows()
        assert not declines(name, p)


@pytest.mark.parametrize(
    "p", [p for batch in (1, 5, 64, 512) for p in lesson(batch)], ids=lambda p: f"{p.N} of {p}"
)
def test_the_lesson_goes_direct(kernels, p):
    assert algorithms_of(kernels, p) == {"direct"}


@pytest.mark.parametrize("p", dict.fromkeys(resnet50(32) + vgg16(8)), ids=str)
def test_layers_for_photographs(kernels, p):
    expected = "direct" if p.C == 3 else first_of(kernels, PRODUCTS)
    assert algorithms_of(kernels, p, (torch.float32, *HALVES)) == {expected}
    # Nothing on a GPU is made for float64 but its plain units.
    expected = "direct" if p.C == 3 else first_of(kernels, PRODUCTS[1:])
    assert algorithms_of(kernels, p, [torch.float64]) == {expected}


@pytest.mark.parametrize("p", dict.fromkeys(mobilenet_v2(32)), ids=str)
def test_mobilenet(kernels, p):
    if p.groups > 1:
        expected = first_of(kernels, ["depthwise", "direct"])
    else:
        expected = "direct" if p.C == 3 else first_of(kernels, PRODUCTS)
    assert algorithms_of(kernels, p, (torch.float32, *HALVES)) == {expected}


@pytest.mark.parametrize(
    ("p", "names"),
    [
        (P("8 channels", 32, 8, 64, 64, 8, (3, 3)), PRODUCTS),
        (P("7 input channels", 32, 7, 64, 64, 64, (3, 3)), ["direct"]),
        (P("7 output channels", 32, 64, 64, 64, 7, (3, 3)), ["direct"]),
        (P("2**19 results", 8, 8, 64, 32, 32, (1, 1)), PRODUCTS),
        (P("fewer results", 8, 8, 64, 31, 32, (1, 1)), ["direct"]),
        (P("2**26 products", 1, 1024, 8, 8, 1024, (1, 1)), PRODUCTS),
        (P("fewer products", 1, 1024, 8, 7, 1024, (1, 1)), ["direct"]),
        (P("groups of 8", 32, 16, 64, 64, 16, (3, 3), groups=2), PRODUCTS),
        (P("groups of 4", 32, 16, 64, 64, 16, (3, 3), groups=4), ["direct"]),
        (P("one group of one channel", 32, 1, 64, 64, 8, (3, 3)), ["direct"]),
        (P("multiplier", 2, 4, 7, 9, 12, (3, 3), groups=4), ["depthwise", "direct"]),
        (P("depthwise and large", 64, 512, 64, 64, 8192, (3, 3), groups=512), ["depthwise"]),
        (P("no images", 0, 64, 64, 64, 64, (3, 3)), ["direct"]),
        (P("no input channels", 64, 0, 64, 64, 64, (3, 3)), ["direct"]),
    ],
    ids=str,
)
def test_where_rows_begin(kernels, p, names):
    assert algorithms_of(kernels, p, (torch.float32, *HALVES)) == {first_of(kernels, names)}


def test_a_row_whose_algorithm_declines_is_passed_over(kernels):
    p = P("2**31 planes", 1 << 20, 1 << 11, 1, 1, 1 << 11, (1, 1), groups=1 << 11)
    assert algorithms_of(kernels, p) == {"direct"}


def test_a_function_of_the_call(kernels):
    """Asked again in any order, the answers are the same."""
    calls = [call for p in (WIDE, *LESSON_LAYERS, *PROBLEMS[::9]) for call in every_call(p)]
    settings = [{"tf32": tf32, "compute_capability": cc} for tf32 in (0, 1) for cc in (75, 80, 90)]
    for setting in settings:
        first = [kernels.auto(*call, **setting) for call in calls]
        again = [kernels.auto(*call, **setting) for call in reversed(calls)]
        assert first == again[::-1]
