"""The figures of one case, and what many of them come to. Nothing here measures anything."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field

from convext.bench.timing import speedup, spread

NCHW, CHANNELS_LAST = "NCHW", "channels_last"
BETTER, SAME = "better", "same"  # which of torch's layouts a ratio is against
ON_GPU = 0  # threads of a row that was measured on a GPU
Samples = dict[str, list[float]]  # layout -> seconds per call


@dataclass
class Row:
    """Samples of one case; those at one place of the lists are neighbours in time."""

    group: str
    part: str
    layer: str
    what: str
    dtype: str
    threads: int
    torch: Samples
    ours: dict[str, Samples]  # by the name of the call: "auto", an algorithm, "ConvBlock2d", ...
    batch: int | None = None
    count: int = 1
    flops: int = 0
    bytes: int = 0
    bound: float = 0.0  # seconds, by the measured peaks; 0 where nobody counted
    declined: dict[str, str] = field(default_factory=dict)  # algorithm -> why it can't do this
    chosen: dict[str, str] = field(default_factory=dict)  # layout -> the algorithm that auto took

    def torch_layout(self) -> str:
        """The layout in which PyTorch is faster here."""
        return min(self.torch, key=lambda layout: statistics.median(self.torch[layout]))

    def layout(self, name: str) -> str:
        """The layout in which our call of that name is faster here."""
        return min(self.ours[name], key=lambda at: self.seconds(name, at))

    def seconds(self, name: str, layout: str) -> float:
        """Median of our call of that name."""
        return statistics.median(self.ours[name][layout])

    def ratio(self, name: str, layout: str, against: str = BETTER) -> float:
        """How many times as fast ours is as PyTorch in the same layout, in a named one, or in the
        better of those measured.
        """
        theirs = {BETTER: self.torch_layout(), SAME: layout}.get(against, against)
        return speedup(self.torch[theirs], self.ours[name][layout])

    @property
    def main(self) -> str:
        """The name of ours that speaks for us: the first."""
        return next(iter(self.ours))

    def rate(self) -> tuple[float, str] | None:
        """Operations or bytes per second of ours, in its better layout."""
        best = self.seconds(self.main, self.layout(self.main))
        if self.flops:
            return self.flops / best, "FLOP/s"
        return (self.bytes / best, "B/s") if self.bytes else None

    def share(self) -> float | None:
        """Of what the measured peaks allow, in our better layout."""
        if not self.bound:
            return None
        return self.bound / self.seconds(self.main, self.layout(self.main))

    def as_json(self) -> dict[str, object]:
        """Everything: samples and what is read off them."""
        named = {
            name: {
                layout: {
                    **_sampled(times),
                    "ratio_same_layout": _short(self.ratio(name, layout, SAME)),
                    "ratio_better_layout": _short(self.ratio(name, layout, BETTER)),
                }
                for layout, times in samples.items()
            }
            for name, samples in self.ours.items()
        }
        stock = {layout: _sampled(times) for layout, times in self.torch.items()}
        rate, share = self.rate(), self.share()
        return {
            **asdict(self),
            "torch": stock,
            "ours": named,
            "rate": _short(rate[0]) if rate else None,
            "rate_unit": rate[1] if rate else None,
            "share_of_peak": _short(share) if share is not None else None,
        }


def _sampled(times: list[float]) -> dict[str, object]:
    return {
        "median": _short(statistics.median(times)),
        "spread": _short(spread(times)),
        "samples": [_short(time) for time in times],
    }


def _short(value: float) -> float:
    return float(f"{value:.5g}")


def geometric_mean(values: Iterable[float]) -> float:
    """NaN of nothing."""
    logarithms = [math.log(value) for value in values]
    return math.exp(statistics.fmean(logarithms)) if logarithms else math.nan


def regret(row: Row, layout: str, names: Iterable[str], auto: str = "auto") -> float | None:
    """Auto's time over the best one's among the named and auto itself; None where auto had no
    choice, or none of them was timed.
    """
    others = [name for name in names if layout in row.ours.get(name, {})]
    if auto not in row.ours or len(others) < 2:
        return None
    best = min(row.seconds(name, layout) for name in (auto, *others))
    return row.seconds(auto, layout) / best
