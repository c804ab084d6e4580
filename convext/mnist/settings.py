"""What a run is to do: the options of a user, and the settings that come of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

import convext
from convext.algorithms import build_info
from convext.errors import UserError
from convext.mnist.data import DIGITS, NAMES, Dataset, load_data
from convext.mnist.model import LARGEST_SIZE, lesson_cnn

# Digits are forty times fewer than MNIST: in one epoch of batches of 512 they would make two
# steps. So the book's setting is the default for MNIST only.
DEFAULTS = {
    "mnist": {"epochs": 1, "batch_size": 512, "lr": 0.06},
    "digits": {"epochs": 10, "batch_size": 64, "lr": 0.06},
}
FOLDER_STEPS = 16  # of an epoch, at least, where this leaves 8 pictures or more to a batch

SAVE_EVERY = 2.0  # seconds; a checkpoint takes some 10 ms

# What may be other than in the run that is resumed.
FREE = {"epochs", "device", "devices", "threads", "save_every", "data_dir"}


@dataclass(frozen=True)
class Options:
    """What a user may choose; None leaves it to the default, or on resuming to the run.

    data: "mnist", "digits", "auto" or a folder of pictures; data_dir: where the MNIST files lie;
    image_size, colour: of the pictures, (H, W) and whether they have three channels; augment:
    whether each training image is moved a little at random; layers: "convext" or "torch";
    algorithm: for convext's convolutions; device: "cpu", "cuda" or "auto"; devices: processes,
    which share every batch; batch_size, threads: of all processes together; out: the run's folder;
    resume: a run's folder or checkpoint to go on from; stats: of activations, "off", "numbers" or
    "histograms"; report: whether to write report.html at the end; save_every: seconds from one
    checkpoint to the next within an epoch. The others say themselves what they are.
    """

    epochs: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    seed: int | None = None
    data: str | None = None
    data_dir: str | Path | None = None
    layers: str | None = None
    algorithm: str | None = None
    device: str | None = None
    devices: int | None = None
    threads: int | None = None
    out: str | Path | None = None
    resume: str | Path | None = None
    stats: str | None = None
    report: bool = True
    image_size: tuple[int, int] | None = None
    colour: bool | None = None
    augment: bool | None = None
    save_every: float | None = None


@dataclass(frozen=True)
class Settings:
    """What a run is: everything that its result depends on. Kept in its checkpoint.

    classes: their names, in the order of the scores; content: see `Dataset`; normalize: mean and
    std of each channel of the training images.
    """

    epochs: int
    batch_size: int
    lr: float
    seed: int
    data: str
    layers: str
    algorithm: str
    threads: int
    devices: int = 1  # checkpoints of before there were several have none
    device: str = "cpu"  # likewise
    stats: str = "off"  # likewise
    image_size: tuple[int, int] = (28, 28)  # likewise, and what follows
    colour: bool = False
    classes: tuple[str, ...] = DIGITS
    content: str | None = None
    augment: bool = False
    save_every: float = math.inf  # likewise
    data_dir: str | None = None  # likewise
    normalize: tuple[tuple[float, ...], tuple[float, ...]] | None = None  # likewise

    def make_model(self) -> nn.Sequential:
        """The network that the run trains, initialised from torch's global generator."""
        return lesson_cnn(
            self.layers,
            self.algorithm,
            in_channels=3 if self.colour else 1,
            classes=len(self.classes),
            normalize=self.normalize,
        )


def check_options(options: Options) -> None:
    """Looks at every number, so that a mistake costs no waiting."""
    wanted = {
        "epochs": (lambda n: n >= 1, "at least 1"),
        "batch_size": (lambda n: n >= 2, "at least 2 (batch norm needs more than one image)"),
        "lr": (lambda rate: 0 < rate < math.inf, "above 0 and finite"),
        "seed": (lambda n: 0 <= n < 2**63, "from 0 to 2**63 - 1"),
        "devices": (lambda n: 1 <= n <= 1024, "from 1 to 1024"),
        "threads": (lambda n: 1 <= n <= 1024, "from 1 to 1024"),
        "image_size": (
            lambda size: min(size) >= 1 and max(size) <= LARGEST_SIZE,
            f"from 1 to {LARGEST_SIZE} high and wide (which the network halves five times, to 1)",
        ),
        "save_every": (lambda seconds: seconds >= 0, "0 or more"),
    }
    for name, (good, want) in wanted.items():
        value = getattr(options, name)
        if value is not None and not good(value):
            raise UserError(f"--{name.replace('_', '-')} must be {want}, got {_text(value)}")
    if options.batch_size is not None:
        _check_split(options.batch_size, options.devices or 1)
    if options.layers == "torch" and options.algorithm not in (None, "auto"):
        raise UserError(f"--algorithm {options.algorithm} needs --layers convext")
    if options.algorithm is not None and options.layers != "torch":
        names = ("auto", *convext.algorithms(options.device))
        if options.algorithm not in names:
            raise UserError(
                f"--algorithm must be one of {', '.join(names)}, got {options.algorithm}"
            )


def choose_device(wish: str | None, layers: str | None, processes_here: int) -> str:
    """Where to train: on "cuda" where all that it takes is there, unless "cpu" is wished for.

    Raises:
        UserError: "cuda" is wished for, and cannot be had.
    """
    obstacle = None
    if not torch.cuda.is_available():
        obstacle = "torch finds no GPU"
    elif build_info()["cuda"] is None and not (layers == "torch" and wish == "cuda"):
        obstacle = "this build of convext has no CUDA kernels"
    elif processes_here > torch.cuda.device_count():
        obstacle = f"{count(processes_here, 'process')} for {torch.cuda.device_count()} GPUs"
    if wish == "cuda" and obstacle:
        raise UserError(f"--device cuda: {obstacle}")
    return "cpu" if wish == "cpu" or obstacle else "cuda"


def _check_split(batch_size: int, devices: int) -> None:
    # Else the images of a smaller part would count more than the others.
    if batch_size % devices:
        raise UserError(
            f"--batch-size must be a multiple of the number of processes, {devices}, "
            f"got {batch_size}"
        )


def read_data(options: Options, checkpoint: dict | None) -> Dataset:
    """The data set of a new run, or that of the run to resume: its folder may have moved."""
    if checkpoint is None:
        return load_data(
            options.data or "auto",
            options.data_dir,
            image_size=options.image_size,
            colour=options.colour,
        )
    run = Settings(**checkpoint["convext"])
    if run.content is None:
        return load_data(run.data, options.data_dir or run.data_dir)
    folder = run.data if options.data in (None, *NAMES) else options.data
    dataset = load_data(folder, image_size=run.image_size, colour=run.colour)
    if dataset.content != run.content:
        raise UserError(
            f"--resume: {dataset.name}: its pictures are not those that the run began with"
        )
    return dataset


def make_settings(options: Options, dataset: Dataset, checkpoint: dict | None) -> Settings:
    chosen = {
        name: value
        for name, value in vars(options).items()
        if name in Settings.__dataclass_fields__ and value is not None
    }
    chosen["data"] = dataset.name
    if options.data_dir is not None:
        chosen["data_dir"] = str(Path(options.data_dir).expanduser().absolute())
    if checkpoint is None:
        channels, *size = dataset.train.images.shape[1:]
        chosen |= {"image_size": tuple(size), "colour": channels == 3}
        chosen |= {"classes": dataset.classes, "content": dataset.content}
        chosen["normalize"] = dataset.train.statistics()
        rest = {"seed": 0, "layers": "convext", "algorithm": "auto", "stats": "histograms"}
        rest["threads"] = torch.get_num_threads()
        rest["save_every"] = SAVE_EVERY
        defaults = DEFAULTS.get(dataset.name) or _folder_defaults(len(dataset.train))
        settings = Settings(**{**rest, **defaults, **chosen})
        _check_split(settings.batch_size, settings.devices)
        return settings

    run = Settings(**checkpoint["convext"])
    free = set(FREE)
    if options.data in NAMES or run.content is None:
        if options.data not in (None, "auto"):
            chosen["data"] = options.data
    else:
        free.add("data")  # a folder, which read_data found to hold the same
    for name, value in chosen.items():
        if name not in free and value != getattr(run, name):
            option, own = name.replace("_", "-"), _text(getattr(run, name))
            raise UserError(f"--{option} {_text(value)}: the run to resume has {own}")
    settings = replace(run, **chosen)
    _check_split(settings.batch_size, settings.devices)
    done, under_way = len(checkpoint["history"]), checkpoint.get("epoch_under_way")
    if settings.epochs < done:
        raise UserError(f"--epochs {settings.epochs}: the run to resume has trained {done} already")
    if settings.epochs == done and under_way and under_way["batches"]:
        raise UserError(f"--epochs {done}: the run to resume is in epoch {done + 1} already")
    return settings


def _folder_defaults(pictures: int) -> dict[str, float]:
    """As digits have them; smaller batches of few pictures, a power of two of them."""
    few = 2 ** (pictures // FOLDER_STEPS).bit_length() // 2
    return {**DEFAULTS["digits"], "batch_size": min(64, max(8, few))}


def _text(value: object) -> str:
    """Of an option, as one gives it."""
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


def count(number: int, noun: str) -> str:
    plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{number} {noun if number == 1 else plural}"
