"""convext.inspection.conv_matrix: the matrix is the layer, its transpose the layer's backward.

Oracles: PyTorch's convolution in float64, and the Jacobian of a stock layer by autograd, which is
the same matrix, found without knowing how it is made.
"""

import math

import pytest
import torch
from problems import SMALL
from torch import nn
from torch.nn import functional as F

import convext
from convext.__main__ import main
from convext.inspection import conv_matrix
from convext.inspection.conv_matrix import GREEK
from convext.mnist.model import lesson_cnn

PROBLEMS = [p for p in SMALL if p.C]
SETTINGS = {
    "plain": {"kernel_size": (3, 2)},
    "all settings": {
        "kernel_size": (3, 2),
        "stride": (2, 1),
        "padding": (2, 1),
        "dilation": (1, 2),
        "groups": 2,
    },
    "same": {"kernel_size": (2, 4), "padding": "same", "dilation": (3, 1)},
    "depthwise": {"kernel_size": 2, "groups": 4},
    "reflect": {"kernel_size": (3, 4), "padding": (2, 1), "padding_mode": "reflect"},
    "replicate": {
        "kernel_size": (5, 3),
        "padding": (3, 2),
        "padding_mode": "replicate",
        "stride": (1, 2),
        "groups": 2,
    },
    "circular": {"kernel_size": (3, 7), "padding": (1, 4), "padding_mode": "circular"},
    "circular same": {"kernel_size": (2, 3), "padding": "same", "padding_mode": "circular"},
}
IMAGE = (4, 6, 5)


def layer_of(p, layers=nn, dtype=torch.float64):
    return layers.Conv2d(p.C, p.O, p.kernel, p.stride, p.padding, p.dilation, p.groups, dtype=dtype)


def jacobian(layer, input_size):
    """(rows, columns), by autograd."""
    x = torch.zeros(1, *input_size, dtype=torch.float64)
    found = torch.autograd.functional.jacobian(layer, x)
    return found.reshape(-1, math.prod(input_size))


def numbered(layer):
    """The layer with its weights 1, 2, 3, ..., so that a cell of the Jacobian tells its weight."""
    with torch.no_grad():
        layer.weight.copy_(torch.arange(1, layer.weight.numel() + 1).view(layer.weight.shape))
    return layer


def test_the_lessons_picture():
    layer = nn.Conv2d(1, 1, 2)
    matrix = conv_matrix(layer, (1, 3, 3))
    a, b, c, d = layer.weight.detach().flatten().tolist()
    expected = [
        [a, b, 0, c, d, 0, 0, 0, 0],
        [0, a, b, 0, c, d, 0, 0, 0],
        [0, 0, 0, a, b, 0, c, d, 0],
        [0, 0, 0, 0, a, b, 0, c, d],
    ]
    assert matrix.dense().tolist() == expected
    assert matrix.shape == (4, 9)
    assert (matrix.entries, matrix.zeros) == (16, 20)
    assert matrix.uses.tolist() == [[[[4, 4], [4, 4]]]]
    assert matrix.bias.tolist() == [layer.bias.item()] * 4
    assert [line.split() for line in str(matrix).splitlines()[5:9]] == [
        ["0,0", *"αβ.γδ...."],
        ["0,1", *".αβ.γδ..."],
        ["1,0", *"...αβ.γδ."],
        ["1,1", *"....αβ.γδ"],
    ]


@pytest.mark.parametrize("p", PROBLEMS, ids=str)
def test_forward_and_transpose_are_ours_and_pytorchs(p):
    layer = layer_of(p)
    matrix = conv_matrix(layer, p.input_size[1:])
    x = torch.randn(p.input_size, dtype=torch.float64)
    grad = torch.randn(p.output_size, dtype=torch.float64)
    weight = layer.weight.detach()

    out = matrix.apply(x)
    torch.testing.assert_close(out, layer(x).detach())
    ops = torch.ops.convext
    torch.testing.assert_close(out, ops.conv2d(x, weight, layer.bias, *p.settings).detach())

    back = matrix.backward_input(grad)
    torch.testing.assert_close(
        back, ops.conv2d_backward_input(grad, weight, p.input_size, *p.settings)
    )
    torch.testing.assert_close(back, nn.grad.conv2d_input(p.input_size, weight, grad, *p.settings))


@pytest.mark.parametrize("p", PROBLEMS, ids=str)
def test_a_dense_layers_gradient_summed_over_ties_is_the_weights(p):
    matrix = conv_matrix(layer_of(p), p.input_size[1:])
    x = torch.randn(p.input_size, dtype=torch.float64)
    grad = torch.randn(p.output_size, dtype=torch.float64)
    dense = grad.flatten(1).T @ x.flatten(1)  # of a layer whose weight is the matrix
    row, column = matrix.sparse.indices()
    summed = torch.zeros(matrix.weight.numel(), dtype=torch.float64)
    summed.index_add_(0, matrix.weight_index, dense[row, column])
    expected = torch.ops.convext.conv2d_backward_weight(grad, x, p.weight_size, *p.settings)
    torch.testing.assert_close(summed.view(p.weight_size), expected)


@pytest.mark.parametrize("p", PROBLEMS, ids=str)
def test_each_entry_is_a_multiplication_that_meets_no_padding(p):
    matrix = conv_matrix(layer_of(p), p.input_size[1:])
    assert matrix.entries * p.N == p.needed_multiplications
    assert int(matrix.uses.sum()) == matrix.entries
    assert matrix.sums == ()


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("layers", [nn, convext], ids=["torch", "convext"])
@pytest.mark.parametrize("name", SETTINGS)
def test_the_matrix_is_the_jacobian(name, layers):
    layer = layers.Conv2d(4, 4, **SETTINGS[name], dtype=torch.float64)
    matrix = conv_matrix(layer, IMAGE)
    torch.testing.assert_close(matrix.dense(), jacobian(layer, IMAGE), rtol=1e-12, atol=1e-12)
    x = torch.randn(2, *IMAGE, dtype=torch.float64)
    torch.testing.assert_close(matrix.apply(x), layer(x).detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", SETTINGS)
def test_ties_and_zeros_are_those_of_the_jacobian(name):
    layer = numbered(nn.Conv2d(4, 4, **SETTINGS[name], dtype=torch.float64))
    matrix = conv_matrix(layer, IMAGE)
    ties, found = matrix.ties(), jacobian(layer, IMAGE)
    assert torch.equal(ties < 0, found == 0)
    assert matrix.zeros == int((found == 0).sum())
    weights = layer.weight.numel()
    single = (ties >= 0) & (ties < weights)
    assert torch.equal(ties[single] + 1, found[single].long())
    for row, column in (ties >= weights).nonzero().tolist():
        terms = matrix.sums[ties[row, column] - weights]
        assert len(terms) > 1
        assert sum(terms) + len(terms) == found[row, column]
    assert len(set(matrix.sums)) == len(matrix.sums)
    assert bool(matrix.sums) == (name in ("reflect", "replicate", "circular"))


@pytest.mark.parametrize("name", ["all settings", "reflect", "circular"])
def test_uses_are_how_often_one_weight_alone_shows(name):
    layer = nn.Conv2d(4, 4, **SETTINGS[name], dtype=torch.float64)
    uses = conv_matrix(layer, IMAGE).uses
    for place in [(0, 0, 0, 0), (1, 1, 2, 1), (3, 0, 1, 0)]:
        with torch.no_grad():
            layer.weight.zero_()
            layer.weight[place] = 1
        assert uses[place] == jacobian(layer, IMAGE).sum()


def test_a_weight_of_zero_is_an_entry():
    layer = nn.Conv2d(1, 2, 2, bias=False)
    nn.init.zeros_(layer.weight)
    matrix = conv_matrix(layer, (1, 3, 4))
    assert matrix.entries == 2 * 6 * 4
    assert not matrix.dense().any()
    assert not matrix.bias.any()


@pytest.mark.parametrize("layers", ["convext", "torch"])
def test_the_lessons_layers(layers):
    model = lesson_cnn(layers).eval()
    x = torch.randn(3, 1, 28, 28)
    for layer in model:
        out = layer(x).detach()
        if isinstance(layer, nn.Conv2d):
            matrix = conv_matrix(layer, x.shape[1:])
            torch.testing.assert_close(matrix.apply(x), out, rtol=1e-5, atol=1e-5)
        x = out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["zeros", "replicate"])
def test_16_bits_are_summed_in_float32_and_rounded_once(dtype, mode):
    layer = convext.Conv2d(4, 3, (3, 2), padding=1, padding_mode=mode, dtype=dtype)
    matrix = conv_matrix(layer, IMAGE)
    assert matrix.sparse.dtype == torch.float32
    x = torch.randn(2, *IMAGE).to(dtype)
    pad = F.pad(x.double(), (1,) * 4, "constant" if mode == "zeros" else mode)
    exact = F.conv2d(pad, layer.weight.double(), layer.bias.double()).detach()
    out = matrix.apply(x)
    assert out.dtype == dtype
    rounding = torch.finfo(dtype).eps / 2 * exact.abs() + 1e-5
    assert ((out.double() - exact).abs() <= rounding).all()
    assert matrix.backward_input(out).dtype == dtype


def test_complex_weights():
    layer = nn.Conv2d(2, 3, (3, 2), dtype=torch.complex64)
    matrix = conv_matrix(layer, (2, 5, 4))
    x = torch.randn(2, 2, 5, 4, dtype=torch.complex64, requires_grad=True)
    out = layer(x)
    torch.testing.assert_close(matrix.apply(x.detach()), out.detach())
    grad = torch.randn_like(out)
    out.backward(grad)
    torch.testing.assert_close(matrix.backward_input(grad), x.grad)


def test_all_forms_of_an_input():
    layer = nn.Conv2d(2, 3, (3, 2), stride=(1, 2), dtype=torch.float64)
    matrix = conv_matrix(layer, (1, 2, 5, 7))
    assert (matrix.input_size, matrix.output_size) == ((2, 5, 7), (3, 3, 3))
    x = torch.randn(4, 2, 5, 7, dtype=torch.float64)
    out = layer(x).detach()
    columns = x.flatten(1).T
    for found, expected in (
        (matrix.apply(x), out),
        (matrix.apply(x[1]), out[1]),
        (matrix.apply(x[1].flatten()), out[1].flatten()),
        (matrix.apply(x[:0]), out[:0]),
        (matrix @ columns + matrix.bias[:, None], out.flatten(1).T),
        (matrix @ x[1].flatten() + matrix.bias, out[1].flatten()),
        (matrix.T @ (matrix @ columns), matrix.dense().T @ (matrix.dense() @ columns)),
        (matrix.backward_input(out)[1].flatten(), matrix.T @ out[1].flatten()),
    ):
        torch.testing.assert_close(found, expected)


def test_the_layer_is_left_as_it_was_and_not_followed():
    layer = convext.Conv2d(1, 2, 2)
    calls = []
    layer.register_forward_hook(lambda *_: calls.append(1))
    matrix = conv_matrix(layer, (1, 3, 4))
    before = matrix.dense().clone()
    with torch.no_grad():
        layer.weight.add_(1)
    assert torch.equal(matrix.dense(), before)
    assert not calls
    assert not matrix.sparse.requires_grad
    assert layer.weight.grad is None


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((3, 3), r"input_size must be \(C, H, W\) or \(1, C, H, W\).*got \(3, 3\)"),
        ((2, 1, 3, 3), r"got \(2, 1, 3, 3\)"),
        ((1, 0, 3), "of at least 1 each"),
        ((2, 3, 3), r"input_size must be one that Conv2d\(1, 1.*got \(2, 3, 3\)"),
        ((1, 3, 1), r"input_size must be one that Conv2d\(1, 1.*got \(1, 3, 1\)"),
    ],
)
@pytest.mark.parametrize("layers", [nn, convext], ids=["torch", "convext"])
def test_bad_input_size(layers, size, message):
    with pytest.raises(ValueError, match=message):
        conv_matrix(layers.Conv2d(1, 1, 2), size)


def test_bad_layers():
    for layer, name in ((nn.ConvTranspose2d(1, 1, 2), "ConvTranspose2d"), (nn.Linear(4, 2), "Lin")):
        with pytest.raises(TypeError, match=f"layer must be a torch.nn.Conv2d, got {name}"):
            conv_matrix(layer, (1, 3, 3))
    with pytest.raises(TypeError, match="before its first input"):
        conv_matrix(convext.LazyConv2d(1, 2), (1, 3, 3))
    with pytest.raises(ValueError, match="padding of at least 0"):
        conv_matrix(nn.Conv2d(1, 1, 2, padding=-1), (1, 5, 5))
    with pytest.raises(ValueError, match="input_size must be one that"):
        conv_matrix(nn.Conv2d(1, 1, 2, padding=4, padding_mode="reflect"), (1, 3, 3))


def test_bad_inputs():
    matrix = conv_matrix(nn.Conv2d(1, 2, 2), (1, 3, 4))
    with pytest.raises(ValueError, match=r"x must be \(12,\), \(1, 3, 4\) or \(N, 1, 3, 4\), got"):
        matrix.apply(torch.zeros(1, 4, 3))
    with pytest.raises(TypeError, match=r"x must be torch\.float32 as the layer is"):
        matrix.apply(torch.zeros(1, 3, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"grad_output must be \(12,\), \(2, 2, 3\)"):
        matrix.backward_input(torch.zeros(2, 3, 2))
    with pytest.raises(ValueError, match=r"x must be \(12,\) or \(12, N\), got \(1, 3, 4\)"):
        matrix @ torch.zeros(1, 3, 4)


def test_text_tells_channels_sums_and_what_is_too_large():
    groups = str(conv_matrix(nn.Conv2d(2, 4, 2, groups=2), (2, 3, 3)))
    assert "output channel,row,column" in groups
    assert "filter,row,column" in groups
    assert "224 are zero by construction (77.8%)" in groups
    assert "64 hold 16 weights, each used 4 times" in groups
    reflect = str(conv_matrix(nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect"), (1, 4, 3)))
    assert "+".join(GREEK[i] for i in (0, 2, 6, 8)) in reflect
    assert "30 of these are sums" in reflect
    large = str(conv_matrix(nn.Conv2d(1, 8, 5, 2, 2), (1, 28, 28)))
    assert len(large.splitlines()) == 5
    assert "1,568 x 784 matrix, 1,229,312 entries" in large
    assert "each used 169 to 196 times" in large
    assert max(map(len, groups.splitlines())) <= 100


def test_rich_shows_the_same_text_in_colours():
    from rich.console import Console

    matrix = conv_matrix(nn.Conv2d(1, 1, 2), (1, 3, 3))
    console = Console(width=120)
    with console.capture() as capture:
        console.print(matrix)
    assert capture.get() == f"{matrix}\n"
    styles = {str(span.style) for span in matrix.__rich__().spans}
    assert len(styles) == 4


@pytest.mark.parametrize(
    ("settings", "size"),
    [
        ({"in_channels": 1, "out_channels": 1, "kernel_size": 2}, (1, 3, 4)),
        ({"in_channels": 4, "out_channels": 2, "kernel_size": (2, 1), "groups": 2}, (4, 3, 4)),
        ({"in_channels": 2, "out_channels": 3, "kernel_size": 3, "padding": 1}, (2, 7, 6)),
    ],
    ids=["letters", "groups", "more weights than colours"],
)
def test_the_picture_has_one_colour_for_each_weight_and_white_for_zeros(settings, size):
    matrix = conv_matrix(nn.Conv2d(**settings), size)
    left, right = matrix.plot().axes
    ties = matrix.ties().numpy()
    pixels = left.images[0].get_array()
    assert pixels.shape == (*ties.shape, 3)
    assert (pixels[ties < 0] == 1).all()
    colors = [{tuple(c) for c in pixels[ties == i]} for i in range(matrix.weight.numel())]
    assert all(len(of_weight) == 1 for of_weight in colors)
    assert len(set.union(*colors)) == matrix.weight.numel()
    assert (1, 1, 1) not in set.union(*colors)
    kernels = right.images[0].get_array().reshape(-1, 3)
    assert {tuple(c) for c in kernels} - {(1, 1, 1)} == set.union(*colors)


def test_the_picture_names_cells():
    matrix = conv_matrix(nn.Conv2d(1, 1, 2), (1, 3, 3))
    left, right = matrix.plot().axes
    rows = [t.get_text() for t in left.get_yticklabels()]
    assert rows == ["0,0", "0,1", "1,0", "1,1"]
    assert [t.get_text() for t in left.get_xticklabels()][:4] == ["0,0", "0,1", "0,2", "1,0"]
    assert [t.get_text() for t in left.texts][:9] == [*GREEK[:2], "0", *GREEK[2:4], *"0000"]
    assert [t.get_text()[0] for t in right.texts] == list(GREEK[:4])
    left, _ = conv_matrix(nn.Conv2d(1, 1, 5), (1, 5, 6)).plot().axes
    assert [t.get_text() for t in left.texts][:6] == ["0", "1", "2", "3", "4", "."]  # weight 0


def test_a_picture_too_large_is_an_error():
    matrix = conv_matrix(nn.Conv2d(1, 1, 1), (1, 1, 2001))
    with pytest.raises(ValueError, match="at most 2000 rows and columns, got 2001 x 2001"):
        matrix.plot()


@pytest.mark.parametrize("layers", ["convext", "torch"])
def test_command(capsys, tmp_path, layers):
    picture = tmp_path / "matrix.png"
    args = ["matrix", "--input-size", "4x3", "--kernel-size", "3x2", "--padding", "1,0"]
    assert main([*args, "--layers", layers, "--out", str(picture)]) == 0
    out = capsys.readouterr().out
    assert "8 x 12 matrix, 96 entries" in out
    assert "56 are zero by construction (58.3%)" in out
    assert "40 hold 6 weights, each used 6 to 8 times" in out
    differences = [float(line.split("at most ")[1].split()[0]) for line in out.splitlines()[-3:-1]]
    assert max(differences) < 1e-6
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_command_takes_all_settings(capsys):
    sizes = ["--input-size", "6x5", "--kernel-size", "3x2", "--stride", "2x1", "--dilation", "1x2"]
    rest = ["--in-channels", "4", "--out-channels", "2", "--groups", "2", "--padding", "1"]
    assert main(["matrix", *sizes, *rest, "--padding-mode", "circular"]) == 0
    assert "Conv2d(4, 2, kernel_size=(3, 2), stride=(2, 1), padding=(1, 1), dilation=(1, 2), " in (
        capsys.readouterr().out
    )
    assert main(["matrix", "--padding", "same"]) == 0
    assert "9 x 9 matrix" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--input-size", "1x2"], "input_size must be one that Conv2d(1, 1"),
        (["--input-size", "1x2x3"], "--input-size must be one number or two, got 1,2,3"),
        (["--groups", "2"], "in_channels must be divisible by groups"),
        (["--out-channels", "0"], "--out-channels must be at least 1, got 0"),
        (["--padding", "x"], "--padding: must be whole numbers"),
        (["--padding", "same", "--stride", "2"], "not supported for strided"),
        (["--padding", "5", "--padding-mode", "reflect"], "padding (5, 5)"),
        (["--input-size", "3000", "--kernel-size", "3"], "at most 5,000,000 are shown"),
        (["--out-channels", "1000000000"], "at most 5,000,000 are shown"),
        (["--input-size", "2x1100", "--out", "a.png"], "at most 2000 rows and columns"),
        (["--out", "a.doc"], "--out: a.doc: "),
    ],
)
def test_a_mistake_is_one_line_and_status_2(capsys, monkeypatch, tmp_path, args, message):
    monkeypatch.chdir(tmp_path)
    try:
        status = main(["matrix", *args])
    except SystemExit as stop:
        status = stop.code
    err = capsys.readouterr().err
    assert status == 2
    assert message in err
    assert err.startswith("convext matrix: ")
    assert err.count("\n") == 1
