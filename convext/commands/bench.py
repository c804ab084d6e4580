"""`convext bench`: what is timed, and how."""

from __future__ import annotations

import argparse


def add(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "bench",
        help="time our kernels beside PyTorch's",
        description="Times our kernels and PyTorch's in turn, in one process, and prints a "
        "Markdown table as it goes, then every goal with its figure. Names are separated by "
        "spaces; 'all' stands for all of them.",
    )
    add = parser.add_argument
    several = {"nargs": "+", "default": [], "metavar": "NAME"}
    add(
        "--groups",
        **several,
        help="mnist, resnet50, vgg16, mobilenet, batchnorm, step, block, overhead (default: "
        "these), epoch (one of `convext train`)",
    )
    add("--passes", **several, help="forward, grad_input, grad_weight, eval, ... (default: all)")
    add("--layouts", **several, help="NCHW, channels_last (default: both)")
    add("--dtypes", **several, help="float32, float64, bfloat16, float16 (default: float32)")
    add(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="cuda measures on a GPU beside cuDNN, and knows tf32 as a dtype (default: cpu)",
    )
    add("--threads", nargs="+", default=[], type=int, metavar="N", help="(default: 1)")
    add("--algorithms", **several, help="to time besides auto (default: none)")
    add("--match", default="", metavar="TEXT", help="only layers whose name has it: '3x3 s2'")
    add("--batch", type=int, metavar="N", help="images (default: each group's own)")
    add("--rounds", type=int, metavar="N", help="samples of each call (default: 15; quick: 9)")
    add(
        "--quick",
        action="store_true",
        help="few layers of the large networks, one image, short samples: below three minutes",
    )
    add(
        "--regret",
        action="store_true",
        help="time every algorithm, and say how far auto is from the best",
    )
    add("--report", metavar="DIR", help="write report.md, report.json and plots into this folder")

    def run(args: argparse.Namespace) -> None:
        from convext.bench.command import bench

        bench(args)

    parser.set_defaults(run=run)
