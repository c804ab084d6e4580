"""The sizes of one convolution and what follows from them, for benchmarks and tests."""

from dataclasses import dataclass

Pair = tuple[int, int]


@dataclass(frozen=True)
class Conv2dProblem:
    """Sizes and settings of a conv2d, pairs being (height, width)."""

    name: str
    N: int
    C: int
    H: int
    W: int
    O: int  # noqa: E741
    kernel: Pair
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1

    def __str__(self) -> str:
        return self.name

    @property
    def input_size(self) -> tuple[int, int, int, int]:
        return (self.N, self.C, self.H, self.W)

    @property
    def weight_size(self) -> tuple[int, int, int, int]:
        return (self.O, self.C // self.groups, *self.kernel)

    @property
    def output_size(self) -> tuple[int, int, int, int]:
        axes = zip(
            (self.H, self.W), self.kernel, self.stride, self.padding, self.dilation, strict=True
        )
        return (self.N, self.O, *((i + 2 * p - d * (k - 1) - 1) // s + 1 for i, k, s, p, d in axes))

    @property
    def settings(self) -> tuple[list[int], list[int], list[int], int]:
        """Stride, padding, dilation and groups, as the ops take them."""
        return list(self.stride), list(self.padding), list(self.dilation), self.groups

    @property
    def multiplications(self) -> int:
        """Of one pass, those with padding included."""
        n, o, height, width = self.output_size
        return n * o * height * width * self.C // self.groups * self.kernel[0] * self.kernel[1]

    @property
    def needed_multiplications(self) -> int:
        """Of one pass, those with padding left out; any pass has the same."""
        taps = 1  # pairs of an output pixel and a weight that meet in the input
        for axis, (size, out) in enumerate(
            zip(self.input_size[2:], self.output_size[2:], strict=True)
        ):
            starts = [y * self.stride[axis] - self.padding[axis] for y in range(out)]
            steps = [k * self.dilation[axis] for k in range(self.kernel[axis])]
            taps *= sum(0 <= start + step < size for start in starts for step in steps)
        return taps * self.N * self.O * self.C // self.groups

    def terms(self, conv_pass: str) -> int:
        """Products that one element of the pass's result sums, at most."""
        taps = self.kernel[0] * self.kernel[1]
        n, _, height, width = self.output_size
        return {
            "forward": self.C // self.groups * taps,
            "grad_input": self.O // self.groups * taps,
            "grad_weight": n * height * width,
        }[conv_pass]
