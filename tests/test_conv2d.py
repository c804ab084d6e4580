"""Values, memory formats, accuracy and reproducibility of the three convolution ops."""

import itertools

import pytest
import torch
from problems import FORMS, LAYOUTS, LESSON_LAYERS, PROBLEMS, SMALL, named
from reference import (
    FLOATS,
    HALVES,
    PASSES,
    WINOGRAD_ERROR,
    Expected,
    Operands,
    conv_matrix,
    convext_pass,
    expect,
    expected,
    operands,
    plain_forward,
    plain_grad_bias,
    plain_grad_input,
    plain_grad_weight,
    torch_pass,
)

from convext import _C
from convext.functional import conv2d

every_problem = pytest.mark.parametrize("problem", PROBLEMS, ids=str)
small_problem = pytest.mark.parametrize("problem", SMALL, ids=str)
every_pass = pytest.mark.parametrize("conv_pass", PASSES)


def in_form(data: Operands, form: str, device: str = "cpu") -> Operands:
    return Operands(*(FORMS[form](tensor.to(device)) for tensor in data))


# --------------------------------------------------------------------------------------------------
# Values


@every_problem
@every_pass
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_torch(problem, conv_pass, dtype, layout, device, isa, algorithm):
    data = in_form(operands(problem, dtype), layout, device)
    result = convext_pass(problem, conv_pass, data, algorithm)
    assert result.dtype == dtype
    assert result.device.type == device
    expected(problem, conv_pass, dtype, algorithm).check(result)


@every_problem
@every_pass
@pytest.mark.parametrize(("dtype", "layout"), list(zip(HALVES, LAYOUTS, strict=True)), ids=str)
def test_equals_torch_in_16_bits(problem, conv_pass, dtype, layout, device, isa, algorithm):
    data = in_form(operands(problem, dtype), layout, device)
    result = convext_pass(problem, conv_pass, data, algorithm)
    assert result.dtype == dtype
    expected(problem, conv_pass, dtype, algorithm).check(result)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "problem",
    [
        named("31 to 33 channels"),
        named("many groups"),
        named("depthwise, odd"),
        LESSON_LAYERS[1],
    ],
    ids=str,
)
@every_pass
def test_16_bits_in_either_layout(problem, conv_pass, dtype, layout, device, isa, algorithm):
    data = in_form(operands(problem, dtype), layout, device)
    expected(problem, conv_pass, dtype, algorithm).check(
        convext_pass(problem, conv_pass, data, algorithm)
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "problem",
    [
        named("all settings differ"),
        named("groups"),
        named("pointwise"),
        named("several images in a block"),
        named("16 to 17 channels"),
        named("depthwise, odd"),
    ],
    ids=str,
)
@every_pass
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_takes_any_strides(problem, conv_pass, form, dtype, device, algorithm):
    data = in_form(operands(problem, dtype), form, device)
    before = Operands(*(tensor.clone() for tensor in data))
    result = convext_pass(problem, conv_pass, data, algorithm)
    given = Operands(*(tensor.cpu() for tensor in before))
    expect(problem, conv_pass, given, algorithm).check(result)
    for tensor, was in zip(data, before, strict=True):
        assert torch.equal(tensor, was), "an operand was written to"


@pytest.mark.parametrize("forms", [("contiguous", "channels_last"), ("sliced", "transposed")])
@pytest.mark.parametrize("problem", [named("16 to 17 channels"), named("depthwise, odd")], ids=str)
@every_pass
def test_operands_of_different_forms(problem, forms, conv_pass, device, algorithm):
    data = operands(problem, torch.float32)
    for one, other in (forms, forms[::-1]):
        first, second = in_form(data, one, device), in_form(data, other, device)
        mixed = Operands(first.input, second.weight, first.bias, second.grad_output)
        if conv_pass == "grad_input":
            mixed = mixed._replace(grad_output=first.grad_output)
        result = convext_pass(problem, conv_pass, mixed, algorithm)
        expected(problem, conv_pass, torch.float32, algorithm).check(result)


@pytest.mark.parametrize("problem", [named("plain"), named("depthwise")], ids=str)
def test_zero_tensors_without_storage(problem, algorithm):
    zeros = Operands(*(torch._efficientzerotensor(t.shape) for t in operands(problem)))
    for conv_pass in PASSES:
        assert not convext_pass(problem, conv_pass, zeros, algorithm).any()


@small_problem
def test_equals_plain_loops(problem, device, isa, algorithm):
    data = operands(problem)
    on_device = in_form(data, "contiguous", device)
    ours = {p: convext_pass(problem, p, on_device, algorithm) for p in PASSES}
    loops = {
        "forward": plain_forward(problem, data.input, data.weight, data.bias),
        "grad_input": plain_grad_input(problem, data.grad_output, data.weight),
        "grad_weight": plain_grad_weight(problem, data.grad_output, data.input),
    }
    for conv_pass in PASSES:
        torch.testing.assert_close(ours[conv_pass].cpu(), loops[conv_pass], rtol=1e-12, atol=1e-12)


@small_problem
def test_grad_bias_equals_plain_loops(problem, device, isa):
    data = operands(problem)
    ours = torch.ops.convext.conv2d_backward_bias(data.grad_output.to(device))
    torch.testing.assert_close(
        ours.cpu(), plain_grad_bias(data.grad_output), rtol=1e-12, atol=1e-12
    )


@small_problem
def test_equals_the_convolution_matrix(problem, device, isa, algorithm):
    data = operands(problem)._replace(bias=torch.zeros(problem.O, dtype=torch.float64))
    matrix = conv_matrix(problem, data.weight)
    on_device = in_form(data, "contiguous", device)
    output = convext_pass(problem, "forward", on_device, algorithm).cpu()
    grad_input = convext_pass(problem, "grad_input", on_device, algorithm).cpu()
    torch.testing.assert_close(output.flatten(), matrix @ data.input.flatten(), rtol=0, atol=1e-12)
    torch.testing.assert_close(
        grad_input.flatten(), matrix.T @ data.grad_output.flatten(), rtol=0, atol=1e-12
    )


@every_problem
def test_no_bias_is_a_bias_of_zeros(problem, device, isa, algorithm):
    data = in_form(operands(problem, torch.float32), "contiguous", device)
    zeros = data._replace(bias=torch.zeros_like(data.bias))
    torch.testing.assert_close(
        convext_pass(problem, "forward", data._replace(bias=None), algorithm),
        convext_pass(problem, "forward", zeros, algorithm),
        rtol=0,
        atol=0,
    )


@every_problem
@pytest.mark.parametrize("dtype", [*FLOATS, *HALVES], ids=str)
def test_grad_bias(problem, dtype, device, isa):
    accumulated = torch.float64 if dtype == torch.float64 else torch.float32
    for form in FORMS.values():
        grad_output = form(operands(problem, dtype).grad_output.to(device))
        result = torch.ops.convext.conv2d_backward_bias(grad_output)
        exact = grad_output.cpu().double()
        total, sums = exact.sum((0, 2, 3)), exact.abs().sum((0, 2, 3))
        tolerance = 4 * problem.terms("grad_weight") ** 0.5 * torch.finfo(accumulated).eps * sums
        if dtype in HALVES:
            tolerance += torch.finfo(dtype).eps / 2 * (total.abs() + tolerance)
        assert result.dtype == dtype
        Expected(total, tolerance).check(result)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("problem", [named("16 to 17 channels"), named("depthwise, odd")], ids=str)
def test_nan_and_infinity_go_where_they_belong(problem, value, device, isa, algorithm):
    for dtype in (torch.float32, torch.bfloat16):
        data = operands(problem, dtype)
        spoiled = data.input.clone()
        spoiled[1, 3, 2, 4] = value
        data = data._replace(input=spoiled)
        ours = convext_pass(problem, "forward", in_form(data, "contiguous", device), algorithm)
        stock = torch_pass(problem, "forward", data.to(torch.float64))
        assert torch.equal(ours.cpu().isfinite(), stock.isfinite())
        assert torch.equal(ours.cpu().isnan(), stock.isnan())


@pytest.mark.parametrize("name", WINOGRAD_ERROR)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_winograd_spreads_nan_over_its_tiles(name, value, isa):
    """And no further: to those whose inputs overlap the pixel."""
    problem = named("3x3, 17x14 pixels, 5 to 9")
    data = operands(problem, torch.float32)
    spoiled = data.input.clone()
    spoiled[0, 3, 8, 5] = value
    ours = convext_pass(problem, "forward", data._replace(input=spoiled), name)
    stock = torch_pass(problem, "forward", data._replace(input=spoiled))
    assert not ours[~stock.isfinite()].isfinite().any()
    size = 4 if name == "winograd" else 2
    reached = torch.zeros_like(ours, dtype=torch.bool)
    for top, left in itertools.product(range(0, 17, size), range(0, 14, size)):
        if top - 1 <= 8 <= top + size and left - 1 <= 5 <= left + size:  # the padding is 1
            reached[..., top : top + size, left : left + size] = True
    assert ours[~reached].isfinite().all()


# --------------------------------------------------------------------------------------------------
# functional.conv2d


@pytest.mark.parametrize(
    ("settings", "size", "kernel"),
    [
        ({}, (2, 4, 7, 6), (3, 2)),
        ({"stride": 2, "padding": 1, "dilation": 2}, (2, 4, 7, 8), (3, 2)),
        ({"stride": (2, 1), "padding": (0, 2), "dilation": [1, 3]}, (2, 4, 7, 8), (3, 2)),
        ({"stride": (2,), "padding": [1]}, (2, 4, 7, 8), (3, 2)),
        ({"padding": "valid", "stride": 3}, (2, 4, 7, 8), (3, 2)),
        ({"padding": "same"}, (2, 4, 7, 8), (3, 5)),
        ({"padding": "same", "dilation": (2, 3)}, (2, 4, 7, 8), (4, 2)),
        ({"padding": "same"}, (4, 7, 8), (2, 4)),
        ({"groups": 2}, (4, 5, 6), (3, 2)),
        ({"padding": 2}, (0, 4, 5, 6), (3, 2)),
    ],
    ids=str,
)
def test_functional_takes_what_torch_takes(settings, size, kernel, device, algorithm):
    input = torch.randn(size, dtype=torch.float64, device=device)
    channels = 4 // settings.get("groups", 1)
    weight = torch.randn(6, channels, *kernel, dtype=torch.float64, device=device)
    for bias in (None, torch.randn(6, dtype=torch.float64, device=device)):
        ours = conv2d(input, weight, bias, **settings, algorithm=algorithm)
        stock = torch.nn.functional.conv2d(input, weight, bias, **settings)
        torch.testing.assert_close(ours, stock)


# --------------------------------------------------------------------------------------------------
# Memory formats


@every_problem
@pytest.mark.parametrize("input_layout", LAYOUTS)
@pytest.mark.parametrize("other_layout", LAYOUTS)
def test_memory_format(problem, input_layout, other_layout, device, algorithm):
    """channels_last where either operand is, contiguous else; as `suggest_memory_format` tells."""
    data = in_form(operands(problem, torch.float32), input_layout, device)
    other = in_form(operands(problem, torch.float32), other_layout, device)
    data = data._replace(weight=other.weight)
    used = {
        "forward": (data.input, data.weight),
        "grad_input": (data.grad_output, data.weight),
        "grad_weight": (data.grad_output, data.input),
    }
    for conv_pass, tensors in used.items():
        result = convext_pass(problem, conv_pass, data, algorithm)
        formats = {torch._prims_common.suggest_memory_format(tensor) for tensor in tensors}
        wanted = torch.channels_last if torch.channels_last in formats else torch.contiguous_format
        fresh = torch.empty(result.shape, memory_format=wanted)
        assert result.stride() == fresh.stride()


# --------------------------------------------------------------------------------------------------
# Accuracy


@every_problem
@every_pass
def test_float32_error_beside_torchs(problem, conv_pass, device, algorithm):
    """The largest error against float64 is at most twice that of PyTorch's own float32; of
    Winograd's algorithms, what their documentation says.

    The mean over draws, for the worst of one draw, or of all, is a matter of luck. A result rounded
    to the nearest float32 is off by half a unit in its last place; below that of the largest
    result, errors are taken as equal. One ISA stands for all: see test_same_bits_on_every_isa.
    """
    ours = stock = floor = 0.0
    draws = 16
    for seed in range(draws):
        data = operands(problem, torch.float32, seed)
        exact = torch_pass(problem, conv_pass, data.to(torch.float64))
        if exact.numel() == 0:
            return
        result = convext_pass(problem, conv_pass, in_form(data, "contiguous", device), algorithm)
        ours += (result.cpu().double() - exact).abs().max().item() / draws
        result = torch_pass(problem, conv_pass, data)
        stock += (result.double() - exact).abs().max().item() / draws
        floor += torch.finfo(torch.float32).eps / 2 * exact.abs().max().item() / draws
    allowed = WINOGRAD_ERROR.get(algorithm, 2) * max(stock, floor)
    assert ours <= allowed, f"our error {ours:.3g}, torch's {stock:.3g}"


# --------------------------------------------------------------------------------------------------
# The same bits


@every_problem
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.usefixtures("restore_isa")
def test_same_bits_on_every_isa(problem, dtype, layout, algorithm):
    data = in_form(operands(problem, dtype), layout)
    for conv_pass in PASSES:
        results = []
        for isa in _C.cpu_isas():
            _C.set_cpu_isa(isa)
            results.append(convext_pass(problem, conv_pass, data, algorithm))
        for result in results[1:]:
            assert torch.equal(result, results[0])


@every_problem
@every_pass
@pytest.mark.usefixtures("restore_threads")
def test_same_bits_for_any_number_of_threads(problem, conv_pass, isa, algorithm):
    data = operands(problem, torch.float32)
    torch.set_num_threads(1)
    first = convext_pass(problem, conv_pass, data, algorithm)
    for threads in (1, 2, 3, 8, 8):
        torch.set_num_threads(threads)
        assert torch.equal(convext_pass(problem, conv_pass, data, algorithm), first)


@pytest.mark.usefixtures("restore_threads")
def test_same_bits_of_grad_bias_for_any_number_of_threads(isa):
    for problem in PROBLEMS:
        grad_output = operands(problem, torch.float32).grad_output
        torch.set_num_threads(1)
        first = torch.ops.convext.conv2d_backward_bias(grad_output)
        for threads in (1, 2, 3, 8, 8):
            torch.set_num_threads(threads)
            assert torch.equal(torch.ops.convext.conv2d_backward_bias(grad_output), first)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "problem",
    [*LESSON_LAYERS, named("several images in a block"), named("depthwise, odd")],
    ids=str,
)
def test_same_bits_on_every_run(problem, layout, device, isa, algorithm):
    data = in_form(operands(problem, torch.float32), layout, device)
    for conv_pass in PASSES:
        first = convext_pass(problem, conv_pass, data, algorithm)
        for _ in range(5):
            assert torch.equal(convext_pass(problem, conv_pass, data, algorithm), first)
