"""What "auto" chooses: the table of reasons, and permission for Winograd."""

import threading

import pytest
import torch
from problems import FORMS, PROBLEMS, Conv2dProblem, named
from reference import PASSES, Operands, convext_pass
from reference import operands as make_operands
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.utils._python_dispatch import TorchDispatchMode

import convext
from convext import _C, functional

P = Conv2dProblem
ROWS = _C.auto_rows()
WINOGRADS = [name for name in convext.algorithms() if name.startswith("winograd")]


def run(p, conv_pass="forward", algorithm="auto", dtype=torch.float32, layout="contiguous"):
    data = Operands(*map(FORMS[layout], make_operands(p, dtype)))
    return convext_pass(p, conv_pass, data, algorithm)


def last(conv_pass):
    """(algorithm, reason) of the last call of a pass."""
    return tuple(getattr(f(), conv_pass) for f in (convext.last_algorithm, convext.last_reason))


def in_thread(function):
    """What it returns in a thread of its own."""
    returned = []
    thread = threading.Thread(target=lambda: returned.append(function()))
    thread.start()
    thread.join()
    return returned[0]


# --------------------------------------------------------------------------------------------------
# The table


@pytest.mark.parametrize(
    ("p", "conv_pass", "permission", "names"),
    [
        (P("", 1, 16, 12, 13, 16, (3, 3), (1, 1), (1, 1)), "forward", "+winograd", WINOGRADS),
        (P("", 1, 16, 12, 13, 16, (3, 3), (1, 1), (1, 1)), "forward", "", []),
        (P("", 1, 16, 11, 13, 16, (3, 3), (1, 1), (1, 1)), "forward", "+winograd", []),
        (P("", 1, 15, 12, 13, 16, (3, 3), (1, 1), (1, 1)), "forward", "+winograd", []),
        (P("", 1, 16, 12, 13, 15, (3, 3), (1, 1), (1, 1)), "forward", "+winograd", []),
        (P("", 1, 16, 24, 26, 16, (3, 3), (2, 1), (1, 1)), "forward", "+winograd", []),
        (P("", 1, 16, 24, 26, 16, (3, 2), (1, 1), (1, 1)), "forward", "+winograd", []),
        (P("", 1, 5, 9, 8, 5, (3, 3), groups=5), "forward", "", ["depthwise"]),
        (P("", 1, 3, 9, 8, 8, (3, 3)), "grad_input", "", ["im2col"]),
        (P("", 1, 4, 9, 8, 8, (3, 3)), "grad_input", "", []),
        (P("", 1, 3, 9, 8, 7, (3, 3)), "grad_input", "", []),
        (P("", 1, 3, 9, 8, 8, (3, 3)), "forward", "", []),
        (P("", 1, 3, 9, 8, 8, (3, 3)), "grad_weight", "", []),
        (P("", 1, 4, 9, 8, 4, (3, 3), groups=2), "forward", "", []),
    ],
    ids=str,
)
def test_each_row_decides(p, conv_pass, permission, names):
    run(p, conv_pass, "auto" + permission)
    expected = next((name for name in names if name in convext.algorithms()), "direct")
    assert last(conv_pass) == (expected, dict(ROWS)[expected])


@pytest.mark.parametrize("p", PROBLEMS, ids=str)
def test_every_problem_has_a_reason(p):
    for conv_pass in PASSES:
        run(p, conv_pass)
        assert last(conv_pass) in ROWS


def test_the_last_row_takes_what_is_left():
    assert ROWS[-1][0] == "direct"
    assert {name for name, _ in ROWS} >= set(convext.algorithms())


@pytest.mark.parametrize("name", ["lesson layer 1", "depthwise", "stem of 3 channels"])
def test_same_answer_and_bits_for_any_threads_and_isa(name, restore_threads, restore_isa):
    p = named(name)
    for conv_pass in PASSES:
        answers = set()
        for isa in _C.cpu_isas():
            _C.set_cpu_isa(isa)
            results = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(run(p, conv_pass))
                answers.add(last(conv_pass))
            assert all(torch.equal(results[0], result) for result in results)
        assert len(answers) == 1


def test_reason_of_a_name():
    run(named("plain"), algorithm="im2col")
    assert last("forward") == ("im2col", "asked for by name")


# --------------------------------------------------------------------------------------------------
# allow_winograd: what the ops are told


class Told(TorchDispatchMode):
    """Collects the algorithm that each of our ops is called with."""

    def __init__(self):
        super().__init__()
        self.algorithms = {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        names = [argument.name for argument in op._schema.arguments]
        if op.namespace == "convext" and "algorithm" in names:
            given = dict(zip(names, args, strict=False)) | (kwargs or {})
            self.algorithms[op._schema.name.split("::")[1]] = given.get("algorithm", "auto")
        return op(*args, **(kwargs or {}))


def told(function):
    with Told() as mode:
        function()
    return mode.algorithms


def operands():
    return torch.randn(2, 3, 6, 5, requires_grad=True), torch.randn(4, 3, 3, 2, requires_grad=True)


def forward():
    return functional.conv2d(*operands())


PERMITTED, PLAIN = {"conv2d": "auto+winograd"}, {"conv2d": "auto"}


@pytest.fixture(autouse=True)
def _as_a_new_process():
    """Tests of functions that last."""
    yield
    convext.allow_winograd(False)


def test_permission_is_for_the_block():
    assert told(forward) == PLAIN
    with convext.allow_winograd():
        assert told(forward) == PERMITTED
        with convext.allow_winograd(False):
            assert told(forward) == PLAIN
            with convext.allow_winograd():
                assert told(forward) == PERMITTED
            assert told(forward) == PLAIN
        assert told(forward) == PERMITTED
    assert told(forward) == PLAIN


def test_permission_as_a_function():
    convext.allow_winograd()
    assert told(forward) == PERMITTED
    with convext.allow_winograd(False):
        assert told(forward) == PLAIN
    assert told(forward) == PERMITTED
    convext.allow_winograd(False)
    assert told(forward) == PLAIN


def test_permission_ends_with_an_exception():
    with pytest.raises(RuntimeError, match="size"), convext.allow_winograd():
        functional.conv2d(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 3, 3))
    assert told(forward) == PLAIN


def test_permission_is_for_the_thread():
    with convext.allow_winograd():
        assert in_thread(lambda: told(forward)) == PLAIN
    in_thread(convext.allow_winograd)
    assert told(forward) == PLAIN


def test_names_need_no_permission():
    with convext.allow_winograd():
        assert told(lambda: functional.conv2d(*operands(), algorithm="im2col")) == {
            "conv2d": "im2col"
        }
    assert told(lambda: convext.Conv2d(3, 4, 3, algorithm="auto+winograd")(operands()[0])) == (
        PERMITTED
    )


@pytest.mark.parametrize("allowed", [True, False])
def test_gradients_go_by_the_rule_of_the_forward_pass(allowed):
    with convext.allow_winograd(allowed):
        tensors = operands()
        output = functional.conv2d(*tensors)
    with convext.allow_winograd(not allowed), Told() as mode:
        grads = torch.autograd.grad(output.square().sum(), tensors, create_graph=True)
        sum(grad.square().sum() for grad in grads).backward()
    expected = "auto+winograd" if allowed else "auto"
    assert set(mode.algorithms) == {"conv2d", "conv2d_backward_input", "conv2d_backward_weight"}
    assert set(mode.algorithms.values()) == {expected}


@pytest.mark.parametrize("training", [True, False])
def test_fused_block_takes_the_permission(training):
    block = convext.ConvBlock2d(3, 4, 3).train(training)
    with Told() as mode:
        with convext.allow_winograd():
            output = block(operands()[0])
        output.sum().backward()
    assert len(mode.algorithms) == 3
    assert set(mode.algorithms.values()) == {"auto+winograd"}


@pytest.mark.parametrize(
    "transform",
    [
        lambda f, x: torch.func.grad(lambda x: f(x).sum())(x),
        lambda f, x: torch.func.vmap(f)(x[None]),
        lambda f, x: torch.func.jvp(f, (x,), (x,)),
        lambda f, x: torch.func.hessian(lambda x: f(x).square().sum())(x),
    ],
    ids=["grad", "vmap", "jvp", "hessian"],
)
def test_transforms_take_the_permission(transform):
    x, weight = (tensor.detach() for tensor in operands())
    with convext.allow_winograd():
        found = told(lambda: transform(lambda x: functional.conv2d(x, weight), x))
    assert set(found.values()) == {"auto+winograd"}


def compiled(function):
    """`function`, compiled without graph breaks; and the algorithms in its graphs, in order."""
    found = []

    def record(graph, inputs):
        for node in graph.graph.nodes:
            if str(node.target).startswith("convext.conv2d"):
                found.append(next((a for a in node.args if isinstance(a, str)), "auto"))
        return make_boxed_func(graph)

    backend = aot_autograd(fw_compiler=record, bw_compiler=record)
    return torch.compile(function, backend=backend, fullgraph=True), found


def test_compiled_code_follows_the_permission():
    function, found = compiled(lambda x, weight: functional.conv2d(x, weight).sum())
    for allowed in (False, True):
        found.clear()
        tensors = operands()
        with convext.allow_winograd(allowed):
            loss = function(*tensors)
        loss.backward()
        assert found == ["auto+winograd" if allowed else "auto"] * 3
    found.clear()
    function(*operands()).backward()
    assert not found  # what was compiled first serves again


def test_permission_inside_compiled_code():
    def two(x, weight):
        with convext.allow_winograd():
            y = functional.conv2d(x, weight)
        return y + functional.conv2d(x, weight)

    function, found = compiled(two)
    function(*(tensor.detach() for tensor in operands()))
    assert found == ["auto+winograd", "auto"]
    assert told(forward) == PLAIN


def test_exported_program_keeps_the_permission():
    layer = convext.Conv2d(3, 4, 3)
    with convext.allow_winograd():
        program = torch.export.export(layer, (torch.randn(2, 3, 6, 5),))
    assert told(lambda: program.module()(torch.randn(2, 3, 6, 5))) == PERMITTED


def test_permission_changes_nothing_where_winograd_declines():
    p = named("lesson layer 2")
    for conv_pass in PASSES:
        plain = run(p, conv_pass)
        before = last(conv_pass)
        assert torch.equal(run(p, conv_pass, "auto+winograd"), plain)
        assert last(conv_pass) == before
