"""Statistics of each layer's activations, batch after batch: what shows that training goes bad."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from convext.mnist.run_folder import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Modules whose output is an activation in the lesson's sense: what the next layer reads.
_ACTIVATIONS = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU),
    *(nn.Mish, nn.Hardtanh, nn.Hardswish, nn.Sigmoid, nn.Tanh, nn.Softplus),
)


@dataclass(frozen=True)
class LayerStats:
    """What one layer put out, a number for each batch that was looked at.

    Attributes:
        batches: the number of each batch, from 0.
        mean, std: of all numbers in the batch; std with n - 1, as torch's and fastai's.
        near_zero: the share of them, 0 to 1, with |x| at most the threshold.
        histograms: (batches, bins) counts, or None.
        edges: the bins' edges, bins + 1 of them, or None.
    """

    batches: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    near_zero: np.ndarray
    histograms: np.ndarray | None
    edges: np.ndarray | None


class ActivationStats:
    """Collects statistics of layers' outputs while a model trains.

    Within a `with` block, or between `attach` and `detach`, each forward pass in training mode is
    one batch:

        with ActivationStats(model) as stats:
            train()
        stats.layer("relu1").near_zero
        stats.color_dim("relu1")

    Memory is bounded: when `capacity` batches are held every second one is dropped, and from then
    on only every second one is looked at, and so on. The batches kept are always those whose
    number is a multiple of `stride`.

    Args:
        model: any module.
        layers: names, as in `model.named_modules()`, or modules; by default each activation
            function (nn.ReLU and its like), or where the model has no such module each module
            with parameters of its own.
        near_zero: the threshold. fastai's ActivationStats counts x <= 0.05, and with it all
            negative numbers; here it is |x| <= 0.05. After a ReLU the two are the same.
        histograms: whether to count bins, which costs more than all else.
        bins, range: of the histograms. Numbers outside are left out, as by `torch.histc`.
        sample: at most about so many numbers of a batch are counted in a histogram, evenly
            strided over it; None counts all. Mean, std and near_zero always take all.
        capacity: batches held, at least 2.

    Raises:
        ValueError: a layer that is not in the model, or a number out of its range.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[str | nn.Module] | None = None,
        *,
        near_zero: float = 0.05,
        histograms: bool = True,
        bins: int = 40,
        range: tuple[float, float] = (0.0, 10.0),
        sample: int | None = 32_768,
        capacity: int = 2_000,
    ) -> None:
        if not near_zero >= 0:
            raise ValueError(f"near_zero must be at least 0, got {near_zero}")
        if bins < 1:
            raise ValueError(f"bins must be at least 1, got {bins}")
        if not range[0] < range[1]:
            raise ValueError(f"range must be two numbers that rise, got {range}")
        if sample is not None and sample < 1:
            raise ValueError(f"sample must be at least 1 or None, got {sample}")
        if capacity < 2:
            raise ValueError(f"capacity must be at least 2, got {capacity}")
        self.layers = _chosen(model, layers)
        self.near_zero = near_zero
        self.bins = bins if histograms else 0
        self.range = (float(range[0]), float(range[1]))
        self.sample = sample
        self.capacity = capacity
        self.stride = 1
        self.batches = 0  # that the model was given in training mode
        self._model = model
        self._numbers: list[int] = []  # of the batches held
        # Each batch's row of each layer: count, sum, sum of squares, near zero, bins.
        self._rows: dict[str, list[Tensor]] = {name: [] for name in self.layers}
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    # ---- collecting ----

    def attach(self) -> ActivationStats:
        """Begins to collect, by forward hooks; `with` does the same."""
        if not self._hooks:
            modules = dict(self._model.named_modules())
            self._hooks = [self._model.register_forward_pre_hook(self._begin)]
            for name in self.layers:
                hook = _LayerHook(self, name)
                self._hooks.append(modules[name].register_forward_hook(hook))
        return self

    def detach(self) -> None:
        """Removes the hooks; what was collected stays."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def __enter__(self) -> ActivationStats:
        return self.attach()

    def __exit__(self, *_: object) -> None:
        self.detach()

    def _begin(self, module: nn.Module, _: object) -> None:
        if not module.training:
            return
        if self.batches % self.stride == 0:
            if len(self._numbers) == self.capacity:
                self._numbers = self._numbers[::2]
                self._rows = {name: rows[::2] for name, rows in self._rows.items()}
                self.stride *= 2
            if self.batches % self.stride == 0:
                self._numbers.append(self.batches)
        self.batches += 1

    def _looked_at(self) -> bool:
        return bool(self._numbers) and self._numbers[-1] == self.batches - 1

    def _note(self, name: str, output: Tensor) -> None:
        rows = self._rows[name]
        if len(rows) == len(self._numbers):  # the layer was called before in this batch
            rows.pop()
        while len(rows) < len(self._numbers) - 1:  # and in earlier batches it was not
            rows.append(torch.full((4 + self.bins,), torch.nan, dtype=torch.float64))
        rows.append(self._measure(output.detach()))

    @torch.no_grad()
    def _measure(self, output: Tensor) -> Tensor:
        """A row, on the output's device: reading it at once would make a GPU wait for Python."""
        flat = _flat(output)
        if flat.dtype not in (torch.float32, torch.float64):
            flat = flat.float()
        count = flat.numel()
        if flat.device.type == "cpu":
            # NumPy's comparison and count are three times as fast as torch's.
            array = flat.numpy()
            near = np.count_nonzero(array <= self.near_zero)
            near -= np.count_nonzero(array < -self.near_zero)
            total, squares = float(flat.sum()), float(torch.dot(flat, flat))
            mean = total / count if count else np.nan
            if squares - total * mean < 1e-3 * squares and count > 1:
                # The difference of two large numbers; a second pass keeps the digits.
                squares = float(flat.var(correction=0).double()) * count + total * mean
            row = torch.tensor([count, total, squares, near], dtype=torch.float64)
        else:
            near = (flat.abs() <= self.near_zero).sum()
            wide = flat.double()
            row = torch.stack([torch.full_like(near, count), wide.sum(), wide.dot(wide), near])
        if not self.bins:
            return row
        step = 1 if self.sample is None else max(1, -(-count // self.sample))
        counts = torch.histc(flat[::step], self.bins, *self.range)
        return torch.cat([row, counts.double()])

    # ---- what was collected ----

    def layer(self, layer: str | int) -> LayerStats:
        """One layer's statistics, by its name or its place in `layers`.

        Raises:
            ValueError: there is no such layer.
        """
        if isinstance(layer, int) and -len(self.layers) <= layer < len(self.layers):
            layer = self.layers[layer]
        if layer not in self._rows:
            raise ValueError(f"layer must be one of {', '.join(self.layers)}, got {layer!r}")
        rows = [row.cpu() for row in self._rows[layer]]
        table = torch.stack(rows).numpy() if rows else np.empty((0, 4 + self.bins))
        count, total, squares, near = table[:, :4].T
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = total / count
            variance = np.maximum(squares - total * mean, 0) / (count - 1)
        return LayerStats(
            batches=np.array(self._numbers[: len(rows)], dtype=np.int64),
            mean=mean,
            std=np.sqrt(variance),
            near_zero=near / count,
            histograms=table[:, 4:] if self.bins else None,
            edges=np.linspace(*self.range, self.bins + 1) if self.bins else None,
        )

    def plot_layer_stats(self, layer: str | int) -> Figure:
        """Mean, standard deviation and share near zero of one layer, over batches."""
        from convext.lab.charts import plot_layer_stats

        return plot_layer_stats(self._name(layer), self.layer(layer), self.near_zero)

    def color_dim(self, layer: str | int) -> Figure:
        """One layer's histograms side by side: batches across, activation up, log counts as colour.

        Stefano Giomo's colorful dimension, as in fastai.

        Raises:
            ValueError: no histograms were collected.
        """
        from convext.lab.charts import color_dim

        return color_dim(self._name(layer), self.layer(layer))

    def _name(self, layer: str | int) -> str:
        return self.layers[layer] if isinstance(layer, int) else layer

    # ---- keeping it ----

    def state_dict(self) -> dict[str, object]:
        """What was collected, as tensors and numbers; a checkpoint holds it."""
        return {
            "batches": self.batches,
            "stride": self.stride,
            "numbers": torch.tensor(self._numbers, dtype=torch.int64),
            "rows": {
                name: torch.stack([row.cpu() for row in rows])
                if rows
                else torch.empty(0, 4 + self.bins, dtype=torch.float64)
                for name, rows in self._rows.items()
            },
        }

    def load_state_dict(self, state: dict) -> None:
        """Goes on where `state_dict` was taken.

        Raises:
            ValueError: the state is of other layers or of another number of bins.
        """
        if list(state["rows"]) != list(self.layers):
            raise ValueError(
                f"state must be of the layers {', '.join(self.layers)}, "
                f"got {', '.join(state['rows'])}"
            )
        for name, rows in state["rows"].items():
            if rows.shape[1] != 4 + self.bins:
                raise ValueError(f"state must have {self.bins} bins, got {rows.shape[1] - 4}")
            self._rows[name] = list(rows)
        self.batches, self.stride = state["batches"], state["stride"]
        self._numbers = state["numbers"].tolist()

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
                **{f"rows/{name}": rows.numpy() for name, rows in state["rows"].items()},
            )

    @classmethod
    def load(cls, path: str | Path) -> ActivationStats:
        """Reads what `save` wrote, to look at: it belongs to no model.

        Raises:
            OSError, ValueError: the file can't be read, or is none of `save`'s.
        """
        with np.load(path, allow_pickle=False) as file:
            if "layers" not in file or "settings" not in file:
                raise ValueError(f"{path}: not written by ActivationStats.save")
            layers = file["layers"].tolist()
            settings = json.loads(str(file["settings"]))
            empty = nn.Module()
            stats = cls(empty, [], histograms=bool(settings["bins"]), bins=settings["bins"] or 1)
            stats.near_zero, stats.range = settings["near_zero"], tuple(settings["range"])
            stats.layers = tuple(layers)
            batches, stride = (int(n) for n in file["counts"])
            rows = {name: torch.from_numpy(file[f"rows/{name}"]) for name in layers}
            numbers = torch.from_numpy(file["numbers"])
        stats.load_state_dict(
            {"batches": batches, "stride": stride, "numbers": numbers, "rows": rows}
        )
        return stats


@dataclass(frozen=True)
class _LayerHook:
    """Forward hook of one layer; an object, so that a model with hooks can still be pickled."""

    stats: ActivationStats
    name: str

    def __call__(self, module: nn.Module, _: object, output: object) -> None:
        if self.stats._model.training and self.stats._looked_at():
            first = output[0] if isinstance(output, (tuple, list)) else output
            if isinstance(first, Tensor):
                self.stats._note(self.name, first)


def _chosen(model: nn.Module, layers: Sequence[str | nn.Module] | None) -> tuple[str, ...]:
    modules = dict(model.named_modules())
    if layers is None:
        found = [name for name, module in modules.items() if isinstance(module, _ACTIVATIONS)]
        return tuple(found) or tuple(
            name for name, module in modules.items() if list(module.parameters(recurse=False))
        )
    names = {module: name for name, module in modules.items()}
    chosen = tuple(names.get(layer, layer) for layer in layers)
    for layer in chosen:
        if layer not in modules:
            raise ValueError(f"layers must be modules of the model or their names, got {layer!r}")
    return chosen


def _flat(output: Tensor) -> Tensor:
    """All numbers in the order of memory where that saves a copy: no statistic depends on it."""
    if output.dim() == 4 and not output.is_contiguous():
        output = output.permute(0, 2, 3, 1)
    return output.reshape(-1)
