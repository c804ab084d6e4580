"""Bad input to the convolutions, case by case: the exception PyTorch raises, and what it names."""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from problems import PROBLEMS, named
from reference import PASSES, Operands, convext_pass, declines, operands

import convext
from convext.functional import conv2d

ops = torch.ops.convext
torch_conv2d = torch.nn.functional.conv2d
LARGE = 2**62


def tensors(dtype=torch.float32):
    """(2, 4, 5, 6), (6, 4, 3, 2), (6)."""
    return (
        torch.ones(2, 4, 5, 6).to(dtype),
        torch.ones(6, 4, 3, 2).to(dtype),
        torch.ones(6).to(dtype),
    )


def raised(function, *args, **kwargs):
    """The exception that a call ends with, or None."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            function(*args, **kwargs)
        except Exception as exception:
            return exception
    return None


def check_refused(words, *args, **kwargs):
    """Ours raises in kind what torch raises, and its message holds all of `words`."""
    ours, stock = raised(conv2d, *args, **kwargs), raised(torch_conv2d, *args, **kwargs)
    assert ours is not None, "accepted"
    assert not isinstance(ours, AssertionError)
    wanted = type(stock) if stock else RuntimeError
    if issubclass(wanted, NotImplementedError):  # torch has no kernel there, we have a reason
        wanted = RuntimeError
    assert isinstance(ours, wanted), f"{ours!r}, where torch raises {stock!r}"
    for word in words:
        assert str(word) in str(ours), f"{word} is not in: {ours}"


# --------------------------------------------------------------------------------------------------
# Sizes and settings


@pytest.mark.parametrize(
    ("input_size", "weight_size", "settings", "words"),
    [
        ((2, 4, 5, 6), (6, 3, 3, 2), {}, ["[6, 3, 3, 2]", "[2, 4, 5, 6]", "3 channels", "got 4"]),
        ((2, 4, 5, 6), (6, 2, 3, 2), {"groups": 4}, ["groups=4", "[6, 2, 3, 2]"]),
        ((2, 4, 5, 6), (6, 1, 3, 2), {"groups": 4}, ["groups=4", "[6, 1, 3, 2]", "divisible"]),
        ((5, 6), (6, 4, 3, 2), {}, ["input", "[5, 6]"]),
        ((1, 2, 4, 5, 6), (6, 4, 3, 2), {}, ["input", "[1, 2, 4, 5, 6]"]),
        ((), (6, 4, 3, 2), {}, ["input", "[]"]),
        ((0,), (6, 4, 3, 2), {}, ["input", "[0]"]),
        ((2, 4, 5, 6), (4, 3, 2), {}, ["weight", "[4, 3, 2]"]),
        ((2, 4, 5, 6), (6, 4, 3, 2, 1), {}, ["weight", "[6, 4, 3, 2, 1]"]),
        ((2, 4, 5, 6), (), {}, ["weight", "[]"]),
        ((2, 4, 5, 6), (0, 4, 3, 2), {}, ["weight", "[0, 4, 3, 2]"]),
        ((2, 4, 5, 6), (6, 4, 0, 2), {}, ["kernel size", "[6, 4, 0, 2]"]),
        ((2, 4, 0, 6), (6, 4, 3, 2), {}, ["input", "[2, 4, 0, 6]"]),
        ((2, 4, 5, 6), (6, 4, 6, 2), {}, ["Kernel size", "height", "5", "6"]),
        ((2, 4, 5, 6), (6, 4, 3, 9), {"padding": 1}, ["Kernel size", "width", "8", "9"]),
        ((2, 4, 5, 6), (6, 4, 3, 2), {"dilation": (3, 1)}, ["height", "dilation 3", "7"]),
        ((2, 4, 5, 6), (6, 4, 3, 2), {"stride": 0}, ["stride", "[0, 0]"]),
        ((2, 4, 5, 6), (6, 4, 3, 2), {"stride": (1, -2)}, ["stride", "[1, -2]"]),
        ((2, 4, 5, 6), (6, 4, 3, 2), {"padding": -1}, ["padding", "[-1, -1]"]),
        ((2, 4, 5, 6), (6, 4, 3, 2), {"padding": (0, -3)}, ["padding", "[0, -3]"]),
        ((2, 4, 5, 6), (6, 4, 3, 2), {"dilation": (0, 1)}, ["dilation", "[0, 1]"]),
        ((2, 4, 5, 6), (6, 4, 3, 2), {"dilation": -1}, ["dilation", "[-1, -1]"]),
        ((2, 4, 5, 6), (6, 4, 3, 2), {"groups": 0}, ["groups", "0"]),
        ((2, 4, 5, 6), (6, 4, 3, 2), {"groups": -2}, ["groups", "-2"]),
        ((2, 4, 5, 6), (6, 4, 3, 2), {"groups": 3}, ["groups=3", "12 channels"]),
        ((2, 4, 5, 6), (6, 4, 3, 2), {"groups": LARGE}, [LARGE]),
        ((2, 4, 5, 6), (6, 4, 3, 2), {"stride": (1, 1, 1)}, ["stride", "[1, 1, 1]"]),
        ((2, 4, 5, 6), (6, 4, 3, 2), {"stride": ()}, ["stride", "[]"]),
        ((2, 4, 5, 6), (6, 4, 3, 2), {"padding": (1, 2, 3)}, ["padding", "[1, 2, 3]"]),
        ((2, 4, 5, 6), (6, 4, 3, 2), {"dilation": (1, 1, 2)}, ["dilation", "[1, 1, 2]"]),
        ((2, 4, 5, 6), (6, 4, 3, 2), {"padding": LARGE}, ["padded input", LARGE]),
        ((2, 4, 5, 6), (6, 4, 3, 2), {"padding": 2**63 - 1}, ["padded input", 2**63 - 1]),
        ((2, 4, 5, 6), (6, 4, 3, 2), {"padding": 2**60}, ["padded input", "too large"]),
        ((2, 4, 5, 6), (6, 4, 3, 2), {"padding": 2**40}, []),
        ((2, 4, 5, 6), (6, 4, 3, 2), {"dilation": LARGE}, ["dilated kernel", LARGE]),
        ((2, 4, 5, 6), (6, 4, 3, 2), {"padding": "full"}, ["padding", "full"]),
        ((2, 4, 5, 6), (6, 4, 3, 2), {"padding": "same", "stride": 2}, ["same", "[2, 2]"]),
        ((2, 4, 5, 6), (4, 3, 2), {"padding": "same"}, ["weight", "[4, 3, 2]"]),
        ((2, 4, 5, 6), (6, 4, 3, 2), {"padding": "same", "dilation": (1, 1, 2)}, ["dilation"]),
        ((2, 4, 5, 6), (6, 4, 3, 2), {"padding": 1.5}, ["padding", "1.5"]),
        ((2, 4, 5, 6), (6, 4, 3, 2), {"padding": None}, ["padding", "None"]),
        ((2, 4, 5, 6), (6, 4, 3, 2), {"stride": (1, 2.0)}, ["stride", "(1, 2.0)"]),
        ((2, 4, 5, 6), (6, 4, 3, 2), {"groups": 1.0}, ["groups", "1.0"]),
    ],
    ids=str,
)
def test_sizes_and_settings(input_size, weight_size, settings, words):
    check_refused(words, torch.ones(input_size), torch.ones(weight_size), **settings)


def test_a_stride_beyond_the_input_is_fine():
    input, weight, bias = tensors()
    ours = conv2d(input, weight, bias, stride=(LARGE, 2**63 - 1))
    torch.testing.assert_close(ours, torch_conv2d(input, weight, bias, stride=(9, 9)))


@pytest.mark.parametrize("size", [(5,), (6, 1), (), (0,)])
def test_bias_of_another_size(size):
    input, weight, _ = tensors()
    check_refused(["bias", str(list(size)), "6 elements"], input, weight, torch.ones(size))


# --------------------------------------------------------------------------------------------------
# Tensors


@pytest.mark.parametrize(
    "dtype", [torch.int32, torch.int64, torch.uint8, torch.bool, torch.complex64]
)
def test_dtypes_without_a_kernel(dtype):
    """PyTorch computes some of these; we say which we do."""
    names = {torch.int32: "Int", torch.int64: "Long", torch.uint8: "Byte", torch.bool: "Bool"}
    input, weight, bias = tensors(dtype)
    words = ["input", names.get(dtype, "Complex"), "float32, float64, bfloat16 or float16"]
    check_refused(words, input, weight, bias)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int64])
def test_mixed_dtypes(dtype):
    input, weight, bias = tensors()
    name = {torch.float64: "Double", torch.float16: "Half", torch.int64: "Long"}[dtype]
    check_refused(["weight", name], input, weight.to(dtype), bias)
    check_refused(["input", name], input.to(dtype), weight, bias)
    check_refused(["bias", name], input, weight, bias.to(dtype))


def unusual(tensor):
    """Other things than a dense tensor that may stand in a tensor's place."""
    yield "Sparse", tensor.to_sparse()
    if tensor.dim() >= 2:
        yield "SparseCsr", torch.ones(3, 4).to_sparse_csr()
        yield "SparseCsr", torch.ones(2, 2, 3, 4).to_sparse_csr()
        yield "Mkldnn", tensor.to_mkldnn()
        yield "ested", torch.nested.nested_tensor([tensor[0], tensor[1]])
    yield "quantized", torch.quantize_per_tensor(tensor, 0.1, 0, torch.quint8)


@pytest.mark.filterwarnings("ignore")
def test_layouts_without_a_kernel():
    for place, name in enumerate(("input", "weight", "bias")):
        for word, other in unusual(tensors()[place]):
            arguments = [*tensors()]
            arguments[place] = other
            for function in (conv2d, lambda *x: ops.conv2d(*x, [1, 1], [0, 0], [1, 1], 1)):
                exception = raised(function, *arguments)
                assert isinstance(exception, RuntimeError), (name, word, exception)
                if other.dim() == 4 and word != "ested":
                    assert name in str(exception), (name, word, exception)
                    assert word in str(exception), (name, word, exception)


@pytest.mark.filterwarnings("ignore")
def test_layouts_without_a_kernel_in_the_backward_verbs():
    x, w, _ = tensors()
    g, tail = torch.ones(2, 6, 3, 5), ([1, 1], [0, 0], [1, 1], 1)
    for _, other in unusual(g):
        assert isinstance(raised(ops.conv2d_backward_input, other, w, x.shape, *tail), RuntimeError)
        assert isinstance(
            raised(ops.conv2d_backward_weight, other, x, w.shape, *tail), RuntimeError
        )
        assert isinstance(raised(ops.conv2d_backward_bias, other), RuntimeError)


def test_no_tensor():
    input, weight, bias = tensors()
    check_refused(["input", "NoneType"], None, weight)
    check_refused(["weight", "NoneType"], input, None)
    check_refused(["input", "list"], input.tolist(), weight)
    check_refused(["bias", "int"], input, weight, 1)
    tail = ([1, 1], [0, 0], [1, 1], 1)
    assert isinstance(raised(ops.conv2d, None, weight, bias, *tail), Exception)
    assert isinstance(raised(ops.conv2d, input, None, bias, *tail), Exception)
    assert isinstance(raised(ops.conv2d_backward_input, input, None, [1], *tail), Exception)
    assert isinstance(raised(ops.conv2d_backward_weight, None, input, [1], *tail), Exception)
    assert isinstance(raised(ops.conv2d_backward_bias, None), Exception)


def test_meta_beside_cpu():
    """PyTorch computes nothing there and gives a tensor of the right size; we may also refuse."""
    input, weight, bias = tensors()
    for arguments in (
        (input.to("meta"), weight, bias),
        (input, weight.to("meta"), bias),
        (input, weight, bias.to("meta")),
    ):
        try:
            ours = conv2d(*arguments)
        except RuntimeError as exception:
            assert "device" in str(exception)  # noqa: PT017
        else:
            assert ours.shape == torch_conv2d(*arguments).shape


@pytest.mark.parametrize("held", [0, 8])
def test_storage_that_was_shrunk(held):
    for place, name in enumerate(("input", "weight", "bias")):
        arguments = [*tensors()]
        arguments[place].untyped_storage().resize_(held)
        exception = raised(conv2d, *arguments)
        assert isinstance(exception, RuntimeError)
        assert name in str(exception)
        assert f"storage holds {held}" in str(exception)
    grad = torch.ones(2, 6, 3, 5)
    grad.untyped_storage().resize_(held)
    input, weight, _ = tensors()
    tail = ([1, 1], [0, 0], [1, 1], 1)
    for exception in (
        raised(ops.conv2d_backward_input, grad, weight, input.shape, *tail),
        raised(ops.conv2d_backward_weight, grad, input, weight.shape, *tail),
        raised(ops.conv2d_backward_bias, grad),
    ):
        assert isinstance(exception, RuntimeError)
        assert "grad_output" in str(exception)


def test_inference_tensors():
    input, weight, bias = tensors()
    with torch.inference_mode():
        made = input.clone()
    torch.testing.assert_close(conv2d(made, weight, bias), torch_conv2d(input, weight, bias))
    weight.requires_grad_()
    ours, stock = raised(conv2d, made, weight, bias), raised(torch_conv2d, made, weight, bias)
    assert isinstance(ours, type(stock))
    assert "Inference tensors cannot be saved for backward" in str(ours)


# --------------------------------------------------------------------------------------------------
# Algorithms


@pytest.mark.parametrize("name", ["fastest", "", "Direct", "direct ", "im2col\0", "ä"])
def test_unknown_algorithm(name, device):
    data = [tensor.to(device) for tensor in operands(named("plain"))]
    with pytest.raises(ValueError, match="no algorithm") as caught:
        conv2d(*data[:3], algorithm=name)
    if "\0" not in name:  # where C++ ends the message
        assert all(known in str(caught.value) for known in ("auto", *convext.algorithms(device)))


def test_unknown_algorithm_of_an_empty_batch(device):
    data = [tensor.to(device) for tensor in operands(named("batch of none"))]
    with pytest.raises(ValueError, match="no algorithm"):
        conv2d(*data[:3], algorithm="fastest")


def test_a_declined_problem_is_an_error(device):
    """Never another algorithm in its place. What is declined is tested nowhere else."""
    for algorithm in convext.algorithms(device):
        for problem in PROBLEMS:
            if not declines(algorithm, problem):
                continue
            data = Operands(*(tensor.to(device) for tensor in operands(problem, torch.float32)))
            for conv_pass in PASSES:
                exception = raised(convext_pass, problem, conv_pass, data, algorithm)
                assert isinstance(exception, ValueError), f"{algorithm}, {problem}, {conv_pass}"
                message = str(exception)
                reason = message.partition(f'algorithm "{algorithm}" cannot do this problem: ')[2]
                assert len(reason) > 10, message


# --------------------------------------------------------------------------------------------------
# The backward verbs, which anybody may call


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ((2, 4, 5), ["[2, 4, 5]"]),
        ((2, 4, 5, 6, 1), ["[2, 4, 5, 6, 1]"]),
        ((), ["[]"]),
        ((2, 3, 5, 6), ["[2, 3, 5, 6]", "4 channels"]),
        ((3, 4, 5, 6), ["grad_output", "[3, 6, 3, 5]", "[2, 6, 3, 5]"]),
        ((2, 4, 6, 5), ["grad_output", "[2, 6, 4, 4]", "[2, 6, 3, 5]"]),
        ((2, 4, 2, 6), ["Kernel size", "height"]),
        ((-2, 4, 5, 6), ["[-2, 4, 5, 6]"]),
        ((2, 4, 5, -6), ["[2, 4, 5, -6]"]),
        ((2, 4, LARGE, 6), [LARGE]),
        ((LARGE, 4, 5, 6), [LARGE]),
        ((2, 4, 2**63 - 1, 2**63 - 1), [2**63 - 1]),
    ],
    ids=str,
)
def test_backward_input_sizes(size, words, algorithm):
    grad_output, weight = torch.ones(2, 6, 3, 5), torch.ones(6, 4, 3, 2)
    tail = ([1, 1], [0, 0], [1, 1], 1, algorithm)
    exception = raised(ops.conv2d_backward_input, grad_output, weight, size, *tail)
    assert isinstance(exception, RuntimeError)
    for word in words:
        assert str(word) in str(exception)


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ((6, 4, 3), ["[6, 4, 3]"]),
        ((), ["[]"]),
        ((5, 4, 3, 2), ["grad_output", "[2, 5, 3, 5]", "[2, 6, 3, 5]"]),
        ((6, 3, 3, 2), ["3 channels"]),
        ((6, 4, 2, 3), ["grad_output", "[2, 6, 4, 4]"]),
        ((6, 4, 9, 2), ["Kernel size", "height"]),
        ((6, 4, 0, 2), ["[6, 4, 0, 2]"]),
        ((-6, 4, 3, 2), ["[-6, 4, 3, 2]"]),
        ((6, -4, 3, 2), ["[6, -4, 3, 2]"]),
        ((LARGE, 4, 3, 2), [LARGE]),
        ((6, LARGE, 3, 2), [LARGE]),
        ((6, 4, LARGE, LARGE), [LARGE]),
    ],
    ids=str,
)
def test_backward_weight_sizes(size, words, algorithm):
    grad_output, input = torch.ones(2, 6, 3, 5), torch.ones(2, 4, 5, 6)
    tail = ([1, 1], [0, 0], [1, 1], 1, algorithm)
    exception = raised(ops.conv2d_backward_weight, grad_output, input, size, *tail)
    assert isinstance(exception, RuntimeError)
    for word in words:
        assert str(word) in str(exception)


@pytest.mark.parametrize("size", [(2, 6, 3), (6,), (), (2, 6, 3, 5, 1)])
def test_grad_output_of_other_dimensions(size):
    grad_output, tail = torch.ones(size), ([1, 1], [0, 0], [1, 1], 1)
    for exception in (
        raised(ops.conv2d_backward_input, grad_output, torch.ones(6, 4, 3, 2), (2, 4, 5, 6), *tail),
        raised(
            ops.conv2d_backward_weight, grad_output, torch.ones(2, 4, 5, 6), (6, 4, 3, 2), *tail
        ),
        raised(ops.conv2d_backward_bias, grad_output),
    ):
        assert isinstance(exception, RuntimeError)
        assert "grad_output" in str(exception)
        assert str(list(size)) in str(exception)


def test_empty_tensors_of_huge_sizes(algorithm):
    """Sizes that no memory backs, whose products do not fit into 64 bits."""
    huge = 2**32
    tail = ([1, 1], [huge // 2 - 1, huge // 2 - 1], [1, 1], 1, algorithm)
    grad_output = torch.ones(0, 1, 1, 1).expand(0, 1, huge, huge)
    weight = torch.ones(1, 1, 1, 1)
    result = ops.conv2d_backward_input(grad_output, weight, [0, 1, 2, 2], *tail)
    assert result.shape == (0, 1, 2, 2)
    tail = ([1, 1], [huge, 0], [1, 1], 1, algorithm)
    result = ops.conv2d_backward_input(
        torch.ones(1, 1, 2, 1), torch.ones(1, 0, 2 * huge, 1), [1, 0, 1, 1], *tail
    )
    assert result.shape == (1, 0, 1, 1)


@pytest.mark.parametrize("distance", [12, 2**14, 2**40])
def test_depthwise_taps_far_apart(distance, isa):
    """Only the middle tap meets the input; what lies between taps is no workspace."""
    x, w = torch.randn(2, 3, 1, 12, requires_grad=True), torch.randn(3, 1, 3, 3, requires_grad=True)
    y = conv2d(x, w, None, 1, distance, distance, 3, algorithm="depthwise")
    g = torch.randn_like(y)
    grad_x, grad_w = torch.autograd.grad(y, (x, w), g)
    middle = w[:, 0, 1, 1].reshape(3, 1, 1)
    assert torch.equal(y, x * middle)
    assert torch.equal(grad_x, g * middle)
    torch.testing.assert_close(grad_w[:, 0, 1, 1], (g * x).sum((0, 2, 3)))
    assert grad_w.count_nonzero() == 3


def test_everything_may_require_gradients():
    x, w, b = (tensor.requires_grad_() for tensor in tensors())
    g = torch.ones(2, 6, 3, 5, requires_grad=True)
    tail = ([1, 1], [0, 0], [1, 1], 1)
    results = (
        ops.conv2d(x, w, b, *tail),
        ops.conv2d_backward_input(g, w, x.shape, *tail),
        ops.conv2d_backward_weight(g, x, w.shape, *tail),
        ops.conv2d_backward_bias(g),
    )
    torch.autograd.backward([result.sum() for result in results])
    assert all(tensor.grad is not None for tensor in (x, w, b, g))


@pytest.mark.parametrize("seed", [1, 2])
def test_random_calls_neither_crash_nor_err(seed):
    program = Path(__file__).with_name("fuzz_conv2d.py")
    done = subprocess.run(
        [sys.executable, program, str(seed), "2000"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
