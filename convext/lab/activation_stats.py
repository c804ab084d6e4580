"""Statistics of each layer's activations, batch after batch: what shows that training goes bad."""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from convext.conv_block import ConvBlock2d
from convext.lab import activation_row
from convext.lab.activation_row import BINS, NEVER_NEGATIVE
from convext.mnist.run_folder import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Modules whose output is an activation in the lesson's sense: what the next layer reads.
_ACTIVATIONS = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU),
    *(nn.SiLU, nn.Mish, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.Tanh),
    *(nn.Softplus, nn.Softsign, nn.Threshold, ConvBlock2d),
)


@dataclass(frozen=True)
class LayerStats:
    """What one layer put out, a number for each batch that was looked at.

    Where the layer was not called in a batch, NaN stands.

    Attributes:
        batches: the number of each batch, from 0.
        mean, std: of all numbers in the batch; std with n - 1, as torch's and fastai's.
        near_zero: the share of them, 0 to 1, with |x| at most the threshold.
        histograms: (batches, bins) counts, or None.
        edges: the bins' edges, bins + 1 of them, or None. The last bin has both of its edges.
        sampled: how many numbers each histogram looked at, or None. Those outside the edges it
            looked at, too, but counted in no bin.
    """

    batches: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    near_zero: np.ndarray
    histograms: np.ndarray | None
    edges: np.ndarray | None
    sampled: np.ndarray | None


class ActivationStats:
    """Collects statistics of layers' outputs while a model trains.

    Within a `with` block, or between `attach` and `detach`, each forward pass of the model in
    training mode is one batch:

        with ActivationStats(model) as stats:
            train()
        stats.layer("relu1").near_zero
        stats.color_dim("relu1")

    A layer that is called several times in a batch has the statistics of all its outputs together.

    Memory is bounded: when `capacity` batches are held every second one is dropped, and from then
    on only every second one is looked at, and so on. The batches kept are always those whose
    number is a multiple of `stride`.

    Args:
        model: any module that runs eagerly, not one that torch.compile made. (None is for
            `load`: numbers without a model.)
        layers: names, as in `model.named_modules()`, or modules. By default each activation
            function (nn.ReLU and its like), or where the model has no such module each module
            with parameters of its own. The last layer's scores are left out: they are no
            activations. A `ConvBlock2d` computes its ReLU within its one operation, so that only
            what the block puts out can be seen: the activation where its order is
            "conv-norm-relu", else the activation after batch norm. `convext.unfuse` makes the
            ReLU a module again.
        near_zero: the threshold. fastai's ActivationStats counts x <= 0.05, and with it all
            negative numbers; here it is |x| <= 0.05. After a ReLU the two are the same; fastai
            looks at layers with parameters, before the ReLU.
        histograms: whether to count bins, which takes as long as all else.
        bins, range: of the histograms. Numbers outside are in no bin, as in `torch.histc`.
        every: looks at every so many batches, from the first.
        sample: of an output with more numbers, about so many are looked at, those of every second
            image, or third, ... A histogram looks at a fourth of them, evenly strided. None looks
            at all, also in histograms, and takes several times as long.
        capacity: batches held, at least 2.

    Attributes:
        layers: the names.
        batches: how many the model was given in training mode.
        stride: the distance of those that are looked at now.

    Raises:
        ValueError: a layer that is not in the model, or a number out of its range.
    """

    def __init__(
        self,
        model: nn.Module | None,
        layers: Sequence[str | nn.Module] | None = None,
        *,
        near_zero: float = 0.05,
        histograms: bool = True,
        bins: int = 40,
        range: tuple[float, float] = (0.0, 10.0),
        every: int = 1,
        sample: int | None = 65_536,
        capacity: int = 2_000,
    ) -> None:
        if not near_zero >= 0:
            raise ValueError(f"near_zero must be at least 0, got {near_zero}")
        if bins < 1:
            raise ValueError(f"bins must be at least 1, got {bins}")
        if len(range) != 2 or not -math.inf < range[0] < range[1] < math.inf:
            raise ValueError(f"range must be two finite numbers that rise, got {range}")
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        if sample is not None and sample < 1:
            raise ValueError(f"sample must be at least 1 or None, got {sample}")
        if capacity < 2:
            raise ValueError(f"capacity must be at least 2, got {capacity}")
        self.layers = tuple(layers or ()) if model is None else _chosen(model, layers)
        self.near_zero = near_zero
        self.bins = bins if histograms else 0
        self.range = (float(range[0]), float(range[1]))
        self.sample = sample
        self.capacity = capacity
        self.stride = every
        self.batches = 0
        self._model = model
        # Of the batches held: their numbers, and of each layer that was called its row.
        self._numbers: list[int] = []
        self._rows: list[dict[str, Tensor]] = []
        self._looking = False  # whether a batch is under way that is looked at
        self._waiting: list[tuple[str, np.ndarray | Tensor, bool]] = []  # to be measured
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    # ---- collecting ----

    def attach(self) -> ActivationStats:
        """Begins to collect, by forward hooks; `with` does the same.

        Raises:
            ValueError: there is no model, since these numbers come from a file.
        """
        if self._model is None:
            raise ValueError("statistics that were loaded from a file have no model to attach to")
        if not self._hooks:
            modules = dict(self._model.named_modules(remove_duplicate=False))
            self._hooks = [self._model.register_forward_pre_hook(self._begin)]
            for name in self.layers:
                hook = _LayerHook(self, name, isinstance(modules[name], NEVER_NEGATIVE))
                self._hooks.append(modules[name].register_forward_hook(hook))
            self._hooks.append(self._model.register_forward_hook(self._end))
        return self

    def detach(self) -> None:
        """Removes the hooks; what was collected stays."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._looking = False

    def __enter__(self) -> ActivationStats:
        return self.attach()

    def __exit__(self, *_: object) -> None:
        self.detach()

    def _begin(self, module: nn.Module, _: object) -> None:
        self._looking, self._waiting = False, []
        if not module.training:
            return
        number, self.batches = self.batches, self.batches + 1
        if number % self.stride == 0 and len(self._numbers) == self.capacity:
            self._numbers, self._rows = self._numbers[::2], self._rows[::2]
            self.stride *= 2
        if number % self.stride == 0:
            self._looking = True
            self._numbers.append(number)
            self._rows.append({})

    def _end(self, *_: object) -> None:
        self._measure()
        # What calls a layer afterwards, as activation checkpointing does, is no batch.
        self._looking = False

    def _note(self, name: str, output: Tensor, never_negative: bool) -> None:
        numbers = activation_row.taken(output, self.sample)
        self._waiting.append((name, numbers, never_negative))
        if self.sample is None or isinstance(numbers, Tensor):
            self._measure()  # before another layer can write into it

    def _measure(self) -> None:
        """Measures what waits.

        All layers one after another, when the model is done: half of the time, since the model
        has Python's own data out of the cache between them.
        """
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        rows = self._rows[-1]
        with np.errstate(all="ignore"):  # of a training that diverged
            for name, numbers, never_negative in waiting:
                row = activation_row.measure(
                    numbers, self.near_zero, self.bins, self.range, self.sample, never_negative
                )
                rows[name] = activation_row.joined(rows[name], row) if name in rows else row

    # ---- what was collected ----

    def layer(self, layer: str | int) -> LayerStats:
        """One layer's statistics, by its name or its place in `layers`.

        Raises:
            ValueError: there is no such layer.
        """
        table = self._table(self._name(layer)).numpy()
        count, mean, deviations, near, sampled = table[:, :BINS].T
        with np.errstate(invalid="ignore", divide="ignore"):
            std = np.sqrt(deviations / np.where(count > 0, count - 1, np.nan))
            share = near / count
        return LayerStats(
            batches=np.array(self._numbers, dtype=np.int64),
            mean=mean,
            std=std,
            near_zero=share,
            histograms=table[:, BINS:] if self.bins else None,
            edges=np.linspace(*self.range, self.bins + 1) if self.bins else None,
            sampled=sampled if self.bins else None,
        )

    def plot_layer_stats(self, layer: str | int) -> Figure:
        """Mean, standard deviation and share near zero of one layer, over batches."""
        from convext.lab.charts import plot_layer_stats

        name = self._name(layer)
        return plot_layer_stats(name, self.layer(name), self.near_zero)

    def color_dim(self, layer: str | int) -> Figure:
        """One layer's histograms side by side: batches across, activation up, log share as colour.

        Stefano Giomo's colorful dimension, as in fastai.

        Raises:
            ValueError: no histograms were collected.
        """
        from convext.lab.charts import color_dim

        name = self._name(layer)
        return color_dim(name, self.layer(name))

    def _name(self, layer: str | int) -> str:
        if isinstance(layer, int) and -len(self.layers) <= layer < len(self.layers):
            return self.layers[layer]
        if layer not in self.layers:
            raise ValueError(f"layer must be one of {', '.join(self.layers)}, got {layer!r}")
        return layer

    def _table(self, name: str) -> Tensor:
        """A layer's rows on the CPU, brought there all at once: (batches held, row's length)."""
        held = [place for place, rows in enumerate(self._rows) if name in rows]
        away = [place for place in held if self._rows[place][name].device.type != "cpu"]
        if away:
            came = torch.stack([self._rows[place][name] for place in away]).cpu()
            for place, row in zip(away, came, strict=True):
                self._rows[place][name] = row
        table = torch.full((len(self._rows), BINS + self.bins), torch.nan, dtype=torch.float64)
        if held:
            table[held] = torch.stack([self._rows[place][name] for place in held])
        return table

    # ---- keeping it ----

    def state_dict(self) -> dict[str, object]:
        """What was collected, as tensors and numbers; a checkpoint holds it."""
        return {
            "batches": self.batches,
            "stride": self.stride,
            "numbers": torch.tensor(self._numbers, dtype=torch.int64),
            "rows": {name: self._table(name) for name in self.layers},
        }

    def load_state_dict(self, state: dict) -> None:
        """Goes on where `state_dict` was taken.

        Raises:
            ValueError: the state is of other layers or of another number of bins.
        """
        if tuple(state["rows"]) != self.layers:
            raise ValueError(
                f"state must be of the layers {', '.join(self.layers)}, "
                f"got {', '.join(state['rows'])}"
            )
        for table in state["rows"].values():
            if table.shape[1] != BINS + self.bins:
                raise ValueError(f"state must have {self.bins} bins, got {table.shape[1] - BINS}")
        self.batches, self.stride = state["batches"], state["stride"]
        self._numbers = state["numbers"].tolist()
        self._looking = False
        self._rows = [{} for _ in self._numbers]
        for name, table in state["rows"].items():
            for rows, row in zip(self._rows, table.clone(), strict=True):
                if not row[activation_row.COUNT].isnan():  # else the layer was not called
                    rows[name] = row

    def save(self, path: str | Path) -> None:
        """Writes what was collected, and how, as NumPy's .npz."""
        state = self.state_dict()
        settings = {"near_zero": self.near_zero, "bins": self.bins, "range": self.range}
        with replacing(Path(path)) as temporary, temporary.open("wb") as file:
            np.savez_compressed(
                file,
                layers=np.array(self.layers),
                numbers=state["numbers"].numpy(),
                counts=np.array([self.batches, self.stride]),
                settings=np.array(json.dumps(settings)),
                **{f"rows/{name}": table.numpy() for name, table in state["rows"].items()},
            )

    @classmethod
    def load(cls, path: str | Path) -> ActivationStats:
        """Reads what `save` wrote, to look at: it belongs to no model.

        Raises:
            OSError, ValueError: the file can't be read, or is none of `save`'s.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                layers = file["layers"].tolist()
                settings = json.loads(str(file["settings"]))
                batches, stride = file["counts"].tolist()
                state = {
                    "batches": batches,
                    "stride": stride,
                    "numbers": torch.from_numpy(file["numbers"]),
                    "rows": {name: torch.from_numpy(file[f"rows/{name}"]) for name in layers},
                }
        except (EOFError, KeyError, ValueError, TypeError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path}: not written by ActivationStats.save") from error
        stats = cls(
            None,
            layers,
            near_zero=settings["near_zero"],
            histograms=settings["bins"] > 0,
            bins=settings["bins"] or 1,
            range=settings["range"],
        )
        stats.load_state_dict(state)
        return stats


@dataclass(frozen=True)
class _LayerHook:
    """Forward hook of one layer; an object, so that a model with hooks can still be pickled."""

    stats: ActivationStats
    name: str
    never_negative: bool

    def __call__(self, module: nn.Module, _: object, output: object) -> None:
        if not self.stats._looking:
            return
        first = output[0] if isinstance(output, (tuple, list)) else output
        if isinstance(first, Tensor):
            self.stats._note(self.name, first, self.never_negative)


def _chosen(model: nn.Module, layers: Sequence[str | nn.Module] | None) -> tuple[str, ...]:
    if layers is None:
        modules = dict(model.named_modules())
        found = [name for name, module in modules.items() if isinstance(module, _ACTIVATIONS)]
        found = found or [n for n, m in modules.items() if list(m.parameters(recurse=False))]
        if not found:
            raise ValueError("model has neither activation functions nor parameters: name layers")
        return tuple(found)
    modules = dict(model.named_modules(remove_duplicate=False))
    names = {module: name for name, module in reversed(modules.items())}
    chosen = tuple(dict.fromkeys(names.get(layer, layer) for layer in layers))
    for layer in chosen:
        if layer not in modules:
            raise ValueError(f"layers must be modules of the model or their names, got {layer!r}")
    return chosen
