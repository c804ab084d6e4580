"""Receptive fields: known values, arithmetic beside the cells that the tape finds, and autograd."""

from fractions import Fraction

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import convext
from convext.__main__ import main
from convext.inspection import receptive_field
from convext.inspection.example import conv_example
from convext.mnist.model import lesson_cnn


def conv(inputs, outputs, kernel=3, stride=1, **options):
    middle = kernel // 2 if isinstance(kernel, int) else 0
    options = {"padding": middle, "bias": False, **options}
    return nn.Conv2d(inputs, outputs, kernel, stride, **options)


def pool(kernel=2, stride=2, **options):
    return nn.MaxPool2d(kernel, stride, **options)


# Of the table in Araujo, Norris and Sim (Distill, 2019), with few channels: they don't matter.
# Strides are where TF-Slim has them, which that table is about.


def alexnet_v2():
    return nn.Sequential(
        *(conv(1, 2, 11, 4, padding=0), pool(3), conv(2, 2, 5), pool(3)),
        *(conv(2, 2), conv(2, 2), conv(2, 2), pool(3)),
    )


def vgg_16():
    layers = []
    for count in (2, 2, 3, 3, 3):
        layers += [*(conv(2, 2) for _ in range(count)), pool()]
    return nn.Sequential(conv(1, 2), *layers[1:])


def mobilenet_v1():
    strides = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)
    units = [(conv(2, 2, 3, stride, groups=2), conv(2, 2, 1)) for stride in strides]
    return nn.Sequential(conv(1, 2, 3, 2), *(layer for unit in units for layer in unit))


class Bottleneck(nn.Module):
    def __init__(self, stride):
        super().__init__()
        self.branch = nn.Sequential(
            *(conv(2, 1, 1), nn.BatchNorm2d(1), nn.ReLU(inplace=True)),
            *(conv(1, 1, 3, stride), nn.BatchNorm2d(1), nn.ReLU(inplace=True)),
            *(conv(1, 2, 1), nn.BatchNorm2d(2)),
        )
        self.shortcut = conv(2, 2, 1, stride)
        self.relu = nn.ReLU()

    def forward(self, x):
        return self.relu(self.branch(x) + self.shortcut(x))


def resnet_v1(*blocks):
    units = [
        Bottleneck(2 if unit == count - 1 and block < 3 else 1)
        for block, count in enumerate(blocks)
        for unit in range(count)
    ]
    return nn.Sequential(conv(1, 2, 7, 2), nn.BatchNorm2d(2), pool(3, 2, padding=1), *units)


@pytest.mark.parametrize(
    ("make", "size", "jump"),
    [
        (alexnet_v2, 195, 32),
        (vgg_16, 212, 32),
        (mobilenet_v1, 315, 32),
        (lambda: resnet_v1(3, 4, 6, 3), 483, 32),
        (lambda: resnet_v1(3, 4, 23, 3), 1027, 32),
    ],
    ids=["alexnet_v2", "vgg_16", "mobilenet_v1", "resnet_v1_50", "resnet_v1_101"],
)
def test_published_values(make, size, jump):
    row = receptive_field(make(), (1, 1, 256, 224)).rows[-1]
    assert row.size == (size, size)
    assert row.jump == (jump, jump)


def test_two_convolutions_of_stride_2_see_7x7():
    found = receptive_field(nn.Sequential(conv(1, 4, 3, 2), conv(4, 8, 3, 2)), (1, 1, 28, 20))
    assert found.rows[-1].size == (7, 7)
    assert found.rows[-1].jump == (4, 4)


@pytest.mark.parametrize("layers", ["convext", "torch"])
def test_the_lessons_network(layers):
    found = receptive_field(lesson_cnn(layers), (1, 1, 28, 28))
    rows = [found.row(f"conv{n}") for n in range(1, 6)]
    assert [row.size[0] for row in rows] == [5, 9, 17, 33, 65]
    assert [row.jump[0] for row in rows] == [2, 4, 8, 16, 32]
    # Padding is half of what a symmetric kernel spans: the first field's centre is pixel 0.
    assert {row.start for row in rows} == {(0, 0)}
    assert (rows[0].before, rows[0].after) == ((2, 2), (1, 1))
    assert (rows[0].cut, rows[0].fields) == (14 * 14 - 12 * 12, 14 * 14)
    assert rows[-1].cut_share == 1
    assert found.field_of("conv2", 3, 2) == (range(8, 17), range(4, 13))
    assert found.field_of("flatten", 7) == (range(28), range(28))


def test_height_and_width_have_settings_of_their_own():
    layer = nn.Conv2d(1, 2, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 3))
    row = receptive_field(nn.Sequential(layer, pool((1, 2), (1, 2))), (1, 1, 9, 14)).rows[-1]
    assert row.output_shape == (1, 2, 5, 5)
    assert row.size == (3, 5)
    assert row.jump == (2, 2)
    assert row.start == (0, 2)
    assert (row.before, row.after, row.fields, row.cut) == ((1, 0), (1, 0), 25, 10)


def test_cut_fields_are_those_that_see_padding():
    """Of ones through weights of ones, a cell that misses some in the padding is smaller."""
    layers = [nn.Conv2d(1, 1, k, s, p, bias=False) for k, s, p in ((5, 1, 2), (3, 2, 1), (4, 1, 1))]
    model = nn.Sequential(*layers).double()
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    sums = model(torch.ones(1, 1, 25, 32, dtype=torch.float64))
    row = receptive_field(model, (1, 1, 25, 32)).rows[-1]
    assert (row.cut, row.fields) == (int((sums < sums.max()).sum()), sums.numel())


class Squeeze(nn.Module):
    """A squeeze-and-excitation block: every cell is multiplied by a mean over the image."""

    def __init__(self):
        super().__init__()
        self.conv = conv(2, 4, 3, 2)
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 4, 1), nn.Sigmoid())
        self.last = conv(4, 2)

    def forward(self, x):
        x = self.conv(x)
        return self.last(x * self.gate(x))


class UNet(nn.Module):
    """Down and up again, by a transposed convolution and by upsampling, with cat between."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = conv(2, 3), conv(3, 4), conv(4, 4)
        self.up = nn.ConvTranspose2d(4, 3, 3, stride=2, padding=1, output_padding=1)
        self.bilinear = nn.Upsample(scale_factor=2, mode="bilinear")
        self.last = conv(7, 2)

    def forward(self, x):
        first = F.relu(self.first(x))
        second = F.relu(self.second(F.max_pool2d(first, 2)))
        third = self.bilinear(F.relu(self.third(F.avg_pool2d(second, 2))))
        return self.last(
            torch.cat([self.up(second + third), F.interpolate(third, scale_factor=2)], 1)
        )


class Inception(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.three = conv(2, 2, 1), conv(2, 2, 3, dilation=2, padding=2)
        self.row, self.column = conv(2, 2, (1, 7), padding=(0, 3)), conv(8, 1, 3, 2)

    def forward(self, x):
        near = F.max_pool2d(x, 3, 1, 1)
        x = torch.cat([self.one(x), self.three(x), self.row(x), near], 1)
        return self.column(F.pad(x[:, :, 1:], (2, 0, 0, 1)))


class ConvNext(nn.Module):
    """Linear layers over the channels of each cell, which are put last for them."""

    def __init__(self):
        super().__init__()
        self.depthwise = conv(2, 2, 7, groups=2)
        self.norm, self.up, self.down = nn.LayerNorm(2), nn.Linear(2, 5), nn.Linear(5, 2)

    def forward(self, x):
        y = self.depthwise(x).permute(0, 2, 3, 1)
        y = self.down(F.gelu(self.up(self.norm(y))))
        return x + y.permute(0, 3, 1, 2)


class Shuffle(nn.Module):
    """Channels shuffled between grouped convolutions."""

    def __init__(self):
        super().__init__()
        self.one, self.two = conv(2, 4, 3, groups=2), conv(4, 4, 3, 2, groups=2)

    def forward(self, x):
        x = self.one(x)
        n, c, h, w = x.shape
        return self.two(x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w))


def norms(norm):
    return nn.Sequential(conv(2, 4, 3, 2), norm, nn.ReLU(), conv(4, 2))


GRAPHS = {
    "residual": lambda: nn.Sequential(conv(2, 2, 5, 2), Bottleneck(1), Bottleneck(2)),
    "squeeze": Squeeze,
    "unet": UNet,
    "inception": Inception,
    "convnext": ConvNext,
    "shuffle": Shuffle,
    "instance_norm": lambda: norms(nn.InstanceNorm2d(4, affine=True)),
    "group_norm": lambda: norms(nn.GroupNorm(2, 4)),
    "batch_norm": lambda: norms(convext.BatchNorm2d(4)),
    "blocks": lambda: nn.Sequential(
        convext.ConvBlock2d(2, 4, 3, stride=2), convext.ConvBlock2d(4, 2, 3, dilation=2)
    ),
    "transposed": lambda: nn.Sequential(
        nn.ConvTranspose2d(2, 2, (4, 3), stride=(3, 2), padding=1, dilation=(1, 2)),
        conv(2, 2, 3, 2),
    ),
    "pixel_shuffle": lambda: nn.Sequential(conv(2, 8), nn.PixelShuffle(2), conv(2, 2)),
    "glu": lambda: nn.Sequential(conv(2, 4), nn.GLU(1), conv(2, 2, groups=2)),
    "nearest": lambda: nn.Sequential(
        conv(2, 2), nn.Upsample(scale_factor=(2, 3), mode="nearest-exact"), conv(2, 2, 5, 2)
    ),
    "largest": lambda: nn.Sequential(conv(2, 2), nn.AdaptiveMaxPool2d((1, 4)), conv(2, 2, 1)),
    "reflection": lambda: nn.Sequential(conv(2, 2, padding_mode="reflect"), conv(2, 2)),
    "ceil_mode": lambda: nn.Sequential(conv(2, 2), pool(3, 2, ceil_mode=True), conv(2, 2)),
    "adaptive": lambda: nn.Sequential(conv(2, 2), nn.AdaptiveAvgPool2d((6, 4)), conv(2, 2)),
}


@pytest.mark.parametrize("graph", GRAPHS)
def test_arithmetic_is_what_the_tape_finds_for_each_cell(graph):
    found = receptive_field(GRAPHS[graph](), (1, 2, 12, 16))
    grids = [row for row in found.rows if row.jump is not None]
    assert grids
    assert found.rows[-1] in grids
    *_, height, width = grids[-1].output_shape
    checks = list(found.check())
    step = 1 if height * width < 300 else 3  # of large grids some, each phase of an enlarged one
    checks += [
        found._check(grids[-1], (row, column))
        for row in range(0, height, step)
        for column in range(0, width, step)
    ]
    assert [check for check in checks if not check.agrees] == []
    wholes = [check for check in checks if check.whole and check.layer == grids[-1].name]
    for side in (0, 1):  # the size is that of the largest field
        sizes = [len(check.tape[side]) for check in wholes]
        assert not sizes or max(sizes) == grids[-1].size[side]


@pytest.mark.parametrize("graph", ["residual", "unet", "inception", "convnext", "transposed"])
def test_fields_are_where_the_gradient_is(graph):
    """Autograd's own answer, all weights positive; each maximum made a mean."""
    model = GRAPHS[graph]().double().eval()
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.abs() + 0.1
        if "bias" in name:
            parameter.data.zero_()
    found = receptive_field(model, (1, 2, 12, 16))
    x = torch.rand(1, 2, 12, 16, dtype=torch.float64, requires_grad=True)
    maximum = F.max_pool2d
    try:
        F.max_pool2d = lambda x, *settings, **named: F.avg_pool2d(x, *settings, **named)
        output = model(x)
    finally:
        F.max_pool2d = maximum
    for row in range(0, output.shape[2], 3):
        for column in range(0, output.shape[3], 2):
            (gradient,) = torch.autograd.grad(output[0, :, row, column].sum(), x, retain_graph=True)
            sides = (gradient[0].abs().sum((0, dim)).nonzero() for dim in (2, 1))
            expected = tuple(
                range(int(side.min()), int(side.max()) + 1) if len(side) else range(0)
                for side in sides
            )
            assert found.field_of("", row, column) == expected


def test_enlarged_grids_have_jumps_below_1():
    found = receptive_field(UNet(), (1, 2, 12, 16))
    assert found.row("up").jump == (1, 1)
    assert found.row("bilinear").jump == (2, 2)
    up = receptive_field(nn.ConvTranspose2d(1, 1, 2, stride=2), (1, 1, 5, 4)).rows[0]
    assert (up.size, up.jump) == ((1, 1), (Fraction(1, 2), Fraction(1, 2)))


def test_a_linear_layer_after_flatten_sees_all_that_the_grid_saw():
    found = receptive_field(conv_example(), (1, 1, 28, 28))
    flatten, dense = found.rows[-2:]
    assert (flatten.size, flatten.jump) == ((6, 6), None)
    assert (dense.size, dense.jump) == ((28, 28), (0, 0))
    assert found.field_of("dense", 3) == (range(28), range(28))
    # A stride that leaves the last row and column unread leaves them out here, too.
    model = nn.Sequential(nn.Conv2d(1, 2, 2, 2), nn.Flatten(), nn.Linear(2 * 4 * 3, 2))
    assert receptive_field(model, (1, 1, 9, 7)).rows[-1].size == (8, 6)


def test_branches_whose_jumps_differ_have_the_tapes_answer():
    class Drifting(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 3, stride=2)

        def forward(self, x):
            small = self.conv(x)
            return small + x[:, :, : small.shape[2], : small.shape[3]]

    row = receptive_field(Drifting(), (1, 1, 15, 13)).rows[-1]
    # The middle cell, (3, 3) of 7 x 6, reads rows and columns 6 to 8 and 3.
    assert (row.name, row.by, row.size, row.jump) == ("add", "tape", (6, 6), None)


def test_channels_that_differ_are_not_mixed_up():
    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = conv(1, 1, 5)

        def forward(self, x):
            both = torch.cat([x, self.conv(x)], 1)
            return both.chunk(2, 1)[0] + 1

    row = receptive_field(Halves(), (1, 1, 9, 8)).rows[-1]
    assert (row.by, row.size) == ("tape", (1, 1))


def test_attention_has_the_tapes_answer():
    class Attention(nn.Module):
        def forward(self, x):
            tokens = F.avg_pool2d(x, 2).flatten(2).transpose(1, 2)
            return (tokens @ tokens.transpose(1, 2)).softmax(-1) @ tokens

    row = receptive_field(Attention(), (1, 3, 9, 6)).rows[-1]
    assert (row.by, row.size) == ("tape", (8, 6))


def test_what_is_not_known_is_said():
    class Sorting(nn.Module):
        def forward(self, x):
            return x.sort(dim=-1).values

    found = receptive_field(nn.Sequential(conv(1, 1), Sorting(), conv(1, 1)), (1, 1, 6, 5))
    assert [row.size for row in found.rows] == [(3, 3), None, None]
    assert "unknown" in str(found)
    with pytest.raises(NotImplementedError, match=r"1: which cells aten\.sort"):
        found.field_of("2", 1, 1)


def test_a_field_is_no_rectangle_for_cells_that_depend_on_nothing():
    model = nn.ConvTranspose2d(1, 1, 1, stride=2)
    found = receptive_field(model, (1, 1, 3, 3))
    assert found.field_of("", 1, 2) == (range(0), range(0))
    assert found.field_of("", 2, 4) == (range(1, 2), range(2, 3))


@pytest.mark.parametrize("size", [(28, 28), (1, 28, 28), (1, 1, 0, 28)])
def test_bad_input_size(size):
    with pytest.raises(ValueError, match="input_size must be four sizes"):
        receptive_field(lesson_cnn("torch"), size)


def test_bad_layers_and_cells():
    found = receptive_field(lesson_cnn("torch"), (1, 1, 28, 28))
    with pytest.raises(ValueError, match="layer must be one of input, conv1"):
        found.field_of("conv9", 0, 0)
    with pytest.raises(ValueError, match=r"layer must be one of conv1, .*, got 'input'"):
        found.row("input")
    with pytest.raises(ValueError, match=r"conv1 must be 0 to 13 and 0 to 13, got \(14, 0\)"):
        found.field_of("conv1", 14, 0)
    with pytest.raises(ValueError, match=r"cell of conv1 must be .*, got \(1,\)"):
        found.plot("conv1", (1,))
    with pytest.raises(ValueError, match=r"layer must be one with a grid .*, got 'flatten'"):
        found.plot("flatten")


def test_the_table_as_text_and_by_rich():
    from rich.console import Console

    found = receptive_field(lesson_cnn(), (1, 1, 28, 28))
    for width in (120, 60):  # with room for a table, and without
        console = Console(width=width)
        with console.capture() as capture:
            console.print(found, soft_wrap=True)
        for shown in (str(found), capture.get()):
            assert "33 x 33" in shown
            assert "52 of 196" in shown
            assert "1 x 16 x 7 x 7" in shown


def test_the_picture_has_a_box_for_each_new_field():
    found = receptive_field(conv_example(), (1, 1, 28, 28))
    figure = found.plot("pool", (2, 5))
    axes, _ = figure.axes
    image, *boxes = axes.patches
    edges = [(b.get_x(), b.get_y(), b.get_width(), b.get_height()) for b in boxes]
    assert (image.get_width(), image.get_height()) == (28, 28)
    # conv1, conv2 and pool, whose cell (2, 5) reads rows 4 to 9 and columns 10 to 15.
    assert [edge[2:] for edge in edges] == [(3, 3), (5, 5), (6, 6)]
    assert edges[-1] == (9.5, 3.5, 6, 6)
    assert "pool[2, 5]" in axes.get_title()


def test_the_picture_of_a_deep_network_has_as_many_boxes_as_colors():
    found = receptive_field(resnet_v1(3, 4, 6, 3), (1, 1, 96, 64))
    figure = found.plot()
    axes, key = figure.axes
    figure.canvas.draw()
    drawn = axes.get_tightbbox()
    assert min(drawn.min) >= 0  # nothing is cut
    assert (drawn.max <= figure.bbox.max).all()
    sizes = [box.get_width() for box in axes.patches[1:]]
    assert len(sizes) == 8
    assert sizes == sorted(sizes)
    assert sizes[-1] == 483
    assert key.get_legend().get_texts()[7].get_text() == "18.relu[1, 1]: 483 x 483, jump 32"


def test_the_command(capsys, tmp_path):
    out = tmp_path / "fields.png"
    args = ["receptive-field", "--layer", "conv2", "--cell", "3,2", "--check", "--out", str(out)]
    assert main(args) == 0
    text = capsys.readouterr().out
    assert "9 x 9" in text
    assert "conv2[3, 2] depends on rows 8 to 16 and columns 4 to 12 of the image" in text
    assert "arithmetic agrees with the pixels found for 34 cells" in text
    assert out.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--layer", "conv9"], "layer must be one of input, conv1, "),
        (["--cell", "1,1"], "cell of conv5 must be 0 to 0 and 0 to 0, got (1, 1)"),
        (["--cell", "x"], "--cell: must be whole numbers like 3,0,2, got 'x'"),
        (["--input-size", "28x28"], "--input-size 28x28: input_size must be four sizes"),
        (["--input-size", "1x3x28x28"], "--input-size 1x3x28x28: "),
        (["nothing"], "MODEL must be lesson, "),
        (["--out", "fields.txt"], "--out: fields.txt: "),
    ],
    ids=["layer", "cell", "numbers", "size", "channels", "model", "suffix"],
)
def test_a_mistake_is_one_line_and_status_2(capsys, args, message):
    try:
        status = main(["receptive-field", *args])
    except SystemExit as stop:
        status = stop.code
    err = capsys.readouterr().err
    assert status == 2
    assert message in err
    assert err.count("\n") == 1
