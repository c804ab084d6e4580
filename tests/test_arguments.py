"""What several commands take: models by name, digits, sizes; and how they show and write."""

import argparse
from pathlib import Path

import pytest
import torch
from torch import nn

from convext.commands import arguments
from convext.errors import UserError
from convext.mnist import data


class Net(nn.Module):
    """What the tests' MODEL names."""


instance = Net()
number = 3


@pytest.mark.parametrize("name", ["lesson", "example"])
def test_named_models_are_the_same_each_time_and_leave_the_generator_alone(name):
    state = torch.get_rng_state()
    models = [arguments.load_model(name) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), state)
    assert not models[0].training
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(one, other)


def test_a_models_class_or_the_model_itself(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent)
    assert type(arguments.load_model("test_arguments:Net")).__name__ == "Net"
    assert type(arguments.load_model("test_arguments:instance")).__name__ == "Net"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lessen", "MODEL must be lesson, example, a run's folder .*, got 'lessen'"),
        ("no.such:thing", "MODEL no.such:thing: No module named 'no'"),
        ("torch.nn:Conv7d", "MODEL torch.nn:Conv7d: .*has no attribute 'Conv7d'"),
        ("test_arguments:number", "must be a module or make one"),
        ("builtins:dict", "must make a torch.nn.Module, got dict"),
        (str(Path(__file__).parent), "MODEL: .*last.ckpt: no such checkpoint"),
    ],
    ids=["name", "module", "attribute", "number", "dict", "folder"],
)
def test_a_model_that_is_not_there(monkeypatch, name, message):
    monkeypatch.syspath_prepend(Path(__file__).parent)
    with pytest.raises(UserError, match=message):
        arguments.load_model(name)


def test_a_digit_says_where_it_comes_from_if_that_is_not_mnist(monkeypatch, capsys):
    split = data.Split(torch.rand(2, 1, 28, 28), torch.tensor([0, 1]))
    fallen = data.Dataset("digits", split, split, "here", note="Falling back to digits")
    monkeypatch.setattr(data, "load_data", lambda name, folder: fallen)
    args = argparse.Namespace(digit=1, data_dir=None)
    assert torch.equal(arguments.load_digit(args), split.images[1:])
    assert capsys.readouterr().err == "Falling back to digits\n"
    with pytest.raises(UserError, match="--digit must be from 0 to 1, got 2"):
        arguments.load_digit(argparse.Namespace(digit=2, data_dir=None))


def test_sizes_and_numbers():
    assert arguments.size("1x28x20") == arguments.size("1,28,20") == (1, 28, 20)
    assert arguments.numbers("3,0,2") == (3, 0, 2)
    for parse, text in ((arguments.size, "3x0"), (arguments.size, "a"), (arguments.numbers, "-1")):
        with pytest.raises(argparse.ArgumentTypeError, match=r"must be .* got"):
            parse(text)


def test_index_of_is_a_cell_or_says_what_cells_there_are():
    assert arguments.index_of(None, (1, 8, 14, 13), "--index") == (0, 0, 7, 6)
    assert arguments.index_of((0, 7, 13, 12), (1, 8, 14, 13), "--index") == (0, 7, 13, 12)
    for index in ((0, 8, 0, 0), (0, 0)):
        with pytest.raises(UserError, match=r"--index must be 0-0,0-7,0-13,0-12, got 0,"):
            arguments.index_of(index, (1, 8, 14, 13), "--index")


@pytest.mark.parametrize("error", [OSError, ValueError, NotImplementedError])
def test_what_cannot_be_written_is_one_line(tmp_path, error):
    def save(path):
        raise error("reason")

    with pytest.raises(UserError, match=r"--out: .*x\.png: reason"):
        arguments.write(tmp_path / "x.png", save)


def test_show_prints_a_table_where_there_is_one_and_text_where_not(capsys, monkeypatch):
    class Text:
        def __str__(self):
            return "text"

    class Table(Text):
        def __rich__(self):
            return "table"

    arguments.show(Text(), Table())
    assert capsys.readouterr().out == "text\ntable\n"
    monkeypatch.setitem(__import__("sys").modules, "rich.console", None)
    arguments.show(Text(), Table())
    assert capsys.readouterr().out == "text\ntext\n"
