"""What the page of a network holds: each step's numbers, and which cells it joins, as plain data.

The page works out sums and windows itself, from the values and weights given here. A step's
`joins` says which cells an output reads: "same" place, "moved" (a map from outputs to inputs),
"conv" or "pool" (windows, by the settings in `rule`), or "units" (outputs that read the same cells,
and those cells). Its `rule` says how the numbers of an output come about, where the page can tell.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convext.inspection import kinds
from convext.inspection.spread import spread
from convext.inspection.step import Ref, Step, leaves
from convext.inspection.tape import Tape

MAX_NUMBERS = 2_000_000  # of activations and weights, and of cells listed: some 10 MB of each
MAX_PAIRS = 50_000_000  # of output and input cells that are tried against each other

_SAME_NUMBERS = ("clone", "_to_copy", "contiguous", "alias", "detach", "view", "_unsafe_view")
_COPIED = "The same numbers, laid out anew."


def page_data(tape: Tape) -> list[dict[str, Any]]:
    """One entry a step, ready for JSON; arrays are base64 of little-endian float32, or float64.

    Raises:
        NotImplementedError: an operation whose cells are not known, or are too many to list.
        ValueError: more than MAX_NUMBERS activations and weights.
    """
    numbers = sum(
        sum(tensor.numel() for tensor in (step.value, *leaves(step.arguments, Tensor)))
        for step in tape.steps
    )
    if numbers > MAX_NUMBERS:
        raise ValueError(
            f"model and input must give at most {MAX_NUMBERS:,} activations and weights together, "
            f"got {numbers:,}; take a smaller image or a part of the model"
        )
    return [_entry(step, tape) for step in tape.steps]


def _entry(step: Step, tape: Tape) -> dict[str, Any]:
    sources = [tape.steps[i] for i in dict.fromkeys(step.inputs)]
    rule, about = _rule(step, sources)
    joins = _joins(step, sources, rule["name"])
    if rule["name"] == "other" and _is_copied(step, sources, joins):
        rule, about = {"name": "copy"}, _COPIED
    return {
        "name": step.name,
        "type": type(step.module).__name__ if step.layer and step.name == step.layer else step.kind,
        "kind": step.kind,
        "shape": _shape(step.value),
        "values": _array(step.value),
        "eps": torch.finfo(step.value.dtype).eps if step.value.is_floating_point() else 0,
        "sources": [source.index for source in sources],
        "rule": rule,
        "about": about,
        "joins": {key: _encoded(value) for key, value in joins.items()},
    }


def _rule(step: Step, sources: Sequence[Step]) -> tuple[dict[str, Any], str]:
    """How an output's number comes about: what the page computes with, and a sentence."""
    if step.op is None:
        return {"name": "input"}, "What the network is given."
    a = step.named_arguments()
    for its_kinds, rule in _RULES.items():
        found = rule(step, a) if step.kind in its_kinds else None
        if found is not None:
            return found
    alike = all(source.value.shape == step.value.shape for source in sources)
    if step.kind in ("add", "add_") and len(sources) == 2 and alike and a["alpha"] == 1:
        return {"name": "add"}, "The two inputs' numbers added, place by place."
    return {"name": "other"}, f"The operation {step.op}."


def _convolution(step: Step, a: dict[str, Any]) -> tuple[dict[str, Any], str] | None:
    weight = a["weight"]
    if not isinstance(weight, Tensor) or weight.dim() != 4 or a.get("transposed", False):
        return None
    if step.value.dim() != 4 or isinstance(a["bias"], Ref):
        return None
    outputs, inputs, *kernel = weight.shape
    settings = {name: list(a[name]) for name in ("stride", "padding", "dilation")}
    rule = {"name": "conv", "kernel": kernel, "groups": a["groups"], **settings}
    rule |= {"weight": _array(weight), "weightShape": list(weight.shape)}
    rule["bias"] = None if a["bias"] is None else _array(a["bias"])
    products = inputs * kernel[0] * kernel[1]
    about = f"{_count(outputs, 'filter')} of {_times([inputs, *kernel])} weights{_settings(rule)}. "
    about += f"Each cell is a sum of {products} products" + (
        ", plus its channel's bias." if rule["bias"] else "."
    )
    return rule, about


def _max_pool(step: Step, a: dict[str, Any]) -> tuple[dict[str, Any], str] | None:
    return _pool(step, a, "max", "The largest number of each")


def _mean_pool(step: Step, a: dict[str, Any]) -> tuple[dict[str, Any], str] | None:
    found = _pool(step, a, "mean", "The mean of each")
    if found is not None:
        found[0]["countPadding"] = a["count_include_pad"]
        found[0]["divisor"] = a["divisor_override"]
    return found


def _pool(
    step: Step, a: dict[str, Any], name: str, of_each: str
) -> tuple[dict[str, Any], str] | None:
    if step.value.dim() != 4:
        return None
    rule = {"name": name, "kernel": _pair(a["kernel_size"])}
    rule["stride"] = _pair(a["stride"] or a["kernel_size"])
    rule |= {"padding": _pair(a["padding"]), "dilation": _pair(a.get("dilation", 1))}
    return rule, f"{of_each} {_times(rule['kernel'])} window{_settings(rule)}."


def _batch_norm(step: Step, a: dict[str, Any]) -> tuple[dict[str, Any], str] | None:
    mean, var = a.get("mean", a.get("running_mean")), a.get("var", a.get("running_var"))
    if kinds.takes_batch_statistics(step) or not isinstance(mean, Tensor):
        return None
    rule = {"name": "norm", "eps": a["eps"], "mean": _array(mean), "var": _array(var)}
    for name, argument in (("gamma", "weight"), ("beta", "bias")):
        rule[name] = None if a[argument] is None else _array(a[argument])
    about = "Each channel shifted and scaled by its running mean and variance"
    return rule, about + (", then by gamma and beta." if rule["gamma"] else ".")


def _linear(step: Step, a: dict[str, Any]) -> tuple[dict[str, Any], str] | None:
    if step.kind == "addmm":
        rows, weight, bias = a["mat1"], a["mat2"], a["self"]
        if a["alpha"] != 1 or a["beta"] != 1 or not isinstance(bias, Tensor) or bias.dim() != 1:
            return None
    else:
        rows, weight, bias = a["self"], a["mat2"], None
    if not isinstance(rows, Ref) or not isinstance(weight, Tensor):
        return None
    inputs, outputs = weight.shape
    rule = {"name": "linear", "weight": _array(weight), "weightShape": [inputs, outputs]}
    rule["bias"] = None if bias is None else _array(bias)
    about = f"Each of {_count(outputs, 'cell')} is the sum of all {inputs} products"
    return rule, about + (", plus its bias." if rule["bias"] else ".")


def _softmax(step: Step, a: dict[str, Any]) -> tuple[dict[str, Any], str]:
    log = step.kind == "_log_softmax"
    about = "Each number's exponential as a share of all of them"
    return {"name": "logSoftmax" if log else "softmax"}, about + (", as a logarithm." * log or ".")


def _plain(name: str, about: str):
    return lambda step, a: ({"name": name}, about)


_RULES = {
    kinds.CONVOLUTIONS: _convolution,
    kinds.MAX_POOLS: _max_pool,
    kinds.MEAN_POOLS: _mean_pool,
    kinds.BATCH_NORMS: _batch_norm,
    ("addmm", "mm"): _linear,
    ("_softmax", "_log_softmax"): _softmax,
    ("relu", "relu_"): _plain("relu", "Numbers below 0 become 0; the others stay."),
    ("mean",): _plain("average", "The mean of the cells read."),
    _SAME_NUMBERS: _plain("copy", _COPIED),
}


def _joins(step: Step, sources: Sequence[Step], rule: str) -> dict[str, Any]:
    """Which cells each output reads; see the module."""
    if rule in ("input", "conv"):
        return {"how": rule}
    if rule in ("max", "mean"):
        return {"how": "pool"}
    run = spread(step)
    by_place = torch.Tag.pointwise in step.op.tags or rule in ("relu", "norm", "copy", "add")
    if by_place and all(source.value.numel() == step.value.numel() for source in sources):
        return {"how": "same"}
    moved = [_moved(run, step, sources, i) for i in range(len(sources))]
    if all(cells is not None for cells in moved):
        return {"how": "moved", "from": moved}
    return {"how": "units", **_units(run, step, sources)}


def _moved(run, step: Step, sources: Sequence[Step], which: int) -> Tensor | None:
    """The cell of one source that each output reads, -1 for none; None if one reads several.

    The spread's weights are positive. Where they add up to 1 and the mean of the places read has
    no variance, a single place is read.
    """

    def outputs(of_places) -> Tensor:
        cells = [torch.zeros(source.value.shape, dtype=torch.float64) for source in sources]
        places = torch.arange(cells[which].numel(), dtype=torch.float64)
        cells[which] = of_places(places).reshape(cells[which].shape)
        return run(*cells).flatten()

    weight, place = outputs(torch.ones_like), outputs(lambda places: places)
    if not (((weight == 0) | (weight == 1)).all() and (outputs(torch.square) == place**2).all()):
        return None
    return torch.where(weight == 1, place, -1).to(torch.int32)


def _is_copied(step: Step, sources: Sequence[Step], joins: dict[str, Any]) -> bool:
    """Whether every output that reads a cell is that cell's number."""
    if joins["how"] != "moved":
        return False
    values = step.value.flatten()
    return all(
        torch.equal(values[cells >= 0], source.value.flatten()[cells[cells >= 0].long()])
        for source, cells in zip(sources, joins["from"], strict=True)
    )


def _units(run, step: Step, sources: Sequence[Step]) -> dict[str, Any]:
    """Sets of outputs that read the same cells, and those cells, by trying each output."""
    inputs = [torch.zeros(s.value.shape, dtype=torch.float64, requires_grad=True) for s in sources]
    pairs = step.value.numel() * sum(source.numel() for source in inputs)
    if pairs > MAX_PAIRS:
        raise NotImplementedError(
            f"{step.name}: the cells that {step.op} reads would have to be listed one by one, "
            f"and {pairs:,} pairs of cells are more than the {MAX_PAIRS:,} that a page takes"
        )
    with torch.enable_grad():
        flat = run(*inputs).flatten()
    units: dict[bytes, list[int]] = {}
    for cell in range(flat.numel()):
        one = torch.zeros_like(flat)
        one[cell] = 1
        found = torch.autograd.grad(flat, inputs, one, retain_graph=True, allow_unused=True)
        read = [
            np.zeros(source.numel(), bool) if g is None else (g > 0).flatten().numpy()
            for source, g in zip(inputs, found, strict=True)
        ]
        units.setdefault(np.packbits(np.concatenate(read)).tobytes(), []).append(cell)
    starts = np.cumsum([0, *(source.numel() for source in inputs)])
    listed = []
    for key, cells in units.items():
        read = np.unpackbits(np.frombuffer(key, np.uint8))[: starts[-1]]
        listed.append((cells, [np.flatnonzero(part) for part in np.split(read, starts[1:-1])]))
    numbers = sum(len(cells) + sum(map(len, parts)) for cells, parts in listed)
    if numbers > MAX_NUMBERS:
        raise NotImplementedError(
            f"{step.name}: {step.op} reads {numbers:,} cells, more than the {MAX_NUMBERS:,} that "
            "a page lists"
        )
    return {
        "units": [
            [torch.tensor(cells), *(torch.from_numpy(part) for part in parts)]
            for cells, parts in listed
        ]
    }


def _encoded(tree: Any) -> Any:
    """Nested lists with arrays in place of tensors."""
    if isinstance(tree, list):
        return [_encoded(branch) for branch in tree]
    return _array(tree) if isinstance(tree, Tensor) else tree


def _array(values: Tensor) -> dict[str, str]:
    """A flat array by its type, which JavaScript has a typed array for."""
    if not values.is_floating_point():
        name, dtype = "i4", "<i4"
    elif values.dtype == torch.float64:
        name, dtype = "f8", "<f8"
    else:
        values, name, dtype = values.float(), "f4", "<f4"
    content = values.detach().cpu().contiguous().numpy().astype(dtype).tobytes()
    return {name: base64.b64encode(content).decode("ascii")}


def _shape(value: Tensor) -> list[int]:
    """Without the batch's axis of one image."""
    shape = list(value.shape)
    return (shape[1:] if len(shape) > 1 and shape[0] == 1 else shape) or [1]


def _pair(value: int | Sequence[int]) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return [values[0], values[-1]]


def _settings(rule: dict[str, Any]) -> str:
    """Those that are not the plain ones, in words."""
    plain = {"padding": [0, 0], "dilation": [1, 1], "groups": 1}
    plain["stride"] = [1, 1] if rule["name"] == "conv" else rule["kernel"]
    words = []
    for name in ("stride", "padding", "dilation", "groups"):
        value = rule.get(name, plain[name])
        if value != plain[name]:
            same = isinstance(value, list) and value[0] == value[1]
            shown = value[0] if same else value
            words.append(f"{name} {_times(shown) if isinstance(shown, list) else shown}")
    return "".join(f", {word}" for word in words)


def _times(sizes: Sequence[int]) -> str:
    return " \N{MULTIPLICATION SIGN} ".join(map(str, sizes))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + "s" * (number != 1)
