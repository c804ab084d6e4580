"""The tape: which operations a model applied, and which cells each of them joins.

The oracle of the cells is PyTorch's autograd through the model itself, its activations made
positive and its weights too, so that no sum cancels and no ReLU is shut.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import convext
from convext.inspection.tape import record
from convext.mnist.model import lesson_cnn


class Branches(nn.Module):
    """Residual, concatenated and multiplied branches, in place and not, ceil_mode and dilation."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2))
        self.norm = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.same = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(4, 4, 2, stride=2)

    def forward(self, x):
        x = self.relu(self.norm(self.conv(x)))
        x = self.relu(x + self.same(x))
        first, second = x.split([1, 3], dim=1)
        x = torch.cat([second, F.avg_pool2d(first, 3, 1, 1)], dim=1)
        x = F.max_pool2d(self.up(x), (3, 2), stride=2, padding=(1, 0), ceil_mode=True)
        return F.pad(x, (1, 0, 0, 2)).flatten(2)


def positive(model):
    """The same cells, and no value that could hide one: weights above 0, biases 0."""
    for name, parameter in model.named_parameters():
        parameter.data = torch.zeros_like(parameter) if "bias" in name else parameter.data.abs() + 1
    return model.double()


def gradient_support(model, x, index):
    """Which cells of the input one output cell's gradient reaches. Pools become means."""
    x = x.clone().requires_grad_()
    maximum = F.max_pool2d
    try:
        F.max_pool2d = lambda x, *args, **kwargs: F.avg_pool2d(x, *args, **kwargs)
        model.eval()(x)[index].backward()
    finally:
        F.max_pool2d = maximum
    return x.grad != 0


@pytest.mark.parametrize("layers", ["convext", "torch"])
@pytest.mark.parametrize("step", ["norm1", "conv2", "norm3", "flatten"])
def test_precedents_are_where_the_gradient_is_in_the_lessons_network(layers, step):
    model = positive(lesson_cnn(layers))
    x = torch.rand(2, 1, 28, 28, dtype=torch.float64) + 1
    tape = record(model, x)
    found = tape.find(step)
    for place in range(0, found.value[1].numel(), 1 + found.value[1].numel() // 7):
        mask = torch.zeros(found.value.shape, dtype=torch.bool)
        mask[1].view(-1)[place] = True
        cut = nn.Sequential(*list(model)[: found.index])
        index = tuple(mask.nonzero()[0])
        assert torch.equal(tape.precedents(found.index, mask)[0], gradient_support(cut, x, index))


@pytest.mark.parametrize("place", [0, 17, 40, -1])
def test_precedents_are_where_the_gradient_is_through_branches(place):
    model = positive(Branches())
    x = torch.rand(2, 3, 11, 9, dtype=torch.float64) + 1
    tape = record(model, x)
    last = tape.find("")
    mask = torch.zeros(last.value.shape, dtype=torch.bool)
    mask[0].view(-1)[place] = True
    expected = gradient_support(model, x, tuple(mask.nonzero()[0]))
    assert torch.equal(tape.precedents(last.index, mask)[0], expected)


class Function(nn.Module):
    """Some function of a convolution's output."""

    def __init__(self, function):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.function = function

    def forward(self, x):
        return self.function(self.conv(x))


def tokens(x):
    return x.flatten(2).transpose(1, 2)


FUNCTIONS = {
    "chunk": lambda x: x.chunk(2, 1)[1] * 2,
    "channel_shuffle": lambda x: F.channel_shuffle(x, 2)[:, :2],
    "pixel_unshuffle": lambda x: F.pixel_unshuffle(x, 2)[:, :3],
    "gate": lambda x: x * torch.sigmoid(F.adaptive_avg_pool2d(x, 1)),
    "glu": lambda x: F.glu(x, 1),
    "prelu": lambda x: F.prelu(x, torch.ones(1, dtype=x.dtype)),
    "activations": lambda x: F.mish(F.elu(F.hardswish(F.silu(x, inplace=True), inplace=True))),
    "dropout": lambda x: F.dropout2d(F.dropout(x, training=False), training=False),
    "nearest": lambda x: F.interpolate(x, size=(13, 7)),
    "nearest-exact": lambda x: F.interpolate(x, size=(13, 7), mode="nearest-exact"),
    "bilinear": lambda x: F.interpolate(x, scale_factor=1.5, mode="bilinear"),
    "antialias": lambda x: F.interpolate(x, size=(5, 4), mode="bilinear", antialias=True),
    "area": lambda x: F.interpolate(x, size=(4, 3), mode="area"),
    "adaptive": lambda x: F.adaptive_avg_pool2d(x, (4, 3)),
    "lp_pool": lambda x: F.lp_pool2d(x, 2, 2),
    "std": lambda x: x.std((2, 3)),
    "normalize": lambda x: F.normalize(x, dim=1),
    "local_response_norm": lambda x: F.local_response_norm(x, 3),
    "einsum": lambda x: torch.einsum("nchw,ndhw->ncd", x, x[:, 1:]),
    "unfold": lambda x: F.unfold(x, 3, dilation=2),
    "fold": lambda x: F.fold(F.unfold(x, 2), (8, 6), 2),
    "index": lambda x: x[:, [2, 0]][..., [1, 1, 3]],
    "strides": lambda x: torch.cat([x[..., ::2, 1::2], x[..., 1::2, ::2]], 1),
    "cumsum": lambda x: x.cumsum(-1),
    "roll": lambda x: x.roll((1, 2), (2, 3)).flip(-1),
    "attention": lambda x: F.scaled_dot_product_attention(tokens(x), tokens(x), tokens(x[:, :3])),
    "circular": lambda x: F.pad(x, (1, 0, 2, 3), mode="circular"),
    "added": lambda x: (x * 1).add_(x),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_precedents_are_where_the_gradient_is_through(name):
    model = positive(Function(FUNCTIONS[name]))
    x = torch.rand(1, 2, 8, 6, dtype=torch.float64) + 1
    tape = record(model, x)
    last = tape.find("")
    for place in range(0, last.value.numel(), 1 + last.value.numel() // 5):
        mask = torch.zeros(last.value.shape, dtype=torch.bool)
        mask.view(-1)[place] = True
        expected = gradient_support(model, x, tuple(mask.nonzero()[0]))
        assert torch.equal(tape.precedents(last.index, mask)[0], expected)


@pytest.mark.parametrize("kind", ["attention", "encoder"])
def test_attention_layers_read_all_tokens(kind):
    if kind == "attention":
        layer = nn.MultiheadAttention(4, 2, batch_first=True)
        model = Function(lambda x: layer(tokens(x), tokens(x), tokens(x))[0])
    else:
        layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        model = Function(lambda x: layer(tokens(x)))
    model.layer = layer  # so that it is put into evaluation mode, too
    tape = record(model, torch.rand(1, 2, 8, 6))
    mask = torch.zeros(tape.find("").value.shape, dtype=torch.bool)
    mask[0, 5, 1] = True
    assert bool(tape.precedents(tape.find("").index, mask)[0].all())


def test_cells_that_the_input_itself_picks_are_no_matter_of_shapes():
    tape = record(Function(lambda x: x[:, :, x[0, 0].argmax(1)]), torch.rand(1, 2, 4, 4))
    last = tape.find("")
    with pytest.raises(NotImplementedError, match=r"index: which cells aten\.index.* to say"):
        tape.precedents(last.index, torch.ones(last.value.shape, dtype=torch.bool))


@pytest.mark.parametrize("model", [lesson_cnn(), Branches()], ids=["lesson", "branches"])
def test_dependents_and_precedents_are_each_others_converse(model):
    x = torch.rand(1, 1, 28, 28) if isinstance(model, nn.Sequential) else torch.rand(1, 3, 9, 8)
    tape = record(model, x)
    cell = (0, 0, 5, 4)
    mask = torch.zeros(x.shape, dtype=torch.bool)
    mask[cell] = True
    for step, reached in tape.dependents(0, mask).items():
        flat = reached.view(-1)
        for place in range(0, flat.numel(), 1 + flat.numel() // 20):
            one = torch.zeros_like(flat)
            one[place] = True
            backwards = tape.precedents(step, one.view(reached.shape))[0]
            assert bool(backwards[cell]) == bool(flat[place])


def test_values_are_those_of_each_moment():
    model = Branches().eval()
    x = torch.randn(1, 3, 9, 8)
    tape = record(model, x)
    assert torch.equal(tape.find("input").value, x)
    assert torch.equal(tape.find("conv").value, model.conv(x))
    assert (tape.find("norm").value < 0).any()  # not what the ReLU in place made of it
    assert torch.equal(tape.find("").value, model(x))


@pytest.mark.parametrize("conv", [nn.Conv2d, convext.Conv2d], ids=["torch", "convext"])
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_values_are_those_of_the_model_in_every_padding_mode(conv, mode):
    layer = conv(2, 3, (3, 5), padding=(1, 2), padding_mode=mode)
    x = torch.randn(2, 2, 7, 6)
    assert torch.equal(record(layer, x).find("").value, layer(x))


def test_names_are_unique_and_tell_the_layer():
    tape = record(Branches(), torch.randn(1, 3, 9, 8))
    names = [step.name for step in tape.steps]
    assert len(set(names)) == len(names)
    assert names[:6] == ["input", "conv", "norm", "relu.relu_", "same", "add"]
    assert tape.find("relu").name == "relu"  # its last call
    assert tape.find(tape.steps[1].module) is tape.steps[1]
    with pytest.raises(ValueError, match=r"layer must be one of input, conv, norm, .*, got 'cov'"):
        tape.find("cov")


def test_norms_join_what_they_take_the_mean_of():
    norms = (nn.LayerNorm([4, 6]), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4))
    for norm, cells in zip(norms, ((6, 4), (2, 6, 4), (1, 6, 4)), strict=True):
        x = torch.randn(2, 4, 6, 4) if not isinstance(norm, nn.LayerNorm) else torch.randn(2, 4, 6)
        tape = record(norm, x)
        mask = torch.zeros(x.shape, dtype=torch.bool)
        mask.view(-1)[-1] = True
        read = tape.precedents(tape.find("").index, mask)[0]
        assert int(read.sum()) == torch.Size(cells if x.dim() == 4 else (4, 6)).numel()


def test_matrix_products_of_two_activations():
    class Attention(nn.Module):
        def forward(self, x):
            return x.transpose(1, 2) @ x

    tape = record(Attention(), torch.randn(2, 3, 5))
    mask = torch.zeros(2, 5, 5, dtype=torch.bool)
    mask[1, 2, 4] = True
    expected = torch.zeros(2, 3, 5, dtype=torch.bool)
    expected[1, :, [2, 4]] = True
    assert torch.equal(tape.precedents(tape.find("").index, mask)[0], expected)


def test_the_model_is_left_as_it_was():
    model = lesson_cnn("torch")
    model.norm2.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    record(model, torch.randn(2, 1, 28, 28))
    assert model.training
    assert not model.norm2.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_an_unknown_operation_is_named():
    class Sorting(nn.Module):
        def forward(self, x):
            return x.sort(dim=-1).values

    tape = record(Sorting(), torch.randn(2, 5))
    with pytest.raises(NotImplementedError, match=r"sort: which cells aten\.sort.* is not known"):
        tape.precedents(tape.find("").index, torch.ones(2, 5, dtype=torch.bool))


def test_a_view_overwritten_in_place_is_an_error_if_it_is_read():
    class Overwriting(nn.Module):
        def forward(self, x):
            y = x + 1
            y.view(-1).relu_()
            return y * 2

    with pytest.raises(NotImplementedError, match="overwritten in place"):
        record(Overwriting(), torch.randn(2, 5))


def test_fused_blocks_are_followed():
    block = convext.ConvBlock2d(3, 4, 3, padding=1)
    tape = record(block, torch.randn(1, 3, 6, 5))
    mask = torch.zeros(1, 4, 6, 5, dtype=torch.bool)
    mask[0, 2, 0, 4] = True
    read = tape.precedents(tape.find("").index, mask)[0]
    assert int(read.sum()) == 3 * 2 * 2
