"""Calls the raw convolution ops with random arguments, most of them bad: a program of its own, for
a crash must not take the tests along (tests/test_conv2d_errors.py runs it).

Every call either agrees with PyTorch or raises an ordinary exception. Prints the number of each.

    python tests/fuzz_conv2d.py SEED COUNT
"""

import faulthandler
import random
import resource
import sys

import torch
from problems import FORMS, Conv2dProblem
from reference import PASSES, Operands, convext_pass, declines, expect

import convext
from convext import _C

ops = torch.ops.convext
HUGE = (2**31, 2**32, 2**33, 2**40, 2**59, 2**61, 2**62, 2**63 - 1, -1, -(2**63))
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def settings_of_a_valid_problem() -> Conv2dProblem:
    """A random problem that fits, about half of them with groups."""
    groups = random.choice((1, 1, 2, 3))
    kernel, stride, dilation = (
        (random.randint(1, most), random.randint(1, most)) for most in (4, 4, 3)
    )
    padding = (random.randint(0, 3), random.randint(0, 3))
    least = [
        max(1, d * (k - 1) + 1 - 2 * p) for k, d, p in zip(kernel, dilation, padding, strict=True)
    ]
    height, width = (n + random.randint(0, 9) for n in least)
    channels, filters = groups * random.randint(0, 9), groups * random.randint(1, 9)
    batch = random.choice((0, 1, 2, 3, 33))
    return Conv2dProblem(
        "fuzz", batch, channels, height, width, filters, kernel, stride, padding, dilation, groups
    )


def random_tensor(size, dtype: torch.dtype) -> torch.Tensor:
    """Of any form; where memory for the size would be too much, one element seen many times."""
    count = 1
    for n in size:
        count *= n
    if count > 2**20 or any(n > 2**20 for n in size):
        return torch.ones([min(n, 1) for n in size], dtype=dtype).expand(size)
    tensor = torch.randn(size).to(dtype)
    if tensor.dim() != 4 or not dtype.is_floating_point:
        return tensor
    return FORMS[random.choice(list(FORMS))](tensor)


def spoiled(numbers, chance: float) -> list[int]:
    """The same numbers, now and then one of them another, one more or one less."""
    numbers = list(numbers)
    if random.random() < chance and numbers:
        new = random.choice((0, -1, 1, 2, 5, *HUGE))
        numbers[random.randrange(len(numbers))] = new
    if random.random() < chance / 8:
        numbers = random.choice(([], numbers[:-1], [*numbers, 1]))
    return numbers


def tensor_size(numbers) -> list[int]:
    return [min(max(n, 0), 2**40) for n in numbers]


def agrees(p: Conv2dProblem) -> None:
    """A problem that fits gives the right result, whatever the form of its tensors."""
    dtype = random.choice(DTYPES)
    sizes = p.input_size, p.weight_size, (p.O,), p.output_size
    data = Operands(*(random_tensor(size, dtype) for size in sizes))
    able = [name for name in convext.algorithms() if not declines(name, p)]
    algorithm = random.choice(("auto", *able))
    for conv_pass in PASSES:
        result = convext_pass(p, conv_pass, data, algorithm)
        expect(p, conv_pass, data, algorithm).check(result)


def bad_call(p: Conv2dProblem):
    """A call of one op, some of whose arguments do not fit."""
    chance = random.choice((0.1, 0.5))
    dtypes = [random.choice(DTYPES)] * 3
    if random.random() < 0.1:
        dtypes[random.randrange(3)] = random.choice(
            (*DTYPES, torch.int32, torch.cfloat, torch.bool)
        )
    input, weight, bias, output = (
        random_tensor(tensor_size(spoiled(size, chance / 2)), dtype)
        for size, dtype in zip(
            (p.input_size, p.weight_size, (p.O,), p.output_size), (*dtypes, dtypes[0]), strict=True
        )
    )
    stride, padding, dilation = (spoiled(n, chance) for n in (p.stride, p.padding, p.dilation))
    groups = spoiled([p.groups], chance / 2)
    tail = (stride, padding, dilation, groups[0] if groups else 1)
    tail += (random.choice(("auto", *convext.algorithms(), *convext.algorithms(), "none")),)
    values = [
        random_tensor(tensor_size(spoiled((p.O,), chance / 2)), random.choice((dtype, dtypes[0])))
        for dtype in (torch.float32, dtypes[0], dtypes[0], dtypes[0])
    ]
    norm = [random.choice((value, None)) for value in values[:2]]
    *settings, algorithm = tail
    eps = random.choice((1e-5, 1e-5, 0.0, -1.0, float("nan")))
    order = random.choice(("conv-relu-norm", "conv-norm-relu", "norm"))
    block = (*norm, *settings, eps, order)
    return random.choice(
        (
            lambda: ops.conv_block_train(input, weight, bias, *block, algorithm),
            lambda: ops.conv_block_eval(
                input, weight, None, *values[2:], *block, random.random() < 0.5, algorithm
            ),
            lambda: ops.conv_block_backward(
                output, output, *values[2:], *norm, eps, random.random() < 0.5, order
            ),
            lambda: ops.conv2d(input, weight, random.choice((bias, None)), *tail),
            lambda: ops.conv2d_backward_input(output, weight, spoiled(p.input_size, chance), *tail),
            lambda: ops.conv2d_backward_weight(
                output, input, spoiled(p.weight_size, chance), *tail
            ),
            lambda: ops.conv2d_backward_bias(random.choice((output, bias))),
        )
    )


def main(seed: int, count: int) -> None:
    faulthandler.enable()
    # Allocations beyond this raise instead of bringing the machine down.
    resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))
    random.seed(seed)
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    outcomes = {"agreed": 0, "refused": 0, "accepted": 0}
    for i in range(count):
        _C.set_cpu_isa(random.choice(_C.cpu_isas()))
        problem = settings_of_a_valid_problem()
        try:
            if i % 4 == 0:
                agrees(problem)
                outcomes["agreed"] += 1
            else:
                call = bad_call(problem)
                try:
                    call()
                    outcomes["accepted"] += 1
                except (RuntimeError, ValueError, TypeError, MemoryError):
                    outcomes["refused"] += 1
        except BaseException:
            print(f"call {i} of seed {seed}: {problem!r}", file=sys.stderr)
            raise
    print(outcomes)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
