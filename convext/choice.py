"""What "auto" may choose: permission for Winograd's algorithms."""

import threading


class _Thread(threading.local):
    winograd = False


# A plain attribute: torch.compile guards on it, and compiles again where it has changed.
_thread = _Thread()


class allow_winograd:  # noqa: N801, a function to its users, as torch.set_grad_enabled
    """Let "auto" choose Winograd's algorithms in this thread, or not; off by default.

    Winograd's minimal filtering (Lavin and Gray, 2016) computes a 3x3 convolution of stride 1 with
    less than half of the multiplications, and rounds more: expect errors of about 1e-5 of the
    largest result in float32, where a sum's are of about 1e-6.

    As a function it holds from here on; as a context manager it ends with the block::

        convext.allow_winograd()
        with convext.allow_winograd(False):
            exact = model(input)

    A call of a convolution under it takes the permission along, as if it were called with
    algorithm="auto+winograd", which can also be given to a single layer. So gradients of any order
    go by the rule of their forward pass, wherever they are computed; a graph made by torch.compile,
    torch.export or torch.jit.trace keeps what held where it was made (compiled code is compiled
    again where that changes). Activation checkpointing calls the forward pass again in the backward
    pass, which must then be under the same rule. The ops of `torch.ops.convext` know only their
    arguments. Algorithms named, "winograd" too, need no permission.

    Args:
        mode: True allows, False forbids.
    """

    def __init__(self, mode: bool = True) -> None:
        self.mode = mode
        self._before = _thread.winograd
        _thread.winograd = mode

    def __enter__(self) -> None:
        _thread.winograd = self.mode

    def __exit__(self, *_: object) -> None:
        _thread.winograd = self._before


def permitted(algorithm: str) -> str:
    """The algorithm as the ops take it, which know nothing of a thread's permission."""
    return "auto+winograd" if algorithm == "auto" and _thread.winograd else algorithm
