"""What compute-sanitizer looks on at: every algorithm, batch norm and the block, on small problems.

Results are compared with the CPU's, so that what was watched is known to have run.
"""

import itertools

import torch
from problems import PROBLEMS, SMALL, Conv2dProblem
from reference import PASSES, declines, operands

import convext
from convext import functional

# (dtype, what a float32 product may be rounded to)
DTYPES = ((torch.float32, "ieee"), (torch.float32, "tf32"), (torch.bfloat16, "ieee"))
FORMATS = (torch.contiguous_format, torch.channels_last)


def chosen() -> list[Conv2dProblem]:
    """A dozen of different kinds: small ones, and of those that have more than one tile."""
    tiled = [p for p in PROBLEMS if p not in SMALL and p.multiplications < 2**20]
    return [*SMALL[1::4], *tiled[:: len(tiled) // 6]]


def convolve(problem, conv_pass, dtype, memory_format, algorithm, device):
    """One pass, on the CPU by whatever algorithm."""
    data = operands(problem, dtype)
    ops, settings = torch.ops.convext, problem.settings
    named = algorithm if device == "cuda" else "auto"

    def placed(tensor):
        tensor = tensor.contiguous(memory_format=memory_format) if tensor.dim() == 4 else tensor
        return tensor.to(device)

    if conv_pass == "forward":
        bias = None if data.bias is None else placed(data.bias)
        return ops.conv2d(placed(data.input), placed(data.weight), bias, *settings, named)
    grad = placed(data.grad_output)
    if conv_pass == "grad_input":
        size = problem.input_size
        return ops.conv2d_backward_input(grad, placed(data.weight), size, *settings, named)
    size = problem.weight_size
    return ops.conv2d_backward_weight(grad, placed(data.input), size, *settings, named)


def blocks(dtype, memory_format, device):
    """Batch norm and the block in both orders, forward and backward."""
    torch.manual_seed(0)
    x = torch.randn(3, 5, 9, 7).to(dtype).contiguous(memory_format=memory_format).to(device)
    weight = torch.randn(6, 5, 3, 3).to(dtype).contiguous(memory_format=memory_format).to(device)
    results = []
    for order in ("conv-relu-norm", "conv-norm-relu"):
        for training in (True, False):
            operands = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
            running = torch.zeros(6, device=device), torch.ones(6, device=device)
            y = functional.conv_block(
                *operands, None, *running, padding=1, training=training, order=order
            )
            results += [y, *torch.autograd.grad(y.square().sum(), operands)]
    return results


def main() -> None:
    """Run everything once; the first difference is an error."""
    count = 0
    layouts = tuple(itertools.product(DTYPES, FORMATS))
    for (kind, memory_format), problem, conv_pass in itertools.product(layouts, chosen(), PASSES):
        dtype, torch.backends.cudnn.conv.fp32_precision = kind
        for algorithm in convext.algorithms("cuda"):
            if declines(algorithm, problem):
                continue
            arguments = (problem, conv_pass, dtype, memory_format, algorithm)
            try:
                result = convolve(*arguments, "cuda")
            except ValueError:
                continue  # which the tests look into
            compare(result, convolve(*arguments, "cpu"), arguments)
            count += 1
    for (dtype, _), memory_format in layouts:
        ours, expected = (blocks(dtype, memory_format, device) for device in ("cuda", "cpu"))
        for one, other in zip(ours, expected, strict=True):
            compare(one, other, (dtype, memory_format))
            count += 1
    print(f"{count} results as on the CPU")


def compare(result, expected, what) -> None:
    """Coarsely: errors are measured elsewhere."""
    assert result.shape == expected.shape
    if not expected.numel():
        return
    scale = expected.abs().max().clamp(min=1e-3).item()
    rtol = 0.01 if expected.dtype == torch.float32 else 0.05
    error = (result.cpu().float() - expected.float()).abs().max().item()
    assert error <= rtol * scale, (what, error, scale)


if __name__ == "__main__":
    main()
