"""What several commands take: a model, an image for it, a file to write; and how they show."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convext.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import nn

MODELS = "lesson, example, a run's folder (see convext train) or package.module:name"


def add_model(parser: argparse.ArgumentParser, default: str = "lesson") -> None:
    """MODEL, for `load_model`."""
    parser.add_argument(
        "model",
        nargs="?",
        default=default,
        metavar="MODEL",
        help=f"{MODELS}, a module or what makes one (default: {default})",
    )


def load_model(name: str) -> nn.Module:
    """The model that MODEL names.

    "lesson" is the lesson's CNN and "example" the two convolutions of its spreadsheet, with weights
    that are the same each time; a run's folder holds the lesson's CNN, trained.

    Raises:
        UserError: there is none.
    """
    import torch

    if name in ("lesson", "example"):
        from convext.inspection.example import conv_example
        from convext.mnist.model import lesson_cnn

        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            return (lesson_cnn() if name == "lesson" else conv_example()).eval()
    if Path(name).expanduser().exists():
        from convext.mnist.run_folder import load_trained

        _, model = load_trained(name, option="MODEL")
        return model
    module, separator, attribute = name.partition(":")
    if not separator:
        raise UserError(f"MODEL must be {MODELS}, got {name!r}")
    return _imported(module, attribute)


def _imported(module: str, attribute: str) -> nn.Module:
    from torch import nn

    if "" not in sys.path:
        sys.path.insert(0, "")  # a file in this folder, too
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"MODEL {module}:{attribute}: {error}") from error
    if not isinstance(found, nn.Module):
        if not callable(found):
            raise UserError(f"MODEL {module}:{attribute} must be a module or make one")
        found = found()
    if not isinstance(found, nn.Module):
        raise UserError(
            f"MODEL {module}:{attribute} must make a torch.nn.Module, got {type(found).__name__}"
        )
    return found.eval()


def size(text: str) -> tuple[int, ...]:
    """For `type=`: 1x28x28 or 1,28,28."""
    try:
        sizes = tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"must be sizes like 1x28x28, got {text!r}")
    return sizes


def numbers(text: str) -> tuple[int, ...]:
    """For `type=`: whole numbers of at least 0, as in 3,0,2."""
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 0:
        raise argparse.ArgumentTypeError(f"must be whole numbers like 3,0,2, got {text!r}")
    return found


def add_input_size(parser: argparse.ArgumentParser) -> None:
    """--input-size, (N, C, H, W), for `on_size`."""
    parser.add_argument(
        "--input-size",
        type=size,
        default=(1, 1, 28, 28),
        metavar="NxCxHxW",
        help="of the model's input, such as 1x3x224x224 (default: 1x1x28x28)",
    )


def on_size(run: Callable[[], Any], args: argparse.Namespace) -> Any:
    """What `run` makes of a model and --input-size.

    Raises:
        UserError: they don't fit.
    """
    try:
        return run()
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        sizes = "x".join(map(str, args.input_size))
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"--input-size {sizes}: {reason}") from error


def add_digit(parser: argparse.ArgumentParser) -> None:
    """--digit and --data-dir, for `load_digit`."""
    parser.add_argument(
        "--digit",
        type=int,
        default=0,
        metavar="N",
        help="which validation image of MNIST, or where that can't be had of scikit-learn's "
        "digits (default: 0)",
    )
    parser.add_argument("--data-dir", metavar="DIR", help="where the MNIST files lie")


def add_image(parser: argparse.ArgumentParser) -> None:
    """--digit, --image and --data-dir, for `load_input`."""
    add_digit(parser)
    parser.add_argument("--image", metavar="FILE", help="a picture instead, made grey and 28x28")


def load_digit(args: argparse.Namespace) -> torch.Tensor:
    """The digit that the options of `add_digit` name: (1, 1, 28, 28), float32 in [0, 1].

    Where MNIST can't be had, a line on stderr says so.

    Raises:
        UserError: a number that there is not, or data that can't be had.
    """
    from convext.mnist.data import load_data

    dataset = load_data("auto", args.data_dir)
    if dataset.note:
        print(dataset.note, file=sys.stderr)
    images = dataset.valid.images
    if not 0 <= args.digit < len(images):
        raise UserError(f"--digit must be from 0 to {len(images) - 1}, got {args.digit}")
    return images[args.digit : args.digit + 1]


def load_input(args: argparse.Namespace) -> torch.Tensor:
    """The image that the options of `add_image` name: (1, 1, 28, 28), float32 in [0, 1].

    Raises:
        UserError: a file or a number that there is not.
    """
    if args.image is not None:
        return _grey_picture(args.image, (28, 28))
    return load_digit(args)


def _grey_picture(path: str, size: tuple[int, int]) -> torch.Tensor:
    import numpy as np
    import torch
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(Path(path).expanduser()) as picture:
            grey = np.asarray(picture.convert("L").resize(size[::-1]), dtype=np.float32)
    except UnidentifiedImageError as error:
        raise UserError(f"--image: {path}: not a picture that Pillow can read") from error
    except OSError as error:
        raise UserError(f"--image: {path}: {error.strerror or error}") from error
    return torch.from_numpy(grey / 255)[None, None]


def add_out(parser: argparse.ArgumentParser, what: str = "picture") -> None:
    """--out FILE, for `write`."""
    parser.add_argument("--out", metavar="FILE", help=f"write the {what} here (.png, .svg, .pdf)")


def write(path: str | Path, save: Callable[[Path], object], option: str = "--out") -> None:
    """Has `save` write a file, and says where it is.

    Raises:
        UserError: it can't be written there.
    """
    path = Path(path).expanduser()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save(path)
    except OSError as error:
        raise UserError(f"{option}: {path}: {error.strerror or error}") from error
    except (ValueError, NotImplementedError) as error:  # of a suffix or a model, say
        raise UserError(f"{option}: {path}: {error}") from error
    print(path)


def show(*things: object) -> None:
    """Prints each, by rich where that is installed."""
    try:
        from rich.console import Console
    except ModuleNotFoundError:
        for thing in things:
            print(thing)
        return
    console = Console(markup=False, emoji=False, highlight=False, soft_wrap=True)
    for thing in things:
        console.print(thing if hasattr(thing, "__rich__") else str(thing))


def index_of(indices: Sequence[int] | None, shape: Sequence[int], option: str) -> tuple[int, ...]:
    """A cell's place in a tensor of some shape, by default its middle, first image and channel 0.

    Raises:
        UserError: more or fewer numbers than axes, or one beyond its axis.
    """
    if indices is None:
        return tuple(0 if axis < 2 and len(shape) > 2 else n // 2 for axis, n in enumerate(shape))
    if len(indices) != len(shape) or any(i >= n for i, n in zip(indices, shape, strict=False)):
        ranges = ",".join(f"0-{n - 1}" for n in shape)
        raise UserError(f"{option} must be {ranges}, got {','.join(map(str, indices))}")
    return tuple(indices)
