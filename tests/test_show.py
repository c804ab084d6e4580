"""Filters and activations: what is shown is what the layers hold and put out."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import convext
from convext.__main__ import main
from convext.inspection import show_activations, show_filters
from convext.inspection.example import conv_example
from convext.mnist.model import lesson_cnn


class Functional(nn.Module):
    """ReLUs as a function and in place, a layer called twice, a residual branch, two groups."""

    def __init__(self, conv=nn.Conv2d):
        super().__init__()
        self.first = conv(3, 4, (3, 2), stride=(2, 1), padding=(1, 0))
        self.same = conv(4, 4, 3, padding=1, groups=2)
        self.block = convext.ConvBlock2d(4, 5, 1)
        self.dense = nn.Linear(5, 2)

    def forward(self, x):
        x = F.relu_(self.first(x))
        x = x + F.gelu(self.same(x))
        x = self.same(x)
        return self.dense(self.block(x).mean((2, 3)))


def hooked(model, x):
    """The oracle: what a forward hook sees each module put out, in order."""
    seen = []
    names = {module: name for name, module in model.named_modules()}
    hooks = [
        m.register_forward_hook(lambda m, _, out: seen.append((names[m], out.clone())))
        for m in names
    ]
    with torch.no_grad():
        model.eval()(x)
    for hook in hooks:
        hook.remove()
    return seen


# --- Activations ---------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", ["convext", "torch"])
def test_every_convolution_and_relu_of_the_lessons_network_is_shown(layers):
    model = lesson_cnn(layers)
    x = torch.rand(2, 1, 28, 28)
    shown = show_activations(model, x)
    expected = [(n, v) for n, v in hooked(model, x) if n.startswith(("conv", "relu"))]
    assert [layer.name for layer in shown.layers] == [name for name, _ in expected]
    for layer, (_, value) in zip(shown.layers, expected, strict=True):
        assert torch.equal(layer.values, value)


@pytest.mark.parametrize("conv", [nn.Conv2d, convext.Conv2d])
def test_functions_and_layers_called_twice_are_shown(conv):
    model = Functional(conv)
    x = torch.randn(2, 3, 7, 6)
    shown = show_activations(model, x)
    firsts = {name: value for name, value in reversed(hooked(model, x)) if "conv" not in name}
    before, relu, same, gelu, again, *block = shown.layers
    assert [layer.operation for layer in (relu, gelu)] == ["relu_", "gelu"]
    # An in-place ReLU does not reach back into what is shown of the convolution.
    assert torch.equal(before.values, firsts["first"])
    assert torch.equal(relu.values, before.values.relu())
    assert torch.equal(same.values, firsts["same"])
    assert torch.equal(gelu.values, F.gelu(same.values))
    assert again.values.shape == (2, 4, 4, 5)
    assert not torch.equal(again.values, same.values)
    assert [layer.is_convolution for layer in block] == [True, False]


def test_named_layers_alone():
    model = lesson_cnn()
    x = torch.rand(1, 1, 28, 28)
    shown = show_activations(model, x, ["norm2", "input"])
    assert [layer.name for layer in shown.layers] == ["norm2", "input"]
    assert torch.equal(shown.layers[1].values, x)


def test_statistics_are_numpys_and_dead_channels_are_found():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU())
    with torch.no_grad():
        model[0].bias.copy_(torch.tensor([-100.0, 0.0, 100.0, -100.0]))
    conv, relu = show_activations(model, torch.randn(3, 2, 7, 5)).layers
    for layer in (conv, relu):
        values = layer.values.double().numpy()
        np.testing.assert_allclose(layer.mean.numpy(), values.mean((0, 2, 3)), atol=1e-12)
        np.testing.assert_allclose(layer.std.numpy(), values.std((0, 2, 3)), atol=1e-12)
    assert relu.dead.tolist() == [True, False, False, True]
    assert not conv.dead.any()


def test_one_image_that_wakes_a_channel_is_enough():
    x = torch.tensor([-1.0, 1.0])[:, None, None, None].expand(2, 1, 2, 2)
    model = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.ReLU())
    nn.init.ones_(model[0].weight)
    assert not show_activations(model, x).layers[1].dead.any()
    assert show_activations(model, x[:1]).layers[1].dead.all()


def test_text_and_table_show_the_same(capsys):
    from rich.console import Console

    shown = show_activations(conv_example(), torch.rand(1, 1, 28, 28))
    console = Console(width=100)
    with console.capture() as capture:
        console.print(shown)
    for text in (str(shown), capture.get()):
        assert "Sequential, input 1 x 1 x 28 x 28" in text
        for layer in shown.layers:
            (line,) = [x for x in text.splitlines() if x.split()[:1] == [layer.name]]
            numbers = [layer.values.double().mean(), layer.values.double().std(correction=0)]
            numbers += [layer.values.min(), layer.values.max()]
            assert [float(x) for x in line.split() if "." in x] == pytest.approx(
                [float(x) for x in numbers], abs=5.1e-4
            )


def test_a_line_for_each_channel():
    relu = show_activations(conv_example(), torch.zeros(1, 1, 28, 28)).layers[1]
    lines = str(relu).splitlines()
    assert lines[0] == "relu1 (relu): 2 channels of 26 x 26"
    assert [line.split() for line in lines[4:]] == [
        [str(channel), "0.000", "0.000", "0.000", "0.000", "dead"] for channel in range(2)
    ]


def test_the_model_is_left_as_it_was():
    model = lesson_cnn().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    show_activations(model, torch.rand(2, 1, 28, 28))
    filters = show_filters(model)
    filters.weight.zero_()
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# --- Filters -------------------------------------------------------------------------------------


def test_the_first_layers_filters_unless_another_is_named():
    model = Functional()
    first, same = show_filters(model), show_filters(model, "same")
    assert first.layer == "first"
    assert torch.equal(first.weight, model.first.weight)
    assert first.is_color
    assert (same.weight.shape, same.groups, same.is_color) == ((4, 2, 3, 3), 2, False)
    assert torch.equal(show_filters(model, "block.conv").weight, model.block.conv.weight)
    assert str(same).startswith("same: 4 filters of 2 x 3 x 3 in 2 groups, weights from -")


def test_a_layer_by_itself():
    layer = convext.Conv2d(1, 2, 3)
    assert show_filters(layer).layer == "Conv2d"


def test_upsampled_is_opencvs_bilinear():
    cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed")
    shown = show_filters(nn.Conv2d(1, 3, (5, 4)))
    found = shown.upsampled(4)
    for kernel, enlarged in zip(shown.weight, found, strict=True):
        expected = cv2.resize(kernel[0].numpy(), (16, 20), interpolation=cv2.INTER_LINEAR)
        np.testing.assert_allclose(enlarged[0].numpy(), expected, atol=1e-6)


# --- Pictures ------------------------------------------------------------------------------------


def pictures_in(axes, layout):
    """The small pictures of a panel, one cell for each number, by the frames around them."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    cells = np.ma.filled(axes.images[0].get_array(), np.nan)
    count, height, width = layout
    found = []
    for frame in axes.patches[:count]:
        x, y = (round(v + 0.5) for v in frame.get_xy())
        step = round(frame.get_width()) // width
        tile = cells[y : y + height * step : step, x : x + width * step : step]
        found.append(tile)
    return np.stack(found)


@pytest.mark.parametrize(("inputs", "height", "width"), [(1, 5, 3), (3, 2, 4)])
def test_small_filters_are_drawn_exactly_and_on_one_scale(inputs, height, width):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    shown = show_filters(nn.Conv2d(inputs, 7, (height, width)))
    exact, smooth = shown.plot().axes[:2]
    limit = float(shown.weight.abs().max())
    drawn = pictures_in(exact, (7, height, width))
    expected = shown.weight[:, 0]
    if inputs == 3:
        expected = (0.5 + shown.weight / (2 * limit)).permute(0, 2, 3, 1)
    else:
        assert exact.images[0].get_clim() == pytest.approx((-limit, limit))
    np.testing.assert_allclose(drawn, expected.numpy(), atol=1e-6)
    assert exact.get_title() == f"Conv2d: 7 filters of {inputs} x {height} x {width}"
    assert smooth.get_title() == "the same, upsampled bilinearly"
    assert [text.get_text() for text in exact.texts] == list("0123456")


def test_deeper_filters_are_a_table():
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    shown = show_filters(nn.Conv2d(6, 3, (3, 2), groups=3))
    axes = shown.plot().axes[0]
    cells = np.ma.filled(axes.images[0].get_array(), np.nan)
    assert cells.shape == (3 * 4 - 1, 2 * 3 - 1)
    np.testing.assert_array_equal(cells[8:11, 3:5], shown.weight[2, 1].numpy())
    assert np.isnan(cells[3]).all()
    assert axes.get_xlabel() == "input channel of its group"
    assert axes.get_ylabel() == "output channel"


def test_activations_are_drawn_exactly_a_convolution_a_row():
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    shown = show_activations(lesson_cnn(), torch.rand(2, 1, 28, 28))
    figure = shown.plot(image=1)
    panels = {axes.get_title().split(" ")[0]: axes for axes in figure.axes if axes.get_title()}
    assert next(iter(panels)) == "input,"
    for layer in shown.layers:
        axes = panels[layer.name]
        channels, height, width = layer.values.shape[1:]
        drawn = pictures_in(axes, (channels, height, width))
        np.testing.assert_array_equal(drawn, layer.values[1].numpy())
        assert axes.get_subplotspec().rowspan.start == int(layer.name[4:]) - 1
        low, high = axes.images[0].get_clim()
        assert low == (-high if layer.is_convolution else 0)


# --- Mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: show_filters(nn.Linear(2, 2)), "model must have a Conv2d layer, got Linear"),
        (lambda: show_filters(lesson_cnn(), "relu1"), "must be one of conv1, .*, got 'relu1'"),
        (lambda: show_filters(nn.Sequential(nn.LazyConv2d(2, 3))), "layer '0' is lazy"),
        (lambda: show_filters(lesson_cnn()).upsampled(0), "factor must be at least 1, got 0"),
        (
            lambda: show_activations(lesson_cnn(), torch.zeros(1, 28, 28)),
            r"x must be images \(N, C, H, W\), got \(1, 28, 28\)",
        ),
        (
            lambda: show_activations(lesson_cnn(), torch.zeros(1, 1, 28, 28), ["conv9"]),
            "layer must be one of input, conv1, .*, got 'conv9'",
        ),
        (
            lambda: show_activations(lesson_cnn(), torch.zeros(1, 1, 28, 28), ["flatten"]),
            r"'flatten' must put out \(N, C, H, W\), got \(1, 10\)",
        ),
        (
            lambda: show_activations(nn.Flatten(), torch.zeros(1, 1, 2, 2)),
            "model must have a convolution, got Flatten",
        ),
        (
            lambda: show_activations(lesson_cnn(), torch.zeros(1, 1, 28, 28)).plot(1),
            "image must be from 0 to 0, got 1",
        ),
    ],
    ids=range(9),
)
def test_mistakes_name_argument_and_value(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- The command ---------------------------------------------------------------------------------


@pytest.fixture
def digit(tmp_path):
    image_module = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    pixels = np.zeros((28, 28), np.uint8)
    pixels[5:22, 12:16] = 255
    image_module.fromarray(pixels).save(tmp_path / "digit.png")
    return tmp_path / "digit.png"


def test_a_model_is_shown_and_drawn(capsys, digit, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    filters, activations = tmp_path / "filters.png", tmp_path / "activations.svg"
    args = ["show", "example", "--image", str(digit)]
    assert main([*args, "--filters", str(filters), "--activations", str(activations)]) == 0
    out = capsys.readouterr().out
    assert "conv1: 2 filters of 1 x 3 x 3, weights from -1.000 to 1.000" in out
    # The bar's top edge and left edge are as strong as a 3x3 kernel's can be.
    (line,) = [line for line in out.splitlines() if line.split()[:1] == ["relu1"]]
    assert line.split()[:7] == ["relu1", "relu", "2", "x", "26", "x", "26"]
    assert line.split()[-2:] == ["0.000", "3.000"]
    assert filters.read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in activations.read_bytes()


def test_one_layer_by_channel(capsys, digit):
    assert main(["show", "example", "--image", str(digit), "--layer", "relu1"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("relu1 (relu): 2 channels of 26 x 26\n")
    assert main(["show", "example", "--image", str(digit), "--layer", "conv2"]) == 0
    assert capsys.readouterr().out.startswith("conv2: 2 filters of 2 x 3 x 3, ")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nosuch"], "MODEL must be lesson, example, "),
        (["example", "--layer", "conv9"], "layer must be one of input, conv1, "),
        (["example", "--layer", "flatten"], "'flatten' must put out (N, C, H, W), got (1, 288)"),
        (["example", "--layer", "relu1", "--filters", "x.png"], "layer must be one of conv1, "),
        (["torch.nn:Flatten"], "MODEL torch.nn:Flatten: model must have a convolution"),
        (["example", "--filters", "x.nosuch"], "--filters: x.nosuch: "),
    ],
)
def test_a_mistake_is_one_line_and_status_2(capsys, digit, args, message):
    assert main(["show", *args, "--image", str(digit)]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.startswith("convext show: ")
    assert err.count("\n") == 1
