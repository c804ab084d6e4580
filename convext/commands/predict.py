"""`convext predict`: a trained run's classes for pictures, and the run for other programs."""

from __future__ import annotations

import argparse
import glob
from pathlib import Path

from convext.commands import arguments
from convext.errors import UserError


def add(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "predict",
        help="classify pictures by a trained run, or export it",
        description="Prints the likeliest classes of each picture with their probabilities. "
        "Pictures are brought to what the run was trained on: its size, grey or coloured; "
        "transparency is left out.",
    )
    add = parser.add_argument
    add("run_folder", metavar="RUN", help="the folder or checkpoint of a run of convext train")
    images = add(
        "images",
        nargs="+",  # "*" would be content with none where an option stands before the first
        default=[],
        metavar="IMAGE",
        help="a picture, or a pattern like 'digits/*.png'; none is needed with --export",
    )
    images.required = False
    add("--top", type=int, default=3, metavar="N", help="how many classes of each (default: 3)")
    add(
        "--invert",
        action="store_true",
        help="take the negative of each: MNIST's digits are white on black",
    )
    add(
        "--activations",
        metavar="FILE",
        help="draw what the layers make of the picture here (.png, .svg, .pdf)",
    )
    add(
        "--export",
        metavar="DIR",
        help="write the network with stock layers here, as a torch.export program (model.pt2) and "
        "as ONNX (model.onnx)",
    )
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    from convext.mnist.run_folder import load_trained

    if not args.images and args.export is None:
        raise UserError("IMAGE: name at least one picture, or --export DIR")
    if args.top < 1:
        raise UserError(f"--top must be at least 1, got {args.top}")
    paths = [path for image in args.images for path in _files(image)]
    if args.activations is not None and len(paths) != 1:
        raise UserError(f"--activations draws one picture, got {len(paths)}")
    settings, model = load_trained(args.run_folder, option="RUN")
    if paths:
        _predict(args, settings, model, paths)
    if args.export is not None:
        _export(args.export, settings, model)


def _files(image: str) -> list[str]:
    """A file, or those that a pattern fits, for a shell that leaves patterns to the program."""
    path = str(Path(image).expanduser())
    if Path(path).exists() or not glob.has_magic(path):
        return [path]
    found = sorted(glob.glob(path, recursive=True))
    if not found:
        raise UserError(f"IMAGE: {image}: no file fits this pattern")
    return found


def _predict(args: argparse.Namespace, settings, model, paths: list[str]) -> None:
    from convext.lab.predict import predict

    predictions = predict(model, settings, paths, invert=args.invert, shown=args.top)
    print(predictions)
    if args.activations is not None:
        from convext.inspection.show import show_activations

        figure = show_activations(model, predictions.images).plot()
        arguments.write(args.activations, figure.savefig, "--activations")


def _export(folder: str, settings, model) -> None:
    from convext.lab.export import export

    size = (3 if settings.colour else 1, *settings.image_size)
    try:
        print(export(model, size, settings.classes, folder))
    except OSError as error:
        raise UserError(f"--export: {folder}: {error.strerror or error}") from error
    except RuntimeError as error:
        raise UserError(f"--export: {error}") from error
