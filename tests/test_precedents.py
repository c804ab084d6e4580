"""Precedents and dependents: which cells, what they are multiplied by, and what it comes to.

Oracles: what changes when one cell is changed, in networks with weights above 0; torch's unfold,
its layers' own weights and outputs, and the places that its max pool returns.
"""

import itertools
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import convext
from convext.__main__ import main
from convext.inspection import dependents, precedents
from convext.inspection.example import conv_example
from convext.inspection.tape import record
from convext.inspection.terms import terms
from convext.mnist.model import lesson_cnn

CONVOLUTIONS = {
    "plain": {},
    "stride": {"stride": (2, 1)},
    "padding": {"padding": (1, 2)},
    "dilation": {"dilation": (1, 2), "padding": (2, 0)},
    "groups": {"groups": 2, "stride": 2, "padding": 1},
    "depthwise": {"groups": 4, "bias": False},
    "same": {"padding": "same", "dilation": (1, 2)},
}


def positive(model):
    """Weights above 0 and no bias: no sum cancels, and no ReLU is shut for a positive input."""
    for name, parameter in model.named_parameters():
        parameter.data = torch.zeros_like(parameter) if "bias" in name else parameter.data.abs() + 1
    return model.double().eval()


def some_cells(shape, count=7):
    """Places spread over a tensor, first and last included."""
    places = list(itertools.product(*(range(n) for n in shape)))
    return [*places[:: max(1, len(places) // count)], places[-1]]


class Residual(nn.Module):
    def __init__(self, in_place=False):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)
        self.in_place = in_place

    def forward(self, x):
        y = self.conv(x)
        if self.in_place:
            y += x
            return y
        return torch.sub(y, x, alpha=2)


class Shift(nn.Module):
    def forward(self, x):
        return x + 0.3


class Affine(nn.Module):
    """A constant matrix times the input, and a constant added."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(4, 3))
        self.constant = nn.Parameter(torch.randn(1, 5))

    def forward(self, x):
        return self.constant - self.matrix @ x


class Fused(nn.Module):
    """convext's fused operation, called directly."""

    def __init__(self, order):
        super().__init__()
        self.block = convext.ConvBlock2d(2, 4, 3, padding=1, stride=2, groups=2)
        self.order = order

    def forward(self, x):
        conv, norm = self.block.conv, self.block.norm
        return convext.functional.conv_block(
            *(x, conv.weight, conv.bias, norm.running_mean, norm.running_var),
            *(norm.weight, norm.bias, conv.stride, conv.padding, conv.dilation, conv.groups),
            order=self.order,
        )


def with_statistics(model):
    """Batch norms that have seen something."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return model


@pytest.mark.parametrize("layer", [convext.Conv2d, nn.Conv2d], ids=["convext", "torch"])
@pytest.mark.parametrize("settings", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_a_convolutions_terms_are_those_of_unfold(layer, settings):
    conv = layer(4, 8, (3, 2), **settings).double()
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    output = conv(x)
    (_, step) = record(conv, x).steps
    arguments = step.named_arguments()
    columns = F.unfold(
        x, (3, 2), *(arguments[name] for name in ("dilation", "padding", "stride"))
    ).reshape(2, 4, 6, *output.shape[2:])
    channels = 4 // conv.groups
    for n, c, h, w in some_cells(output.shape):
        trace = precedents(conv, x, "", (n, c, h, w))
        (read,) = trace.terms.reads
        first = c // (8 // conv.groups) * channels
        assert torch.equal(read.values, columns[n, first : first + channels, :, h, w].reshape(-1))
        assert torch.equal(read.weights, conv.weight[c].reshape(-1).detach())
        assert trace.terms.bias == (None if conv.bias is None else float(conv.bias[c].detach()))
        assert trace.terms.total == pytest.approx(float(output[n, c, h, w].detach()), abs=1e-13)
        assert trace.terms.value == trace.value == float(output[n, c, h, w].detach())
        # The cells, and the weights at their places; those in the padding are none of the input's.
        if not read.inside.any():
            assert [cells.name for cells in trace.layers] == [step.name]
            continue
        layer_cells = trace.layer("input")
        assert torch.equal(layer_cells.cells, read.cells[read.inside])
        assert torch.equal(layer_cells.weights[layer_cells.mask], read.weights[read.inside])
        total = (layer_cells.weights * layer_cells.values).sum() + (trace.terms.bias or 0)
        assert float(total) == pytest.approx(trace.value, abs=1e-13)


RESULTS = {
    "1d": (nn.Conv1d(2, 4, 3, padding=2, stride=2, groups=2), (2, 2, 9)),
    "3d": (nn.Conv3d(2, 2, (1, 2, 3), padding=(0, 1, 1)), (1, 2, 3, 4, 5)),
    "transposed": (nn.ConvTranspose2d(2, 4, (3, 2), stride=2, padding=1, groups=2), (2, 2, 4, 5)),
    "unbatched": (nn.Conv2d(2, 3, (3, 2), padding=1), (2, 5, 6)),
    "reflect": (convext.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (1, 2, 5, 6)),
    "same, unevenly": (convext.Conv2d(2, 3, 2, padding="same"), (1, 2, 5, 6)),
    "linear": (nn.Linear(6, 5), (3, 6)),
    "linear without bias": (nn.Linear(6, 5, bias=False), (3, 6)),
    "linear on three axes": (nn.Linear(6, 5), (2, 3, 6)),
    "linear on one axis": (nn.Linear(6, 5), (6,)),
    "mean pool": (nn.AvgPool2d((3, 2), 2, 1), (1, 2, 7, 6)),
    "mean of divided windows": (nn.AdaptiveAvgPool2d((2, 3)), (1, 2, 5, 7)),
    "mean": (nn.AdaptiveAvgPool2d(1), (1, 2, 5, 7)),
    "max pool": (nn.MaxPool2d((3, 2), 2, (1, 0), (1, 2), ceil_mode=True), (2, 2, 8, 7)),
    "max pool unbatched": (nn.MaxPool2d(2), (2, 6, 7)),
    "relu": (nn.ReLU(), (2, 3, 4)),
    "relu in place": (nn.ReLU(inplace=True), (2, 3, 4)),
    "our norm": (convext.BatchNorm2d(3), (2, 3, 4, 5)),
    "stock norm": (nn.BatchNorm2d(3), (2, 3, 4, 5)),
    "norm without gamma": (nn.BatchNorm2d(3, affine=False), (2, 3, 4, 5)),
    "difference": (Residual(), (1, 2, 5, 4)),
    "sum in place": (Residual(in_place=True), (1, 2, 5, 4)),
    "affine": (Affine(), (3, 5)),
    "flatten": (nn.Flatten(), (1, 2, 3, 4)),
    "block": (convext.ConvBlock2d(2, 4, 3, order="conv-norm-relu"), (1, 2, 5, 4)),
    "fused, relu first": (Fused("conv-relu-norm"), (1, 2, 5, 4)),
    "fused, norm first": (Fused("conv-norm-relu"), (1, 2, 5, 4)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize(("model", "size"), RESULTS.values(), ids=RESULTS)
def test_the_terms_come_to_what_the_model_computed(model, size, dtype):
    model = with_statistics(model).to(dtype)
    x = torch.randn(size, dtype=dtype)
    tape = record(model, x)
    output = model.eval()(x.clone()).detach()
    tolerance = {"abs": 1e-5, "rel": 1e-5} if dtype == torch.float32 else {"abs": 1e-13}
    for index in some_cells(output.shape, 12):
        written = terms(tape, tape.find(""), index)
        assert written.result == pytest.approx(float(output[index]), **tolerance)
        assert written.value == float(output[index])


@pytest.mark.parametrize("size", [(3, 6), (2, 3, 6), (6,)], ids=["2", "3", "1"])
def test_a_dense_layers_weights_are_its_rows(size):
    layer = nn.Linear(6, 5).double()
    x = torch.randn(size, dtype=torch.float64)
    for index in some_cells((*size[:-1], 5)):
        trace = precedents(layer, x, "", index)
        (read,) = trace.terms.reads
        assert torch.equal(read.weights, layer.weight[index[-1]].detach())
        assert torch.equal(read.values, x[index[:-1]])
        assert trace.terms.bias == float(layer.bias[index[-1]].detach())
        assert int(trace.layer("input").mask.sum()) == 6


def test_the_winner_is_the_place_that_max_pool_returns():
    settings = {"kernel_size": (3, 2), "stride": 2, "padding": (1, 1), "dilation": (1, 2)}
    x = torch.randn(2, 2, 8, 7)
    x[1] = x[1].round().clamp(min=0)  # equal ones, of which the first wins
    output, places = F.max_pool2d(x, **settings, return_indices=True)
    tape = record(nn.MaxPool2d(**settings), x)
    for index in itertools.product(*map(range, output.shape)):
        written = terms(tape, tape.find(""), index)
        assert written.winner == (*index[:2], *divmod(int(places[index]), 7))
        assert written.result == float(output[index])


def test_other_operations_have_cells_and_values_only():
    trace = precedents(nn.Softmax(dim=1), torch.tensor([[1.0, 2.0, 3.0]]), "", (0, 1))
    assert (trace.terms.rule, trace.terms.result) == ("cells", None)
    assert trace.terms.reads[0].values.tolist() == [1.0, 2.0, 3.0]
    assert trace.layer("input").weights is None
    with pytest.raises(ValueError, match="cells of input are not multiplied by weights"):
        _ = trace.terms.reads[0].products
    assert "_softmax, reads\n  input[0, 0] = 1" in str(trace)


NETWORKS = {
    "example": (conv_example(), (0, 0, 11, 14)),
    "lesson": (lesson_cnn(), (0, 0, 13, 0)),
    "stock lesson": (lesson_cnn("torch"), (0, 0, 9, 20)),
}


@pytest.mark.parametrize(("model", "cell"), NETWORKS.values(), ids=NETWORKS)
def test_dependents_are_what_changes_when_a_cell_is_changed(model, cell):
    model = positive(model)
    x = torch.rand(1, 1, 28, 28, dtype=torch.float64) + 1
    changed = x.clone()
    changed[cell] += 1e6  # more than any maximum that it takes part in
    before, after = record(model, x), record(model, changed)
    trace = dependents(model, x, "input", cell)
    found = {cells.step: cells.mask for cells in trace.layers}
    assert trace.terms is None
    for old, new in zip(before.steps, after.steps, strict=True):
        differ = old.value != new.value
        assert torch.equal(found.get(old.index, torch.zeros_like(differ)), differ), old.name


@pytest.mark.parametrize(
    ("model", "layer", "index"),
    [
        (conv_example(), "conv2", (0, 1, 3, 20)),
        (conv_example(), "pool", (0, 1, 11, 0)),
        (lesson_cnn(), "conv2", (0, 5, 0, 6)),
        (lesson_cnn(), "norm3", (0, 31, 3, 1)),
        (lesson_cnn("torch"), "conv3", (0, 2, 2, 0)),
    ],
    ids=["example-conv2", "example-pool", "lesson-conv2", "lesson-norm3", "stock-conv3"],
)
def test_precedents_are_the_cells_whose_change_changes_it(model, layer, index):
    model = positive(model)
    cut = model[: [name for name, _ in model.named_children()].index(layer) + 1]
    x = torch.rand(1, 1, 28, 28, dtype=torch.float64) + 1
    trace = precedents(model, x, layer, index)
    assert trace.name == layer
    for start, name in [(0, "input"), (2, "relu1")]:  # of the whole, and of what is behind a ReLU
        source = model[:start](x).detach()
        assert torch.equal(trace.layer(name).values, source)
        copies = source.expand(source.numel(), *source.shape[1:]).clone()
        copies.flatten(1).diagonal().add_(1e6)
        with torch.no_grad():
            outputs = torch.cat([cut[start:](part) for part in copies.split(256)])
        differ = outputs[(slice(None), *index[1:])] != trace.value
        assert torch.equal(trace.layer(name).mask.reshape(-1), differ)


@pytest.mark.parametrize(
    ("layer", "size", "cell"),
    [
        (
            convext.Conv2d(2, 4, (3, 2), stride=(2, 1), padding=1, groups=2),
            (2, 2, 6, 5),
            (1, 1, 2, 3),
        ),
        (nn.Conv2d(2, 3, (3, 2), dilation=(1, 2), padding=(0, 2)), (1, 2, 6, 5), (0, 0, 5, 0)),
        (convext.Conv2d(2, 3, 3, padding=1, algorithm="winograd"), (1, 2, 6, 5), (0, 0, 3, 0)),
        (nn.ConvTranspose2d(2, 3, (3, 2), stride=2), (1, 2, 4, 5), (0, 1, 3, 2)),
        (nn.Linear(6, 5), (3, 6), (2, 4)),
        (nn.AvgPool2d(3, 2, 1), (1, 2, 6, 5), (0, 1, 4, 4)),
        (Shift(), (2, 5), (1, 2)),
    ],
    ids=["convext", "torch", "winograd", "transposed", "linear", "mean", "shift"],
)
def test_a_dependents_weight_is_the_one_among_its_precedents(layer, size, cell):
    layer, x = layer.double(), torch.randn(size, dtype=torch.float64)
    (_, found) = dependents(layer, x, "input", cell).layers
    assert found.cells.numel() > 0
    for index in found.cells.tolist():
        back = precedents(layer, x, "", index).layer("input")
        assert back.mask[cell]
        assert float(found.weights[tuple(index)]) == float(back.weights[cell])
    assert not found.weights[~found.mask].any()


def test_a_residual_branch_is_read_directly_and_by_its_convolution():
    model = Residual().double()
    x = torch.randn(1, 2, 5, 4, dtype=torch.float64)
    trace = precedents(model, x, "", (0, 1, 2, 2))
    assert [cells.name for cells in trace.layers] == ["input", "conv", "sub"]
    assert int(trace.layer("input").mask.sum()) == 18  # by the convolution
    assert trace.layer("input").weights.nonzero().tolist() == [[0, 1, 2, 2]]  # directly
    assert float(trace.layer("input").weights.min()) == -2
    assert float(trace.layer("conv").weights.max()) == 1


def test_constants_are_biases_and_factors_are_weights():
    model = Affine().double()
    trace = precedents(model, torch.randn(3, 5, dtype=torch.float64), "", (2, 4))
    assert [cells.name for cells in trace.layers] == ["input", "mm", "sub"]
    assert trace.terms.bias == float(model.constant[0, 4].detach())
    assert trace.layer("mm").weights[2, 4] == -1
    product = precedents(model, torch.randn(3, 5, dtype=torch.float64), "mm", (2, 4))
    assert product.terms.bias is None
    assert torch.equal(product.layer("input").weights[:, 4], model.matrix[2].detach())


def test_a_layer_that_only_moves_cells_copies_them():
    x = torch.rand(1, 1, 28, 28)
    written = precedents(conv_example(), x, "flatten", (0, 200)).terms
    assert (written.rule, written.formula) == ("copy", "pool[0, 1, 4, 8]")


def test_n_may_be_left_out_where_it_is_1():
    model = conv_example()
    x = torch.rand(1, 1, 28, 28)
    assert precedents(model, x, "conv2", (1, 3, 4)).index == (0, 1, 3, 4)
    assert precedents(model, x, model.conv2, [0, 1, 3, 4]).index == (0, 1, 3, 4)
    assert dependents(model, x, "flatten", (5,)).index == (0, 5)


@pytest.mark.parametrize(
    ("index", "images"),
    [((1, 3, 4), 2), ((0, 1, 26, 4), 1), ((0, 2, 3, 4), 1), ((0, 1, -1, 4), 1), ((), 1)],
    ids=["no N", "row", "channel", "negative", "none"],
)
@pytest.mark.parametrize("function", [precedents, dependents])
def test_a_cell_that_is_not_there(function, index, images):
    with pytest.raises(ValueError, match=r"must be a cell of conv1, whose axes are 0-.*, got"):
        function(conv_example(), torch.rand(images, 1, 28, 28), "conv1", index)


def test_bad_arguments():
    model, x = conv_example(), torch.rand(1, 1, 28, 28)
    with pytest.raises(ValueError, match=r"layer must be one of input, conv1, .*, got 'conv3'"):
        precedents(model, x, "conv3", (0, 0, 0, 0))
    with pytest.raises(ValueError, match=r"index must be whole numbers, got \(0, 1.5, 2, 2\)"):
        precedents(model, x, "conv1", (0, 1.5, 2, 2))
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got function"):
        precedents(lesson_cnn, x, "conv1", (0, 0, 0, 0))
    with pytest.raises(TypeError, match="input must be a tensor, got list"):
        precedents(model, x.tolist(), "conv1", (0, 0, 0, 0))
    trace = precedents(model, x, "conv1", (0, 0, 0, 0))
    with pytest.raises(ValueError, match="name must be one of input, conv1, got 'conv2'"):
        trace.layer("conv2")
    with pytest.raises(ValueError, match="channels must be at least 1, got 0"):
        trace.plot(0)


SUM = """\
conv[0, 0, 0, 1] = 11.5 is computed from these cells

layer  shape          cells  where
input  1 x 1 x 2 x 3      2  channel 0, row 0, columns 0-1
conv   1 x 1 x 3 x 4      1  channel 0, row 0, column 1

input, channel 0, rows -1 to 0, columns 0-1
  value       weight     product
  pad pad  x   1 2   =    0 0
    1   2      3 4        3 8

sum of 4 products                              11
bias                                          0.5
together                                     11.5
conv[0, 0, 0, 1], as the model computed it   11.5"""


def written_out():
    """One convolution of whole numbers, and a max pool of two equal ones."""
    model = nn.Sequential()
    model.add_module("conv", convext.Conv2d(1, 1, 2, padding=1))
    model.add_module("pool", nn.MaxPool2d(2))
    model.conv.weight.data = torch.arange(1.0, 5).reshape(1, 1, 2, 2)
    model.conv.bias.data.fill_(0.5)
    return model, torch.tensor([[[[1.0, 2, 3], [4, 5, 6]]]])


def squeezed(text):
    return [" ".join(line.split()) for line in text.splitlines()]


def test_the_text_writes_the_sum_out():
    model, x = written_out()
    text = str(precedents(model, x, "conv", (0, 0, 0, 1)))
    assert squeezed(text) == squeezed(SUM)
    assert max(map(len, text.splitlines())) <= 100


def test_the_text_of_pools_formulas_and_copies():
    model, x = written_out()
    pool = str(precedents(model, x, "pool", (0, 0, 0, 1)))
    # Of 1 2 3 / 4 5 6 and the kernel 1 2 / 3 4, padded: the upper right corner of the output.
    expected = F.conv2d(x, model.conv.weight, model.conv.bias, padding=1)[0, 0, :2, 2:]
    largest = f"{expected.max():g}"
    assert f"[{largest}]" in pool
    shown = ", ".join(f"{v:g}" for v in expected.reshape(-1).tolist())
    assert f"pool[0, 0, 0, 1] = max({shown}) = {largest}: conv[0, 0, 1, 2]" in pool
    equal = str(precedents(nn.MaxPool2d(2), torch.zeros(1, 1, 2, 2), "", (0, 0, 0, 0)))
    assert "input[0, 0, 0, 0], the first of 4 equal ones" in equal
    norm = nn.BatchNorm2d(1).eval()
    norm.running_mean.fill_(-2)
    text = str(precedents(norm, torch.ones(1, 1, 1, 1), "", (0, 0, 0, 0)))
    assert "(1 - (-2)) / sqrt(1 + 1e-05) * 1 + 0 = 3" in text
    text = str(precedents(nn.Flatten(), x, "", (0, 4)))
    assert (
        text.endswith("flatten[0, 4] is a copy of input[0, 0, 1, 1] = 5") or "[0, 4] is a" in text
    )
    dense = str(precedents(conv_example(), torch.rand(1, 1, 28, 28), "dense", (0, 3)))
    assert "the 10 largest of 288 products\n" in dense
    assert "\nthe other 278 come to " in dense


def test_regions_say_how_much_of_their_box_is_read():
    conv = nn.Sequential(nn.Conv2d(1, 1, 3, dilation=2), nn.Conv2d(1, 1, 1))
    text = str(precedents(conv, torch.rand(1, 1, 12, 7), "0", (0, 0, 1, 0)))
    assert "channel 0, rows 1, 3, 5, columns 0, 2, 4\n" in text
    model = Residual()
    text = str(precedents(model, torch.rand(1, 2, 5, 4), "sub", (0, 1, 2, 2)))
    assert "channels 0-1, rows 1-3, columns 1-3\n" in text


def test_the_text_of_dependents_shows_the_kernel_turned_round():
    x = torch.rand(1, 1, 28, 28)
    text = str(dependents(conv_example(), x, "input", (0, 0, 14, 13)))
    assert "conv1 multiplies input[0, 0, 14, 13] by these, in channel 0, rows 12-14" in text
    assert [line.split() for line in text.splitlines() if line.startswith("  ")][:3] == [
        ["1", "1", "1"],
        ["0", "0", "0"],
        ["-1", "-1", "-1"],
    ]


def test_plain_text_and_rich_show_the_same(capsys):
    from rich.console import Console

    model, x = written_out()
    trace = precedents(model, x, "conv", (0, 0, 0, 1))
    console = Console(width=100)
    with console.capture() as capture:
        console.print(trace)
    for shown in (str(trace), capture.get()):
        assert "= 11.5 is computed from these cells" in shown
        assert "channel 0, row 0, columns 0-1" in shown
        assert "as the model computed it" in shown


@pytest.mark.parametrize(
    ("layer", "index", "framed"),
    [("conv2", (0, 0, 12, 12), [25, 9, 9, 9, 9, 1]), ("dense", (0, 3), [784, 676, 676])],
    ids=["conv2", "dense"],
)
def test_the_picture_frames_the_cells(layer, index, framed):
    trace = precedents(conv_example(), torch.rand(1, 1, 28, 28), layer, index)
    figure = trace.plot()
    veils = [ax.images[1].get_array()[..., 3] for ax in figure.axes if len(ax.images) == 2]
    assert [int((veil == 0).sum()) for veil in veils][: len(framed)] == framed
    first = figure.axes[0].collections[0].get_segments()
    assert len(first) == 4 * int(framed[0] ** 0.5)  # the outline of a square
    assert "is computed from" in figure.get_suptitle()


def test_the_picture_shows_some_of_many_channels_and_says_so():
    x = torch.rand(1, 1, 28, 28)
    figure = precedents(lesson_cnn(), x, "conv3", (0, 0, 0, 3)).plot(channels=2)
    labels = [ax.get_ylabel() for ax in figure.axes if ax.get_ylabel()]
    assert "norm2\n64 cells\nin 16 of 16 channels,\n2 of them here" in labels
    texts = [text.get_text() for ax in figure.axes for text in ax.texts]
    assert texts.count("pad") == 2 * 5  # of two channels' windows in the corner


def test_the_picture_of_dependents_marks_the_cell_among_frames():
    figure = dependents(conv_example(), torch.rand(1, 1, 28, 28), "pool", (0, 1, 2, 3)).plot()
    (pool, flatten, dense) = (ax for ax in figure.axes if ax.images)
    assert [patch.get_xy() for patch in pool.patches] == [(2.5, 1.5)]
    assert not flatten.patches
    assert pool.get_title() == "channel 1"
    assert [int((ax.images[1].get_array()[..., 3] == 0).sum()) for ax in (flatten, dense)] == [
        1,
        10,
    ]
    assert "has a part in" in figure.get_suptitle()


@pytest.fixture
def picture(tmp_path):
    """A 28x28 picture with a bright square."""
    import numpy as np
    from PIL import Image

    cells = np.zeros((28, 28), dtype=np.uint8)
    cells[8:20, 8:20] = 255
    Image.fromarray(cells).save(tmp_path / "square.png")
    return str(tmp_path / "square.png")


def test_the_command(capsys, tmp_path, picture):
    out = tmp_path / "new" / "trace.png"
    assert main(["trace", "--image", picture, "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "conv2[0, 0, 12, 12] = " in text
    assert "channels 0-1, rows 12-14, columns 12-14" in text
    assert text.splitlines()[-1] == str(out)
    assert out.read_bytes().startswith(b"\x89PNG")
    args = ["trace", "--image", picture, "--layer", "conv1"]
    assert main([*args, "--index", "0,9,7"]) == 0
    assert "conv1[0, 0, 9, 7] = 0 is" in capsys.readouterr().out
    assert main(["trace", "lesson", "--image", picture, "--dependents"]) == 0
    assert "conv1 multiplies input[0, 0, 14, 14] by these" in capsys.readouterr().out


def test_the_command_hands_model_and_input_to_workbook_and_page(
    capsys, tmp_path, picture, monkeypatch
):
    def save(model, input, path):
        path.write_text(f"{type(model).__name__} {tuple(input.shape)}")

    for module, function in [("workbook", "write_workbook"), ("page", "write_page")]:
        name = f"convext.inspection.{module}"
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**{function: save}))
    files = [tmp_path / "trace.xlsx", tmp_path / "trace.html"]
    args = ["--xlsx", str(files[0]), "--html", str(files[1])]
    assert main(["trace", "--image", picture, *args]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [str(file) for file in files]
    assert [file.read_text() for file in files] == ["Sequential (1, 1, 28, 28)"] * 2


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--layer", "conv9"], "--layer must be one of input, conv1, relu1, conv2, "),
        (["--index", "0,2,0,0"], "--index must be 0-0,0-1,0-23,0-23, got 0,2,0,0"),
        (["--index", "1,two"], "--index: must be whole numbers like 3,0,2, got '1,two'"),
        (["torch.nn:ReLU"], "MODEL torch.nn:ReLU has no convolution: say by --layer which cell"),
        (["torchless"], "MODEL must be lesson, example, "),
        (["test_precedents:three_channels"], "can't take a 1 x 1 x 28 x 28 input: "),
        (["test_precedents:sorting", "--layer", ""], "which cells aten.sort.default reads"),
    ],
    ids=["layer", "index", "number", "no convolution", "model", "channels", "operation"],
)
def test_a_mistake_is_one_line_and_status_2(capsys, picture, args, message):
    try:
        status = main(["trace", *args, "--image", picture])
    except SystemExit as stop:
        status = stop.code
    out, err = capsys.readouterr()
    assert (status, out) == (2, "")
    assert message in err
    assert err.startswith("convext trace: ")
    assert err.count("\n") == 1


def three_channels():
    """A model that the command's pictures do not fit."""
    return nn.Conv2d(3, 1, 3)


def sorting():
    """A model with an operation that no tape follows."""

    class Sorting(nn.Module):
        def forward(self, x):
            return x.sort().values

    return Sorting()
