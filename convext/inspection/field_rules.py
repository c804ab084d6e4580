"""What each operation on a tape does to receptive fields, by arithmetic on shapes and settings.

It speaks of fields only where all cells at one place of the grid, in every channel, read alike up
to a shift. Where that does not hold, or an operation is not known here, there is no answer: None.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate
from math import inf, prod
from operator import mul

from torch import Tensor

from convext.inspection import kinds
from convext.inspection.field_axis import Axis
from convext.inspection.field_place import (
    Fields,
    Place,
    UnknownFieldsError,
    broadcast,
    gathered,
    merged,
)
from convext.inspection.spread import is_pointwise
from convext.inspection.step import Ref, Step
from convext.inspection.tape import Tape


def fields(tape: Tape) -> list[Fields | None]:
    """The fields of each step, or None. The input must be (N, C, H, W)."""
    height, width = tape.steps[0].value.shape[2:]
    pixels = Axis.pixels()
    found: list[Fields | None] = [Fields((Place(pixels, 2, height), Place(pixels, 3, width)))]
    for step in tape.steps[1:]:
        sources = {index: found[index] for index in step.inputs}
        try:
            if None in sources.values():
                raise UnknownFieldsError
            inputs = {i: (source, tape.steps[i].value.shape) for i, source in sources.items()}
            found.append(_after(step, inputs))
        except UnknownFieldsError:
            found.append(None)
    return found


_Inputs = dict[int, tuple[Fields, Sequence[int]]]


def _after(step: Step, inputs: _Inputs) -> Fields:
    if step.kind in kinds.PRODUCTS:
        return _product(step, inputs)
    if step.kind in ("cat", "stack"):
        return _joined(step, inputs)
    for rule, its_kinds in _RULES.items():
        if step.kind in its_kinds:
            ((source, shape),) = inputs.values()
            return rule(step, source, tuple(shape))
    if is_pointwise(step):
        shape = step.value.shape
        return merged([broadcast(source, of, shape) for source, of in inputs.values()])
    raise UnknownFieldsError


def _moved(source: Fields, step: Step, moves: Sequence[Callable[[Axis], Axis]]) -> Fields:
    """The last two dimensions are H and W, as for convolutions, and their cells read others."""
    last = step.value.dim()
    return replace(
        source,
        places=tuple(
            _along(place, dim, step.value.shape[dim], move)
            for place, dim, move in zip(source.places, (last - 2, last - 1), moves, strict=True)
        ),
    )


def _along(place: Place, dim: int, cells: int, move: Callable[[Axis], Axis]) -> Place:
    if place.dim is None:
        if inf in move(place.axis).lows:  # some cells read nothing
            raise UnknownFieldsError
        return place
    if place.dim != dim or not place.alone:
        raise UnknownFieldsError
    return Place(move(place.axis), dim, cells)


def _convolution(step: Step, source: Fields, shape: Sequence[int]) -> Fields:
    arguments = step.named_arguments()
    weight, transposed = arguments["weight"], arguments.get("transposed", False)
    if weight.dim() != 4 or len(shape) != 4:
        raise UnknownFieldsError
    if arguments["groups"] > 1 and not source.uniform:
        raise UnknownFieldsError
    settings = zip(
        weight.shape[2:],
        *(_pair(arguments[name]) for name in ("stride", "padding", "dilation")),
        strict=True,
    )
    moves = [
        lambda axis, s=setting: axis.transposed(*s) if transposed else axis.window(*s)
        for setting in settings
    ]
    return replace(_moved(source, step, moves), uniform=True)


def _pool(step: Step, source: Fields, shape: Sequence[int]) -> Fields:
    arguments = step.named_arguments()
    kernel = _pair(arguments["kernel_size"])
    settings = zip(
        kernel,
        _pair(arguments["stride"] or kernel),
        _pair(arguments["padding"]),
        _pair(arguments.get("dilation", 1)),
        strict=True,
    )
    return _moved(source, step, [lambda axis, s=setting: axis.window(*s) for setting in settings])


def _adaptive_pool(step: Step, source: Fields, shape: Sequence[int]) -> Fields:
    """Equal windows side by side, where the sizes divide; one is all there is."""
    ratios = [size / out for size, out in zip(shape[-2:], step.value.shape[-2:], strict=True)]
    if any(ratio != int(ratio) for ratio in ratios):
        raise UnknownFieldsError
    moves = [lambda axis, k=int(ratio): axis.window(k, k, 0, 1) for ratio in ratios]
    single = {dim for dim in (-2, -1) if step.value.shape[dim] == 1}
    return _moved(gathered(source, {len(shape) + dim for dim in single}), step, moves)


def _upsample(step: Step, source: Fields, shape: Sequence[int]) -> Fields:
    ratios = [out / size for size, out in zip(shape[-2:], step.value.shape[-2:], strict=True)]
    aligned = step.named_arguments().get("align_corners", False)
    if aligned or any(ratio != int(ratio) for ratio in ratios):
        raise UnknownFieldsError

    def larger(factor: int) -> Callable[[Axis], Axis]:
        def taps(cell: int) -> set[int]:
            if step.kind != "upsample_bilinear2d":
                return {0}
            # Its centre in the smaller grid is (cell + 1/2) / factor - 1/2, between two cells.
            centre = 2 * cell + 1 - factor
            return {centre // (2 * factor), -(-centre // (2 * factor))}

        return lambda axis: axis.read(factor, 1, taps)

    return _moved(source, step, [larger(int(ratio)) for ratio in ratios])


def _pixel_shuffle(step: Step, source: Fields, shape: Sequence[int]) -> Fields:
    if not source.uniform:
        raise UnknownFieldsError
    factor = step.value.shape[-1] // shape[-1]
    return _moved(source, step, [lambda axis: axis.read(factor, 1, lambda _: [0])] * 2)


def _pad(step: Step, source: Fields, shape: Sequence[int]) -> Fields:
    """Reflected and repeated pixels count as zeros do: as padding."""
    amounts = step.arguments[1]
    before = {len(shape) - 1 - i: amount for i, amount in enumerate(amounts[::2])}
    after = {len(shape) - 1 - i: amount for i, amount in enumerate(amounts[1::2])}
    other = [d for d in before if d not in {place.dim for place in source.places}]
    padded = [d for d in other if (before[d], after[d]) != (0, 0)]
    if padded and not source.uniform:
        raise UnknownFieldsError
    places = tuple(
        _along(
            place,
            place.dim,
            step.value.shape[place.dim],
            lambda a, d=place.dim: a.read(1, 1, lambda _: [-before[d]]),
        )
        if place.dim in before and (before[place.dim], after[place.dim]) != (0, 0)
        else place
        for place in source.places
    )
    return Fields(places, source.uniform and not padded)


def _slice(step: Step, source: Fields, shape: Sequence[int]) -> Fields:
    """Some cells along one dimension: of a slice, a split, or one cell of a select or unbind."""
    arguments = step.named_arguments()
    dim = arguments["dim"] % len(shape)
    dropped = step.kind in ("select", "unbind")
    start, stride = _start(step, arguments, shape[dim]), arguments.get("step", 1)
    if dim not in {place.dim for place in source.places} and not source.uniform:
        raise UnknownFieldsError

    def kept(place: Place) -> Place:
        if place.dim != dim:
            shift = dropped and place.dim is not None and place.dim > dim
            return replace(place, dim=place.dim - 1) if shift else place
        if not place.alone:
            raise UnknownFieldsError
        if dropped:
            return Place(Axis.constant(place.axis.low(start), place.axis.high(start)), None, 1)
        axis = place.axis.read(1, stride, lambda _: [start])
        return Place(axis, dim, step.value.shape[dim])

    return replace(source, places=tuple(map(kept, source.places)))


def _start(step: Step, arguments: dict, size: int) -> int:
    if step.kind == "select":
        return arguments["index"] % size
    if step.kind == "unbind":
        return step.part
    if step.kind == "split_with_sizes":
        return sum(arguments["split_sizes"][: step.part])
    if step.kind == "split":
        return arguments["split_size"] * step.part
    start = arguments["start"] or 0
    return max(0, start + size) if start < 0 else min(start, size)


def _view(step: Step, source: Fields, shape: Sequence[int]) -> Fields:
    """The same numbers in the same order: a dimension stays, or is joined with its neighbours."""
    new = tuple(step.value.shape)
    old_before, old_after = _strides(shape)
    new_before, new_after = _strides(new)

    def follow(place: Place) -> Place:
        if place.dim is None:
            return place
        outer, inner = old_before[place.dim] * place.outer, old_after[place.dim] * place.inner
        from_end = place.dim - len(shape)
        homes = [
            replace(place, dim=d, outer=outer // new_before[d], inner=inner // new_after[d])
            for d in range(len(new))
            if outer % new_before[d] == 0
            and inner % new_after[d] == 0
            and new[d] % place.cells == 0
        ]
        if homes:  # of several with nothing else, of size 1, the one at the same place from the end
            return min(homes, key=lambda p: (p.outer * p.inner, p.dim - len(new) != from_end))
        if place.cells == 1:
            return place.constant()
        raise UnknownFieldsError

    return replace(source, places=tuple(map(follow, source.places)))


def _strides(shape: Sequence[int]) -> tuple[list[int], list[int]]:
    """How many cells there are of the dimensions before and after each."""
    before = [1, *accumulate(shape, mul)][:-1]
    return before, [prod(shape[d + 1 :]) for d in range(len(shape))]


def _permuted(step: Step, source: Fields, shape: Sequence[int]) -> Fields:
    arguments = step.named_arguments()
    order = list(range(len(shape)))
    if step.kind == "permute":
        order = [dim % len(shape) for dim in arguments["dims"]]
    elif len(shape) > 1:
        one, other = arguments.get("dim0", 0), arguments.get("dim1", 1)
        order[one], order[other] = order[other], order[one]
    return replace(
        source,
        places=tuple(
            p if p.dim is None else replace(p, dim=order.index(p.dim)) for p in source.places
        ),
    )


def _reduction(step: Step, source: Fields, shape: Sequence[int]) -> Fields:
    arguments = step.named_arguments()
    dims = arguments.get("dim")
    dims = range(len(shape)) if dims in (None, []) else [dims] if isinstance(dims, int) else dims
    dims = {dim % len(shape) for dim in dims}
    kept = bool(arguments.get("keepdim", False))

    def reduced(place: Place) -> Place:
        if place.dim is None or kept:
            return place
        return replace(place, dim=place.dim - sum(dim < place.dim for dim in dims))

    found = gathered(source, dims)
    return replace(found, places=tuple(map(reduced, found.places)))


def _softmax(step: Step, source: Fields, shape: Sequence[int]) -> Fields:
    return gathered(source, {step.named_arguments()["dim"] % len(shape)})


def _batch_norm(step: Step, source: Fields, shape: Sequence[int]) -> Fields:
    """With running statistics each cell by itself, else with all of its channel."""
    if not kinds.takes_batch_statistics(step):
        return source
    return gathered(source, set(range(len(shape))) - {1})


def _layer_norm(step: Step, source: Fields, shape: Sequence[int]) -> Fields:
    normalized = len(step.named_arguments()["normalized_shape"])
    return gathered(source, set(range(len(shape) - normalized, len(shape))))


def _gated(step: Step, source: Fields, shape: Sequence[int]) -> Fields:
    """One half of the channels times a function of the other."""
    dim = step.named_arguments()["dim"] % len(shape)
    if dim in {place.dim for place in source.places} or not source.uniform:
        raise UnknownFieldsError
    return source


def _group_norm(step: Step, source: Fields, shape: Sequence[int]) -> Fields:
    if not source.uniform:
        raise UnknownFieldsError
    return gathered(source, set(range(1, len(shape))))


def _product(step: Step, inputs: _Inputs) -> Fields:
    """A matrix product: a row of the first and a column of the second factor."""
    *addend, first, second = [
        argument for argument in step.arguments if isinstance(argument, (Ref, Tensor))
    ]
    found = []
    for factor in (first, second):
        if isinstance(factor, Ref):
            source, shape = inputs[factor.step]
            summed = len(shape) - 1 if factor is first else max(0, len(shape) - 2)
            found.append(gathered(source, {summed}))
    found += [broadcast(*inputs[a.step], step.value.shape) for a in addend if isinstance(a, Ref)]
    return merged(found)


def _joined(step: Step, inputs: _Inputs) -> Fields:
    """Side by side along a dimension that is not of the image, or along a new one."""
    dims = step.value.dim()
    dim = step.named_arguments()["dim"] % dims
    sources = [source for source, _ in inputs.values()]
    if step.kind == "stack":
        sources = [
            replace(
                source,
                places=tuple(
                    replace(p, dim=p.dim + 1) if p.dim is not None and p.dim >= dim else p
                    for p in source.places
                ),
            )
            for source in sources
        ]
    if any(place.dim == dim for source in sources for place in source.places):
        raise UnknownFieldsError
    found = merged(sources)
    parts = step.arguments[0]
    alike = all(isinstance(part, Ref) for part in parts) and all(
        source.places == sources[0].places for source in sources
    )
    return replace(found, uniform=found.uniform and alike)


def _expand(step: Step, source: Fields, shape: Sequence[int]) -> Fields:
    return broadcast(source, shape, step.value.shape)


def _same(step: Step, source: Fields, shape: Sequence[int]) -> Fields:
    return source


_RULES: dict[Callable[[Step, Fields, Sequence[int]], Fields], frozenset[str]] = {
    _convolution: frozenset(kinds.CONVOLUTIONS + kinds.CONV_BLOCKS),
    _pool: frozenset(kinds.MAX_POOLS + kinds.MEAN_POOLS),
    _adaptive_pool: frozenset(kinds.ADAPTIVE_POOLS),
    _upsample: frozenset(
        ("upsample_nearest2d", "_upsample_nearest_exact2d", "upsample_bilinear2d")
    ),
    _pixel_shuffle: frozenset(("pixel_shuffle",)),
    _pad: frozenset(("constant_pad_nd", "reflection_pad2d", "replication_pad2d")),
    _batch_norm: frozenset(kinds.BATCH_NORMS),
    _layer_norm: frozenset(kinds.LAYER_NORMS),
    _group_norm: frozenset(kinds.GROUP_NORMS),
    _softmax: frozenset(kinds.SOFTMAXES),
    _reduction: frozenset(kinds.REDUCTIONS),
    _gated: frozenset(("glu",)),
    _slice: frozenset(("slice", "select", "split", "split_with_sizes", "unbind")),
    _view: frozenset(("view", "_unsafe_view", "reshape", "_reshape_alias", "squeeze", "unsqueeze")),
    _permuted: frozenset(("permute", "transpose", "t")),
    _expand: frozenset(("expand",)),
    _same: frozenset(("alias", "detach", "channel_shuffle")),
}


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return (values[0], values[-1])
