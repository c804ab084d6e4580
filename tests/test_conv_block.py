"""The fused block against PyTorch's three operations in float64, and numerical derivatives."""

import itertools
from statistics import median

import pytest
import torch
from problems import PROBLEMS, SMALL, Conv2dProblem, named
from reference import HALVES, operands
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import convext
from convext import functional

ops = torch.ops.convext
ORDERS = ("conv-relu-norm", "conv-norm-relu")
LAYOUTS = (torch.contiguous_format, torch.channels_last)
NAMES = ("input", "weight", "bias", "norm_weight", "norm_bias")
MODES = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
order_parameter = pytest.mark.parametrize("order", ORDERS)


def can_train(p: Conv2dProblem) -> bool:
    """A channel's variance takes two values."""
    n, _, height, width = p.output_size
    return n * height * width != 1


def example(p: Conv2dProblem, dtype=torch.float64, layout=torch.contiguous_format, wide=False):
    """Tensors of a block, by name; `wide` gives 16-bit ones a norm with float32 parameters."""
    data = [tensor.clone() for tensor in operands(p, dtype)[:3]]
    random = torch.Generator().manual_seed(1)
    of_norm = torch.float32 if wide else dtype

    def values(scale, shift):
        return (torch.rand(p.O, generator=random, dtype=torch.float64) * scale + shift).to(of_norm)

    return {
        "input": data[0].contiguous(memory_format=layout),
        "weight": data[1].contiguous(memory_format=layout),
        "bias": data[2],
        "norm_weight": values(2, -0.5),
        "norm_bias": values(2, -1),
        "running_mean": values(6, 0),
        "running_var": values(2, 0.5),
    }


def torch_block(
    input,
    weight,
    bias,
    running_mean,
    running_var,
    norm_weight,
    norm_bias,
    *settings,
    training,
    momentum=0.1,
    eps=1e-5,
    order,
):
    """What functional.conv_block computes, by PyTorch."""

    def norm(x):
        return F.batch_norm(
            x, running_mean, running_var, norm_weight, norm_bias, training, momentum, eps
        )

    convolved = F.conv2d(input, weight, bias, *settings)
    return norm(F.relu(convolved)) if order == "conv-relu-norm" else F.relu(norm(convolved))


def run(function, p, data, device="cpu", **options):
    """Everything that a forward and a backward on a device leave behind, by name, on the CPU."""
    data = {name: t.detach().to(device, copy=True) for name, t in data.items()}
    for name in NAMES:
        data[name].requires_grad_()
    output = function(**data, **settings(p), **options)
    torch.manual_seed(2)
    output.backward(torch.randn(output.shape, dtype=torch.float64).to(device, output.dtype))
    results = {"output": output.detach()}
    results |= {name: data[name] for name in ("running_mean", "running_var")}
    results |= {f"grad_{name}": data[name].grad for name in NAMES}
    return {name: t.cpu() for name, t in results.items()}


def settings(p: Conv2dProblem) -> dict:
    return dict(zip(("stride", "padding", "dilation", "groups"), p.settings, strict=True))


def by_torch(p, data, **options):
    def function(**arguments):
        four = [arguments.pop(name) for name in ("stride", "padding", "dilation", "groups")]
        first = [arguments.pop(n) for n in ("input", "weight", "bias")]
        statistics = [arguments.pop(n) for n in ("running_mean", "running_var")]
        parameters = [arguments.pop(n) for n in ("norm_weight", "norm_bias")]
        return torch_block(*first, *statistics, *parameters, *four, **arguments)

    return run(function, p, data, **options)


@pytest.mark.parametrize("p", [p for p in PROBLEMS if p.C > 0], ids=str)
def test_equals_torch_in_float64(device, isa, algorithm, p):
    for order, layout, training in itertools.product(ORDERS, LAYOUTS, (True, False)):
        if training and not can_train(p):
            continue  # test_training_on_one_value_per_channel
        data = example(p, layout=layout)
        options = {"training": training, "order": order, "momentum": 0.3, "eps": 1e-3}
        got = run(functional.conv_block, p, data, device, algorithm=algorithm, **options)
        expected = by_torch(p, data, **options)
        assert got.keys() == expected.keys()
        for name, value in got.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-9, msg=name)
        data = {name: t.to(device) for name, t in data.items()}
        with torch.no_grad():  # in evaluation, another road: all in one pass
            fresh = functional.conv_block(**data, **settings(p), algorithm=algorithm, **options)
        torch.testing.assert_close(fresh.cpu(), expected["output"], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@MODES
@order_parameter
def test_no_less_accurate_than_torch(device, isa, dtype, training, order):
    """Root mean square errors against float64 within twice PyTorch's in the same dtype, in the
    median over draws: in some, a rounding flips a ReLU's gate, and the error is a whole gradient.
    """
    p = Conv2dProblem("accuracy", 4, 8, 12, 9, 19, (3, 2), (1, 2), (1, 0))
    ours, stock = {}, {}
    for seed in range(15):
        data = example(p, dtype) | operands(p, dtype, seed)._asdict()
        del data["grad_output"]
        options = {"training": training, "order": order}
        exact = by_torch(p, {name: t.double() for name, t in data.items()}, **options)
        for errors, results in (
            (ours, run(functional.conv_block, p, data, device, **options)),
            (stock, by_torch(p, data, **options)),
        ):
            for name, value in results.items():
                error = (value.double() - exact[name]).square().mean().sqrt().item()
                errors.setdefault(name, []).append(error)
    for name, errors in ours.items():
        if name == "grad_bias" and order == "conv-norm-relu" and training:
            # It is zero but for rounding: compared with what it sums.
            assert median(errors) < 64 * torch.finfo(dtype).eps
        else:
            assert median(errors) <= 2 * median(stock[name]), name


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@order_parameter
def test_takes_a_norm_with_wide_parameters(device, dtype, order):
    p = named("plain")
    data = example(p, dtype, wide=True)
    got = run(functional.conv_block, p, data, device, training=True, order=order)
    expected = by_torch(p, data, training=True, order=order)
    for name, value in got.items():
        assert value.dtype == expected[name].dtype, name
        torch.testing.assert_close(value, expected[name], rtol=0.05, atol=0.1, msg=name)


@pytest.mark.parametrize("p", [p for p in SMALL if p.C > 0 and can_train(p)][:8], ids=str)
@MODES
@order_parameter
def test_gradcheck(device, p, training, order):
    data = {name: t.to(device) for name, t in example(p).items()}
    differentiated = [data[name].clone().requires_grad_() for name in NAMES]

    def function(*tensors):
        arguments = data | dict(zip(NAMES, tensors, strict=True))
        if training:
            arguments |= {"running_mean": None, "running_var": None}
        return functional.conv_block(**arguments, **settings(p), training=training, order=order)

    assert torch.autograd.gradcheck(function, differentiated)
    assert torch.autograd.gradgradcheck(function, differentiated)


@MODES
@order_parameter
def test_gradients_without_what_may_be_absent(training, order):
    p = named("plain")
    data = example(p)
    for absent in (["bias"], ["norm_weight", "norm_bias"], ["bias", "norm_weight", "norm_bias"]):
        arguments = {
            name: None if name in absent else t.clone().requires_grad_(name in NAMES)
            for name, t in data.items()
        }
        results = []
        for function in (functional.conv_block, torch_block):
            output = function(
                *(arguments[n] for n in ("input", "weight", "bias", "running_mean")),
                *(arguments[n] for n in ("running_var", "norm_weight", "norm_bias")),
                *p.settings,
                training=training,
                order=order,
            )
            leaves = [t for n, t in arguments.items() if n in NAMES and t is not None]
            results.append([output, *torch.autograd.grad(output.square().sum(), leaves)])
        for mine, other in zip(*results, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("wanted", NAMES)
def test_only_the_gradients_asked_for(wanted):
    p = named("plain")
    data = example(p)
    data[wanted].requires_grad_()
    output = functional.conv_block(**data, **settings(p), training=True)
    output.sum().backward()
    assert data[wanted].grad.shape == data[wanted].shape
    assert all(t.grad is None for name, t in data.items() if name != wanted)


@MODES
@order_parameter
def test_is_one_node(training, order):
    p = named("plain")
    data = example(p)
    for name in NAMES:
        data[name].requires_grad_()
    output = functional.conv_block(**data, **settings(p), training=training, order=order)
    following = [node for node, _ in output.grad_fn.next_functions if node is not None]
    assert [node.name() for node in following] == ["torch::autograd::AccumulateGrad"] * len(NAMES)


@MODES
@order_parameter
def test_calls_no_kernel_but_ours(algorithm, training, order):
    p = named("plain")
    data = example(p)
    data["input"].requires_grad_()
    with torch.profiler.profile() as profile:
        functional.conv_block(
            **data, **settings(p), training=training, order=order, algorithm=algorithm
        ).sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert {"convext::conv_block_backward", "convext::conv2d_backward_input"} <= names
    foreign = ("conv", "mm", "mkldnn", "batch_norm", "relu", "threshold", "unfold")
    assert not [n for n in names if n.startswith("aten::") and any(f in n for f in foreign)]


@order_parameter
@pytest.mark.parametrize(
    "p",
    [
        Conv2dProblem("dense", 9, 5, 13, 11, 21, (3, 2), (2, 1), (1, 1)),
        named("depthwise, rows split"),
        named("depthwise, multiplier 2"),
    ],
    ids=str,
)
def test_same_bits_on_every_isa_and_number_of_threads(restore_isa, restore_threads, p, order):
    for dtype, layout, training in itertools.product(
        (torch.float32, torch.float64, torch.bfloat16), LAYOUTS, (True, False)
    ):
        data = example(p, dtype, layout)
        seen = []
        for isa, threads in itertools.product(convext._C.cpu_isas(), (1, 2, 5)):
            convext._C.set_cpu_isa(isa)
            torch.set_num_threads(threads)
            seen.append(run(functional.conv_block, p, data, training=training, order=order))
        for other in seen[1:]:
            for name, value in other.items():
                assert torch.equal(value, seen[0][name]), (dtype, layout, training, name)


@order_parameter
def test_nan_and_infinity_pass_as_in_torch(order):
    p = named("plain")
    data = example(p)
    data["input"][0, 0, 1, 2] = float("nan")
    data["input"][1, 1, 3, 3] = float("inf")
    got = run(functional.conv_block, p, data, training=False, order=order)
    expected = by_torch(p, data, training=False, order=order)
    for name, value in got.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-9, equal_nan=True)


@MODES
def test_empty_batch(training):
    p = Conv2dProblem("no images", 0, 3, 5, 6, 4, (3, 2))
    got = run(functional.conv_block, p, example(p), training=training, order=ORDERS[0])
    assert got["output"].shape == (0, 4, 3, 5)
    assert got["grad_weight"].count_nonzero() == 0
    assert torch.equal(got["running_mean"], example(p)["running_mean"])


@MODES
@order_parameter
def test_large_mean_keeps_the_digits_of_the_variance(isa, training, order):
    """The statistics are those of values around 1000 with a deviation of about 1."""
    p = Conv2dProblem("large mean", 16, 3, 20, 17, 8, (1, 1))
    data = example(p, torch.float32)
    data["bias"] = data["bias"] + 1000
    got = run(functional.conv_block, p, data, training=training, order=order)
    exact = by_torch(p, {n: t.double() for n, t in data.items()}, training=training, order=order)
    torch.testing.assert_close(got["running_var"].double(), exact["running_var"], rtol=1e-3, atol=0)
    if training:
        torch.testing.assert_close(got["output"].double(), exact["output"], rtol=1e-2, atol=1e-3)


# --------------------------------------------------------------------------------------------------
# Errors


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"order": "relu-conv"}, ValueError, ["order", "conv-relu-norm", "relu-conv"]),
        ({"algorithm": "fft"}, ValueError, ["fft", "direct"]),
        ({"norm_weight": torch.ones(3)}, RuntimeError, ["norm_weight", "4", "3"]),
        ({"norm_bias": torch.ones(4).double()}, RuntimeError, ["norm_bias", "type"]),
        ({"bias": torch.ones(5)}, RuntimeError, ["bias", "4", "5"]),
        ({"running_mean": torch.ones(3)}, RuntimeError, ["mean", "4", "3"]),
        ({"eps": -1.0}, ValueError, ["eps", "-1"]),
        ({"stride": 0}, RuntimeError, ["stride"]),
        ({"padding": "some"}, RuntimeError, ["padding", "some"]),
        ({"input": torch.ones(2, 4)}, RuntimeError, ["input", "[2, 4]"]),
        ({"weight": [1]}, TypeError, ["weight", "list"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
@MODES
def test_bad_arguments(change, error, words, training):
    data = example(named("plain"), torch.float32) | change
    with pytest.raises(error) as info:
        functional.conv_block(**data, training=training)
    assert all(word in str(info.value) for word in words), info.value


def test_training_on_one_value_per_channel():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        functional.conv_block(torch.randn(1, 2, 3, 2), torch.randn(3, 2, 3, 2), training=True)


def test_evaluation_without_statistics():
    with pytest.raises(RuntimeError, match="running_mean and running_var"):
        functional.conv_block(torch.randn(1, 2, 3, 2), torch.randn(3, 2, 3, 2))


def test_backward_op_refuses_to_be_differentiated():
    g = torch.randn(2, 3, 4, 5, requires_grad=True)
    m = torch.ones(3)
    with pytest.raises(RuntimeError, match="not differentiable"):
        ops.conv_block_backward(g, g.detach(), m, m, None, None, 1e-5, True, ORDERS[0])


# --------------------------------------------------------------------------------------------------
# Compilation, transforms, autocast


@MODES
@order_parameter
def test_opcheck(training, order):
    for layout in LAYOUTS:
        p = named("all settings differ")
        data = example(p, torch.float32, layout)
        for name in NAMES:
            data[name].requires_grad_()
        front = [data[name] for name in ("input", "weight", "bias")]
        norm = [data[name] for name in ("norm_weight", "norm_bias")]
        if training:
            op, arguments = ops.conv_block_train, [*front, *norm, *p.settings, 1e-5, order]
        else:
            statistics = [data["running_mean"], data["running_var"]]
            op = ops.conv_block_eval
            arguments = [*front, *statistics, *norm, *p.settings, 1e-5, order, True]
        torch.library.opcheck(op.default, arguments)
        with torch.no_grad():
            activation = op(*arguments)[1]
            grad = torch.randn_like(activation)
            statistics = [data["running_mean"], data["running_var"]]
            plain = [t.detach() for t in norm]
            torch.library.opcheck(
                ops.conv_block_backward.default,
                (grad, activation, *statistics, *plain, 1e-5, training, order),
            )


@MODES
@order_parameter
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_without_a_graph_break(backend, training, order):
    torch._dynamo.reset()
    layer = convext.ConvBlock2d(3, 5, (3, 2), (2, 1), padding=(1, 0), order=order).train(training)
    compiled = torch.compile(layer, fullgraph=True, backend=backend, dynamic=True)
    x = torch.randn(3, 3, 7, 6)
    state = {name: t.clone() for name, t in layer.state_dict().items()}
    results = []
    for call in (layer, compiled):
        layer.load_state_dict(state)
        layer.zero_grad()
        output = call(x)
        output.square().sum().backward()
        results.append([output, *(p.grad for p in layer.parameters()), *layer.buffers()])
        results[-1] = [t.clone() for t in results[-1]]
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


@MODES
@order_parameter
def test_autocast(training, order):
    p = named("plain")
    data = example(p, torch.float32)
    for name in NAMES:
        data[name].requires_grad_()
    options = {"training": training, "order": order}
    with torch.autocast("cpu", torch.bfloat16):
        output = functional.conv_block(**data, **settings(p), **options)
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert all(data[name].grad.dtype == torch.float32 for name in NAMES)
    exact = by_torch(p, {n: t.double() for n, t in example(p, torch.float32).items()}, **options)
    torch.testing.assert_close(output.double(), exact["output"], rtol=0.05, atol=0.05)


@order_parameter
def test_func_transforms_and_forward_mode(order):
    p = named("plain")
    data = example(p)
    x, tangent = data["input"], torch.randn_like(data["input"])

    def by(function):
        return lambda x: function(
            x, *(data[n] for n in ("weight", "bias", "running_mean", "running_var")),
            *(data[n] for n in ("norm_weight", "norm_bias")), *p.settings,
            training=False, order=order,
        )  # fmt: skip

    mine, other = by(functional.conv_block), by(torch_block)
    for transform in (
        lambda f: torch.func.jvp(f, (x,), (tangent,))[1],
        lambda f: torch.func.grad(lambda x: f(x).square().sum())(x),
        lambda f: torch.func.vmap(f)(torch.stack([x, 2 * x])),
    ):
        torch.testing.assert_close(transform(mine), transform(other), rtol=1e-9, atol=1e-9)


# --------------------------------------------------------------------------------------------------
# The layer


@order_parameter
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False},
        {"padding": "same", "dilation": (1, 2)},
        {"padding": (1, 2), "padding_mode": "circular"},
        {"padding": (1, 0), "padding_mode": "reflect", "dtype": torch.float64},
    ],
    ids=str,
)
def test_layer_trains_and_evaluates_as_the_three(order, options):
    stride = 1 if options.get("padding") == "same" else (2, 1)
    torch.manual_seed(3)
    block = convext.ConvBlock2d(3, 5, (3, 2), stride, order=order, **options)
    torch.manual_seed(3)
    conv = nn.Conv2d(3, 5, (3, 2), stride, **options)
    norm = nn.BatchNorm2d(5, dtype=options.get("dtype"))
    three = [conv, nn.ReLU(), norm] if order == "conv-relu-norm" else [conv, norm, nn.ReLU()]
    stock = nn.Sequential(*three)
    x = torch.randn(4, 3, 7, 6, dtype=options.get("dtype"))
    for training in (True, False):
        block.train(training)
        stock.train(training)
        for input in (x, x[0]) if not training else (x,):
            # An unbatched image goes through nn.BatchNorm2d only with its N.
            expected = stock(input) if input.dim() == 4 else stock(input[None])[0]
            torch.testing.assert_close(block(input), expected, rtol=1e-4, atol=1e-5)
    assert block.norm.num_batches_tracked == norm.num_batches_tracked
    torch.testing.assert_close(block.norm.running_var, norm.running_var)


def test_layer_with_a_frozen_norm():
    block = convext.ConvBlock2d(3, 5, 3)
    block.norm.eval()
    before = block.norm.running_mean.clone()
    block(torch.randn(2, 3, 5, 6)).sum().backward()
    assert torch.equal(block.norm.running_mean, before)


def test_layer_without_running_statistics_uses_the_batch():
    block = convext.ConvBlock2d(3, 5, 3, track_running_stats=False, affine=False).eval()
    y = block(torch.randn(4, 3, 8, 7))
    torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(5), rtol=0, atol=1e-5)


@pytest.mark.parametrize("watched", ["conv", "norm"])
def test_layer_with_a_hook_calls_its_parts(watched):
    block = convext.ConvBlock2d(3, 5, 3)
    seen = []
    getattr(block, watched).register_forward_hook(lambda *_: seen.append(watched))
    x = torch.randn(2, 3, 5, 6)
    with_hook = block(x)
    assert seen == [watched]
    assert with_hook.grad_fn.name() != convext.ConvBlock2d(3, 5, 3)(x).grad_fn.name()


def test_layer_shows_its_order_and_refuses_another():
    assert "order='conv-norm-relu'" in repr(convext.ConvBlock2d(1, 2, 3, order="conv-norm-relu"))
    with pytest.raises(ValueError, match="norm-conv-relu"):
        convext.ConvBlock2d(1, 2, 3, order="norm-conv-relu")
    with pytest.raises(ValueError, match="5 features"):
        convext.ConvBlock2d.from_layers(convext.Conv2d(1, 2, 3), convext.BatchNorm2d(5), ORDERS[0])
    with pytest.raises(TypeError, match=r"convext\.Conv2d"):
        convext.ConvBlock2d.from_layers(nn.Conv2d(1, 2, 3), convext.BatchNorm2d(2), ORDERS[0])


@pytest.mark.parametrize("wrong", ["running_mean", "running_var"])
def test_wrong_running_statistics_are_refused_before_any_kernel(wrong):
    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            seen.append(op)
            return op(*args, **(kwargs or {}))

    p = named("plain")
    data = example(p, torch.float32)
    before = data["running_mean"].clone(), data["running_var"].clone()
    arguments = data | {wrong: torch.ones(3)}
    calls = [lambda: functional.conv_block(**arguments, training=True)]
    normed = torch.randn(2, 4, 3, 5)
    statistics = arguments["running_mean"], arguments["running_var"]
    calls.append(lambda: functional.batch_norm(normed, *statistics, training=True))
    for call in calls:
        seen = []
        with Recorder(), pytest.raises(RuntimeError, match=wrong):
            call()
        assert not seen
    assert torch.equal(data["running_mean"], before[0])
    assert torch.equal(data["running_var"], before[1])
