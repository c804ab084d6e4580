"""convext.inspection.summary: the lesson's own numbers, and the definition at work."""

import pytest
import torch
from torch import nn

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
    assert max(map(len, text.splitlines())) <= 100
