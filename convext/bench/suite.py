"""Selects cases and runs them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch

import convext
from convext.bench import cases, gpu, models
from convext.bench.cases import AUTO, STOCK, WINOGRAD, Case
from convext.bench.epoch import measure_epoch
from convext.bench.layers import NETWORKS
from convext.bench.machine import Peaks, measure_peaks
from convext.bench.results import CHANNELS_LAST, NCHW, ON_GPU, Row
from convext.bench.timing import Call, Effort, sample_in_turn, seconds
from convext.errors import UserError

FORMATS = {NCHW: torch.contiguous_format, CHANNELS_LAST: torch.channels_last}
DTYPES = {name: getattr(torch, name) for name in ("float32", "float64", "bfloat16", "float16")}
# A group's name -> a function of batch (None for the group's own) and quick.
GROUPS: dict[str, Callable[[int | None, bool], Iterator[Case]]] = {
    "mnist": cases.mnist,
    **{name: partial(cases.network, name) for name in NETWORKS},
    "batchnorm": cases.batchnorm,
    "step": models.step,
    "block": models.block,
    "overhead": models.overhead,
}
EPOCH = "epoch"  # the group that is no function in this process
PASSES = tuple(
    dict.fromkeys(
        (*cases.CONV_PASSES, *cases.NORM_PASSES, *models.STEPS, *models.BLOCK_PASSES, *models.CALLS)
    )
)
DETERMINISTIC = f"{STOCK}, deterministic"  # what else there is of PyTorch's on a GPU
QUICK = Effort(rounds=9, sample=1e-3, seconds=0.7)
QUICK_SECONDS = 140.0  # then what is left of the quick selection is left out, and said to be


@dataclass(frozen=True)
class Selection:
    """What is to be measured; empty means all, or the usual."""

    groups: Sequence[str] = ()
    passes: Sequence[str] = ()
    layouts: Sequence[str] = ()
    dtypes: Sequence[str] = ()
    threads: Sequence[int] = ()
    algorithms: Sequence[str] = ()  # besides auto
    match: str = ""  # part of a layer's name
    batch: int | None = None
    quick: bool = False
    device: str = "cpu"
    effort: Effort = field(default_factory=Effort)

    def checked(self) -> Selection:
        """The same with its defaults filled in.

        Raises:
            UserError: a name or a number that makes no sense.
        """
        if self.device == "cuda":
            gpu.check_gpu()
            if self.threads:
                raise UserError("--threads says nothing of a GPU")
        most = 4 * (os.cpu_count() or 1)
        for threads in self.threads:
            if not 1 <= threads <= most:
                raise UserError(f"--threads must be from 1 to {most} here, got {threads}")
        if self.batch is not None and self.batch < 1:
            raise UserError(f"--batch must be at least 1, got {self.batch}")
        if self.effort.rounds < 1:
            raise UserError(f"--rounds must be at least 1, got {self.effort.rounds}")
        dtypes = DTYPES if self.device == "cpu" else gpu.DTYPES
        algorithms = convext.algorithms(self.device)
        return replace(
            self,
            groups=_names("--groups", self.groups, (*GROUPS, EPOCH), usual=tuple(GROUPS)),
            passes=_names("--passes", self.passes, PASSES),
            layouts=_names("--layouts", self.layouts, tuple(FORMATS)),
            dtypes=_names("--dtypes", self.dtypes, tuple(dtypes), usual=("float32",)),
            threads=tuple(dict.fromkeys(self.threads))
            or ((1,) if self.device == "cpu" else (ON_GPU,)),
            algorithms=_names("--algorithms", self.algorithms, algorithms, usual=()),
        )

    def cases(self) -> list[Case]:
        """Those of this process, in the order of the groups."""
        with torch.device(self.device):
            return [
                case
                for group in GROUPS
                if group in self.groups
                for case in GROUPS[group](self.batch, self.quick)
                if case.what in self.passes
                and self.match in case.layer
                and (case.quick or not self.quick)
            ]


def _names(
    option: str, given: Sequence[str], known: tuple[str, ...], usual: tuple[str, ...] | None = None
) -> tuple[str, ...]:
    """The given ones in the order of the known; "all" is all, and none given is the usual."""
    for name in given:
        if name not in (*known, "all"):
            raise UserError(f"{option}: no {name!r}; expected all, or some of {', '.join(known)}")
    if not given:
        return known if usual is None else usual
    return known if "all" in given else tuple(name for name in known if name in given)


@dataclass
class Run:
    """Measures a selection, row by row.

    Attributes:
        peaks: by (dtype, threads), measured before the first row of each.
        left_out: cases for which a quick run had no time.
    """

    selection: Selection
    peaks: dict[tuple[str, int], Peaks] = field(default_factory=dict)
    left_out: int = 0

    def __iter__(self) -> Iterator[Row]:
        """Rows as they are measured."""
        chosen = self.selection
        listed = chosen.cases()
        if not listed and EPOCH not in chosen.groups:
            raise UserError("nothing to measure: no case has all that was asked for")
        end = time.monotonic() + QUICK_SECONDS
        before = torch.get_num_threads()
        try:
            for threads in chosen.threads:
                if threads != ON_GPU:
                    torch.set_num_threads(threads)
                for dtype in chosen.dtypes:
                    self.peaks[dtype, threads] = self._measure_peaks(dtype, threads)
                    for case in listed:
                        if chosen.quick and time.monotonic() > end:
                            self.left_out += 1
                        else:
                            yield self._row(case, dtype, threads)
                if EPOCH in chosen.groups:
                    yield measure_epoch(threads, rounds=1 if chosen.quick else 3)
        finally:
            torch.set_num_threads(before)

    def _measure_peaks(self, dtype: str, threads: int) -> Peaks:
        if threads == ON_GPU:
            gpu.set_precision(dtype)
            return gpu.measure_peaks(dtype)
        return measure_peaks(DTYPES[dtype], threads)

    def names(self, case: Case) -> tuple[str, ...]:
        """Of our calls for a case."""
        return (*case.ours, *self.selection.algorithms) if case.chooses else case.ours

    def _row(self, case: Case, dtype: str, threads: int) -> Row:
        calls: dict[tuple[str, str], Call] = {}
        declined: dict[str, str] = {}
        chosen: dict[str, str] = {}
        on_gpu = threads == ON_GPU
        element = gpu.DTYPES[dtype] if on_gpu else DTYPES[dtype]
        for layout in self.selection.layouts:
            with torch.device(self.selection.device):
                made = case.make(element, FORMATS[layout])
            for name in (STOCK, *self.names(case)):
                # What the others can't do is a mistake, and not to be passed over.
                may_decline = name in (WINOGRAD, *convext.algorithms(self.selection.device))
                obstacle = _obstacle(made[name]) if may_decline else None
                if obstacle:
                    declined[name] = obstacle
                else:
                    calls[name, layout] = made[name]
            if case.chooses:
                made[AUTO]()
                by_pass = convext.last_algorithm()._asdict()
                chosen[layout] = by_pass[case.what]
                if on_gpu:
                    calls[DETERMINISTIC, layout] = gpu.deterministic(made[STOCK])
        clock = gpu.Clock() if on_gpu else seconds
        times = sample_in_turn(calls, self.selection.effort, clock)
        ours: dict[str, dict[str, list[float]]] = {}
        for (name, layout), samples in times.items():
            ours.setdefault(name, {})[layout] = samples
        size = case.elements * element.itemsize
        return Row(
            group=case.group,
            part=case.part,
            layer=case.layer,
            what=case.what,
            dtype=dtype,
            threads=threads,
            torch=ours.pop(STOCK),
            ours=ours,
            batch=case.batch,
            count=case.count,
            flops=case.flops,
            bytes=size,
            bound=self.peaks[dtype, threads].bound(case.flops, size),
            declined=declined,
            chosen=chosen,
        )


def _obstacle(call: Call) -> str | None:
    """Why an algorithm can't do this, in its own words."""
    try:
        call()
    except ValueError as error:
        return str(error)
    return None
