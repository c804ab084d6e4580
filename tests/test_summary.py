"""convext.inspection.summary: the lesson's own numbers, and the definition at work."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from convext.__main__ import main
from convext.inspection import summary
from convext.mnist.model import lesson_cnn


@pytest.fixture(params=["convext", "torch"])
def lesson(request):
    return summary(lesson_cnn(request.param), (1, 1, 28, 28))


def test_the_lessons_example_is_1168_parameters_and_56448_multiplications(lesson):
    (row,) = [r for r in lesson.rows if r.output_shape == (1, 16, 7, 7) and r.type == "Conv2d"]
    assert (row.weights, row.biases, row.parameters) == (1152, 16, 1168)
    assert row.multiplications == 7 * 7 * 1152 == 56_448


def test_rows_follow_the_calls_and_halve_the_grid(lesson):
    convolutions = [r for r in lesson.rows if r.type == "Conv2d"]
    assert [r.name for r in convolutions] == [f"conv{n}" for n in range(1, 6)]
    assert [r.output_shape[1:] for r in convolutions] == [
        (8, 14, 14),
        (16, 7, 7),
        (32, 4, 4),
        (64, 2, 2),
        (10, 1, 1),
    ]
    assert lesson.rows[-1].output_shape == (1, 10)


def test_totals(lesson):
    assert lesson.parameters == 30_522
    assert lesson.parameters == sum(p.numel() for p in lesson_cnn("torch").parameters())
    assert lesson.multiplications == sum(r.multiplications for r in lesson.rows)


@pytest.mark.parametrize(
    ("layer", "size", "parameters", "multiplications"),
    [
        (nn.Conv2d(6, 4, (3, 2), groups=2, bias=False), (5, 6, 9, 9), 72, 7 * 8 * 72),
        (nn.Conv2d(3, 3, 3, groups=3), (1, 3, 5, 5), 30, 9 * 27),
        (nn.Conv2d(2, 3, 3), (2, 5, 5), 57, 9 * 54),  # unbatched
        (nn.ConvTranspose2d(2, 3, 2, stride=2, bias=False), (1, 2, 4, 4), 24, 16 * 24),
        (nn.Conv1d(2, 3, 3), (4, 2, 8), 21, 6 * 18),
        (nn.Linear(6, 5), (2, 7, 6), 35, 7 * 30),
        (nn.BatchNorm2d(4), (2, 4, 3, 3), 8, 36),
        (nn.BatchNorm2d(4, affine=False), (2, 4, 3, 3), 0, 0),
        (nn.MaxPool2d(2), (2, 4, 6, 6), 0, 0),
    ],
)
def test_one_multiplication_per_use_of_a_weight_at_an_output_position(
    layer, size, parameters, multiplications
):
    (row,) = summary(layer, size).rows
    assert (row.parameters, row.multiplications) == (parameters, multiplications)
    assert row.parameters == row.weights + row.biases


class Residual(nn.Module):
    """Two paths, one of them depthwise, a transposed convolution, and linear layers."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=1, dilation=(1, 2))
        self.norm = nn.BatchNorm2d(4)
        self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False)
        self.up = nn.ConvTranspose2d(4, 2, 3, stride=2, bias=False)
        self.dense = nn.Linear(11, 5)  # at each row of each channel
        self.head = nn.Linear(2 * 11 * 5, 3)

    def forward(self, x):
        x = self.norm(self.conv(x)).relu()
        return self.head(self.dense(self.up(x + self.depthwise(x))).flatten(1))


NETWORKS = {
    "lesson": (lesson_cnn, (3, 1, 28, 28)),
    "stock": (lambda: lesson_cnn("torch"), (3, 1, 28, 28)),
    "residual": (Residual, (2, 3, 9, 5)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, padding=1), (5, 4, 6, 7)),
    "linear": (lambda: nn.Linear(6, 5), (2, 7, 6)),
}


@pytest.mark.parametrize("network", NETWORKS)
def test_multiply_adds_are_half_of_what_flop_counter_mode_counts(network):
    make, size = NETWORKS[network]
    model = make().eval()
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(size))
    assert 2 * size[0] * summary(model, size).multiply_adds == counter.get_total_flops()


@pytest.mark.parametrize("network", NETWORKS)
def test_torchinfo_agrees_but_for_what_it_counts_otherwise(network):
    import torchinfo

    make, size = NETWORKS[network]
    model = make().eval()
    ours, theirs = summary(model, size), torchinfo.summary(model, size, verbose=0)
    assert ours.parameters == theirs.total_params
    assert ours.parameter_bytes == theirs.total_param_bytes
    expected = 0
    for row, module in zip(ours.rows, _leaves(model, ours), strict=True):
        positions = torch.Size(row.output_shape[2:]).numel()
        if isinstance(module, nn.ConvTranspose2d):
            expected += positions * row.parameters
        elif isinstance(module, nn.Conv2d):
            expected += row.multiply_adds + positions * row.biases
        else:
            expected += row.parameters
    assert size[0] * expected == theirs.total_mult_adds
    # It leaves out what has no parameters, and counts outputs twice, for their gradients.
    outputs = sum(row.output_bytes for row in ours.rows if row.parameters)
    assert 2 * outputs == theirs.total_output_bytes


def _leaves(model, found):
    modules = dict(model.named_modules())
    return [modules.get(row.name, model) for row in found.rows]


def test_flop_counter_mode_counts_products_of_activations_besides():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.project = nn.Linear(6, 6, bias=False)

        def forward(self, x):
            x = self.project(x)
            return (x @ x.transpose(1, 2)).softmax(-1) @ x

    with FlopCounterMode(display=False) as counter:
        Attention()(torch.zeros(1, 5, 6))
    ours = summary(Attention(), (1, 5, 6)).multiply_adds
    assert ours == 5 * 36
    assert counter.get_total_flops() == 2 * (ours + 2 * 5 * 5 * 6)


def test_normalisations_multiply_and_sum_nothing():
    found = summary(nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)), (1, 1, 3, 4))
    assert [(r.multiplications, r.multiply_adds) for r in found.rows] == [(24, 24), (24, 0)]
    assert (found.multiplications, found.multiply_adds) == (48, 24)


@pytest.mark.parametrize(
    ("dtype", "bytes_each"), [(torch.float64, 8), (torch.float32, 4), (torch.bfloat16, 2)]
)
def test_memory_is_of_the_batch_and_dtype_given(dtype, bytes_each):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 5 * 4, 2))
    found = summary(model.to(dtype), (3, 1, 7, 6))
    assert [row.output_bytes for row in found.rows] == [
        bytes_each * 3 * numbers for numbers in (80, 80, 80, 2)
    ]
    assert found.output_bytes == bytes_each * 3 * 242
    assert found.largest_output_bytes == bytes_each * 3 * 80
    assert found.parameter_bytes == bytes_each * (36 + 4 + 160 + 2)
    assert found.rows[0].parameter_bytes == bytes_each * 40


def test_fields_stand_beside_the_layers_they_are_of(lesson):
    fields = {row.name: (row.field, row.jump) for row in lesson.rows}
    assert fields["conv2"] == fields["norm2"] == ((9, 9), (4, 4))
    assert fields["flatten"] == ((65, 65), None)


def test_fields_of_calls_that_share_a_layer_or_do_not_read_the_input():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 3, bias=False)
            self.scale = nn.Linear(1, 1)

        def forward(self, x):
            scale = self.scale(torch.ones(1, 1))  # of a constant
            return self.conv(self.conv(x)) * self.scale(x.mean((2, 3))) * scale

    rows = summary(Shared(), (1, 1, 9, 7)).rows
    assert [(row.name, row.field) for row in rows] == [
        ("scale", None),  # which of its two calls reads the image is not told apart
        ("conv", (3, 3)),
        ("conv", (5, 5)),
        ("scale", None),
    ]


def test_there_is_no_field_where_arithmetic_has_no_answer_or_there_is_no_image():
    class Overwriting(nn.Module):
        def forward(self, x):
            y = x + 1
            y.view(-1).relu_()
            return y * 2

    for model, size in ((nn.Linear(3, 2), (4, 3)), (Overwriting(), (1, 1, 2, 3))):
        assert [row.field for row in summary(model, size).rows] == [None]


def test_multiplications_are_those_of_the_plain_loop():
    layer = nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2))
    output = layer(torch.zeros(1, 2, 7, 6))
    count = 0
    for _ in range(output[0].numel()):  # each output number ...
        count += 2 * 3 * 2  # ... is a sum over input channels and kernel cells
    assert summary(layer, (1, 2, 7, 6)).multiplications == count


def test_a_layer_called_twice_is_counted_once_and_computed_twice():
    conv = nn.Conv2d(4, 4, 1)
    first, second = summary(nn.Sequential(conv, nn.ReLU(), conv), (1, 4, 3, 3)).rows[::2]
    assert (first.parameters, second.parameters) == (20, 0)
    assert first.multiplications == second.multiplications == 9 * 16


def test_the_model_is_left_as_it_was():
    model = lesson_cnn("torch")
    model.norm2.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    summary(model, (3, 1, 28, 28))
    assert model.training
    assert not model.norm2.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_hooks_are_removed_when_the_model_fails():
    model = lesson_cnn("torch")
    with pytest.raises(RuntimeError):
        summary(model, (1, 3, 28, 28))
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("size", [(), (0, 1, 28, 28), (1, -1)])
def test_bad_input_size(size):
    with pytest.raises(ValueError, match="input_size"):
        summary(lesson_cnn("torch"), size)


def test_plain_text_and_rich_show_the_same_numbers(lesson):
    from rich.console import Console

    text = str(lesson)
    console = Console(width=120)
    with console.capture() as capture:
        console.print(lesson)
    for shown in (text, capture.get()):
        assert "56,448" in shown
        assert "1,168" in shown
        assert "30,522" in shown
        assert "1 x 16 x 7 x 7" in shown
        assert "33 x 33" in shown
    assert max(map(len, text.splitlines())) <= 100


def test_the_wide_table_adds_multiply_adds_memory_and_jumps(lesson):
    header, total = (str(lesson.table(wide=True)).splitlines()[i] for i in (2, -1))
    for name in ("multiplications", "multiply-adds", "parameter bytes", "output bytes", "jump"):
        assert name in header
    for count in (lesson.multiply_adds, lesson.parameter_bytes, lesson.output_bytes):
        assert f"{count:,}" in total


def test_without_room_for_a_table_rich_shows_the_plain_lines(lesson):
    from rich.console import Console

    console = Console(width=50)
    with console.capture() as capture:
        console.print(lesson, soft_wrap=True)
    assert capture.get().strip() == str(lesson).strip()


@pytest.mark.parametrize("wide", [False, True])
def test_the_command(capsys, wide):
    assert main(["summary", *(["--wide"] if wide else [])]) == 0
    out = capsys.readouterr().out
    assert "1,152      16       1,168           56,448" in out
    assert ("multiply-adds" in out) == wide


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--input-size", "1x1"], "--input-size 1x1: "),
        (["--input-size", "many"], "--input-size: must be sizes like 1x28x28, got 'many'"),
        (["--input-size", "1x3x28x28"], "to have 1 channels, but got 3 channels instead"),
        (["nothing:here"], "MODEL nothing:here: No module named 'nothing'"),
    ],
    ids=["axes", "numbers", "channels", "model"],
)
def test_a_mistake_is_one_line_and_status_2(capsys, args, message):
    try:
        status = main(["summary", *args])
    except SystemExit as stop:
        status = stop.code
    err = capsys.readouterr().err
    assert status == 2
    assert message in err
    assert err.count("\n") == 1
