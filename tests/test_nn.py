"""The layers against their namesakes in torch.nn, and the swap of one kind for the other."""

import copy
import io
import pickle

import pytest
import torch
from problems import named
from torch import nn

import convext

DOUBLE = torch.float64

# Arguments of nn.Conv2d, with an input size.
CONVOLUTIONS = {
    "plain": (dict(in_channels=3, out_channels=4, kernel_size=3), (2, 3, 7, 9)),
    "all settings": (
        dict(
            in_channels=4,
            out_channels=6,
            kernel_size=(3, 2),
            stride=(2, 1),
            padding=(1, 2),
            dilation=(1, 2),
            groups=2,
            bias=False,
        ),
        (2, 4, 8, 9),
    ),
    "valid": (dict(in_channels=2, out_channels=3, kernel_size=2, padding="valid"), (1, 2, 5, 4)),
    "same": (dict(in_channels=2, out_channels=3, kernel_size=(3, 5), padding="same"), (1, 2, 5, 6)),
    "same, uneven": (
        dict(in_channels=2, out_channels=3, kernel_size=(4, 2), padding="same", dilation=(1, 3)),
        (2, 2, 7, 6),
    ),
    "unbatched": (dict(in_channels=3, out_channels=4, kernel_size=3, stride=2), (3, 7, 9)),
    "unbatched, same": (
        dict(in_channels=3, out_channels=4, kernel_size=(2, 3), padding="same"),
        (3, 7, 9),
    ),
    "empty batch": (dict(in_channels=3, out_channels=4, kernel_size=3), (0, 3, 7, 9)),
    **{
        f"padding_mode {mode}": (
            dict(in_channels=2, out_channels=3, kernel_size=3, padding=(2, 1), padding_mode=mode),
            (2, 2, 5, 6),
        )
        for mode in ("zeros", "reflect", "replicate", "circular")
    },
    "padding_mode circular, same, uneven": (
        dict(
            in_channels=2,
            out_channels=3,
            kernel_size=(2, 4),
            padding="same",
            padding_mode="circular",
        ),
        (2, 2, 5, 6),
    ),
}

BATCH_NORMS = {
    "plain": {},
    "not affine": {"affine": False},
    "no statistics": {"track_running_stats": False},
    "cumulative average": {"momentum": None},
    "other constants": {"momentum": 0.3, "eps": 1e-2},
}


def twins(kind, **arguments):
    """Our layer and the stock one with the same parameters and buffers, in float64."""
    ours, stock = getattr(convext, kind)(**arguments), getattr(nn, kind)(**arguments)
    for parameter in ours.parameters():
        nn.init.normal_(parameter)
    ours, stock = ours.to(DOUBLE), stock.to(DOUBLE)
    stock.load_state_dict(ours.state_dict(), strict=True)
    return ours, stock


def assert_alike(ours: nn.Module, stock: nn.Module, size, seed=0):
    """Outputs, gradients and buffers after one forward and backward."""
    x = torch.randn(size, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [layer(input) for layer, input in zip((ours, stock), inputs, strict=True)]
    torch.testing.assert_close(*outputs)
    grad = torch.randn_like(outputs[0])
    for layer, input, output in zip((ours, stock), inputs, outputs, strict=True):
        layer.zero_grad()
        output.backward(grad)
        assert input.grad is not None
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    for (name, mine), (_, theirs) in zip(
        ours.named_parameters(), stock.named_parameters(), strict=True
    ):
        torch.testing.assert_close(mine.grad, theirs.grad, msg=name)
    torch.testing.assert_close(dict(ours.named_buffers()), dict(stock.named_buffers()))


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_conv2d_is_torchs(name, algorithm):
    arguments, size = CONVOLUTIONS[name]
    ours, stock = twins("Conv2d", **arguments)
    ours.algorithm = algorithm
    assert_alike(ours, stock, size)


@pytest.mark.parametrize("name", BATCH_NORMS)
def test_batch_norm2d_is_torchs(name):
    ours, stock = twins("BatchNorm2d", num_features=5, **BATCH_NORMS[name])
    for seed in range(3):
        assert_alike(ours, stock, (4, 5, 3, 2), seed)
    ours.eval(), stock.eval()
    assert_alike(ours, stock, (4, 5, 3, 2), seed=3)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_memory_format_goes_through(memory_format):
    model = nn.Sequential(convext.Conv2d(3, 8, 3, padding=1), nn.ReLU(), convext.BatchNorm2d(8))
    model = model.to(memory_format=memory_format)
    x = torch.randn(2, 3, 6, 5).contiguous(memory_format=memory_format)
    output = model(x)
    assert output.is_contiguous(memory_format=memory_format)
    output.sum().backward()
    assert model[0].weight.grad.is_contiguous(memory_format=memory_format)


def test_initial_weights_are_torchs():
    for kind, arguments in (("Conv2d", (3, 8, (3, 5))), ("BatchNorm2d", (8,))):
        torch.manual_seed(3)
        ours = getattr(convext, kind)(*arguments).state_dict()
        torch.manual_seed(3)
        stock = getattr(nn, kind)(*arguments).state_dict()
        assert list(ours) == list(stock)
        assert all(torch.equal(ours[key], stock[key]) for key in stock)


@pytest.mark.parametrize(
    "arguments",
    [
        dict(in_channels=3, out_channels=4, kernel_size=3, groups=2),
        dict(in_channels=4, out_channels=3, kernel_size=3, groups=2),
        dict(in_channels=4, out_channels=4, kernel_size=3, groups=0),
        dict(in_channels=3, out_channels=4, kernel_size=3, padding="same", stride=2),
        dict(in_channels=3, out_channels=4, kernel_size=3, padding="full"),
        dict(in_channels=3, out_channels=4, kernel_size=3, padding_mode="mirror"),
    ],
    ids=str,
)
def test_bad_arguments_raise_as_torch_does(arguments):
    with pytest.raises(ValueError, match=r"\w") as stock:
        nn.Conv2d(**arguments)
    with pytest.raises(ValueError, match=r"\w") as ours:
        convext.Conv2d(**arguments)
    assert str(ours.value) == str(stock.value)


def test_unknown_algorithm():
    for make in (
        lambda: convext.Conv2d(3, 4, 3, algorithm="fft"),
        lambda: convext.LazyConv2d(4, 3, algorithm="fft"),
        lambda: convext.replace_layers(nn.Conv2d(3, 4, 3), algorithm="fft"),
    ):
        with pytest.raises(ValueError, match=r"'auto' or one of .*'direct'.* got 'fft'"):
            make()
    with pytest.raises(ValueError, match="kernels for 'cpu', not for 'meta'"):
        convext.algorithms("meta")


@pytest.mark.parametrize("size", [(2, 4, 7, 9), (4, 7), (1, 2, 3, 7, 9)], ids=str)
def test_wrong_input_raises_as_torch_does(size):
    for kind, arguments, error in (
        ("Conv2d", dict(in_channels=3, out_channels=4, kernel_size=3), RuntimeError),
        ("BatchNorm2d", dict(num_features=3), (RuntimeError, ValueError)),
    ):
        for module in (convext, nn):
            with pytest.raises(error):
                getattr(module, kind)(**arguments)(torch.randn(size))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        convext.BatchNorm2d(3)(torch.randn(1, 3, 1, 1))


@pytest.mark.parametrize("name", ["plain", "all settings", "same, uneven", "padding_mode reflect"])
def test_gradients_of_conv2d(name, algorithm):
    arguments, size = CONVOLUTIONS[name]
    layer, _ = twins("Conv2d", **arguments)
    layer.algorithm = algorithm
    x = torch.randn(1, *size[1:], dtype=DOUBLE, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x)
    assert torch.autograd.gradgradcheck(layer, x)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_gradients_of_batch_norm2d(training):
    layer, _ = twins("BatchNorm2d", num_features=2)
    layer.train(training)
    x = torch.randn(3, 2, 2, 3, dtype=DOUBLE, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x)
    assert torch.autograd.gradgradcheck(layer, x)


# --------------------------------------------------------------------------------------------------
# Lazy layers, pickles, the swap


def test_lazy_layers_become_ours():
    torch.manual_seed(0)
    ours = nn.Sequential(
        convext.LazyConv2d(4, (3, 2), stride=(2, 1), algorithm="im2col"), convext.LazyBatchNorm2d()
    )
    x = torch.randn(2, 3, 7, 9)
    output = ours(x)
    assert [type(layer) for layer in ours] == [convext.Conv2d, convext.BatchNorm2d]
    assert ours[0].algorithm == "im2col"
    assert convext.last_algorithm().forward == "im2col"
    stock = nn.Sequential(nn.Conv2d(3, 4, (3, 2), stride=(2, 1)), nn.BatchNorm2d(4))
    before = {key: value.clone() for key, value in ours.state_dict().items()}
    stock.load_state_dict(before)
    stock[1].reset_running_stats()
    torch.testing.assert_close(output, stock(x))
    torch.testing.assert_close(ours.state_dict(), stock.state_dict())


def test_state_dict_and_copies():
    layers = nn.Sequential(convext.Conv2d(3, 4, 3, algorithm="im2col"), convext.BatchNorm2d(4))
    x = torch.randn(2, 3, 6, 5)
    layers(x)
    expected = layers.eval()(x)
    stock = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    stock.load_state_dict(layers.state_dict())
    torch.testing.assert_close(stock(x), expected)

    file = io.BytesIO()
    torch.save(layers, file)
    file.seek(0)
    for other in (
        copy.deepcopy(layers),
        pickle.loads(pickle.dumps(layers)),
        torch.load(file, weights_only=False),
    ):
        assert other[0].algorithm == "im2col"
        assert torch.equal(other(x), expected)
    del vars(layers[0])["algorithm"]  # a pickle made before there were algorithms
    assert pickle.loads(pickle.dumps(layers))[0].algorithm == "auto"


def test_replace_and_restore():
    class Special(nn.Conv2d):
        pass

    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.ReLU(),
        nn.Sequential(nn.BatchNorm2d(4), Special(4, 5, 1), nn.Conv1d(1, 1, 1)),
    )
    types = [type(module) for module in model.modules()]
    state = model.state_dict(keep_vars=True)
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(2, 3, 6, 5)
    part = model[:2]
    expected = part(x)

    assert convext.replace_layers(model, algorithm="im2col") is model
    assert type(model[0]) is convext.Conv2d
    assert type(model[2][0]) is convext.BatchNorm2d
    assert type(model[2][1]) is Special
    assert type(model[2][2]) is nn.Conv1d
    torch.testing.assert_close(part(x), expected)
    assert convext.last_algorithm().forward == "im2col"
    assert len(calls) == 2
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(state)
    assert all(after[key] is state[key] for key in state)

    assert convext.restore_layers(model) is model
    assert [type(module) for module in model.modules()] == types
    assert "algorithm" not in vars(model[0])
    assert torch.equal(part(x), expected)
    assert type(convext.replace_layers(nn.Conv2d(3, 4, 3))) is convext.Conv2d


# --------------------------------------------------------------------------------------------------
# What the library says of itself


@pytest.mark.parametrize("problem", [named("plain"), named("depthwise")], ids=str)
def test_last_algorithm(problem, algorithm):
    layer = convext.Conv2d(problem.C, problem.O, problem.kernel, *problem.settings)
    layer.algorithm = algorithm
    layer(torch.randn(problem.input_size, requires_grad=True)).sum().backward()
    assert convext.last_algorithm() == (algorithm, algorithm, algorithm)


def test_auto_takes_depthwise_for_filters_of_one_channel():
    for filters in (4, 8):
        x = torch.randn(1, 4, 8, 8, requires_grad=True)
        convext.Conv2d(4, filters, 3, groups=4)(x).sum().backward()
        assert convext.last_algorithm() == ("depthwise", "depthwise", "depthwise")


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_auto_takes_direct_for_the_gradient_of_few_channels(memory_format):
    x = torch.randn(1, 3, 8, 8).to(memory_format=memory_format).requires_grad_()
    output = convext.Conv2d(3, 8, 3)(x)
    output.backward(torch.ones_like(output))
    assert convext.last_algorithm() == ("direct", "direct", "direct")


def test_build_info():
    info = convext.build_info()
    assert info["convext"] == convext.__version__
    assert info["torch"].split(".")[:2] == torch.__version__.split(".")[:2]
    assert info["cpu_isa"] in info["cpu_isas"]
    assert set(convext._C.cpu_isas()) <= set(info["cpu_isas"])
    assert "scalar" in info["cpu_isas"]
    assert set(convext.algorithms()) >= {"direct", "im2col"}
