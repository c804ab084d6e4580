"""`convext lr-find`: which learning rate to train with."""

from __future__ import annotations

import argparse

from convext.commands.arguments import add_out, show, write
from convext.errors import UserError


def add(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "lr-find",
        help="find a learning rate for the lesson's CNN",
        description="Trains the lesson's CNN for some steps with a learning rate that grows from "
        "1e-6 to 10, and suggests a rate: a tenth of where the loss was lowest.",
    )
    add = parser.add_argument
    add("--steps", type=int, default=100, metavar="N", help="at most (default: 100)")
    add("--batch-size", type=int, metavar="N", help="images per step (default: 512; digits: 64)")
    add("--seed", type=int, default=0, metavar="N", help="of weights and images (default: 0)")
    add("--data", choices=("mnist", "digits", "auto"), help="see convext train (default: auto)")
    add("--data-dir", metavar="DIR", help="where the MNIST files lie")
    add("--layers", choices=("convext", "torch"), help="whose layers (default: convext)")
    add("--device", choices=("cpu", "cuda", "auto"), help="see convext train (default: auto)")
    add("--threads", type=int, metavar="N", help="(default: torch's own choice)")
    add_out(parser, "plot")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    if args.steps < 2:
        raise UserError(f"--steps must be at least 2, got {args.steps}")
    finding, batch_size = _find(args)
    show(f"batches of {batch_size}, {finding}")
    if args.out is not None:
        write(args.out, finding.plot().savefig)


def _find(args: argparse.Namespace):
    import torch

    from convext.lab.lr_finder import find_lr
    from convext.mnist.data import load_data
    from convext.mnist.learner import Learner
    from convext.mnist.loader import BatchLoader
    from convext.mnist.settings import Options, check_options, choose_device, make_settings

    names = ("batch_size", "seed", "data", "data_dir", "layers", "device", "threads")
    options = Options(**{name: getattr(args, name) for name in names})
    check_options(options)
    device = choose_device(options.device, options.layers, 1)
    dataset = load_data(options.data or "auto", options.data_dir)
    settings = make_settings(options, dataset, checkpoint=None)
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    learner = Learner(settings.make_model(), settings.lr, total_steps=args.steps).to(device)
    images, labels = dataset.train.images.to(device), dataset.train.labels.to(device)
    batches = BatchLoader(images, labels, settings.batch_size, seed=settings.seed, drop_last=True)
    return find_lr(learner, batches, steps=args.steps), batches.batch_size
