"""A trained network for other programs: a torch.export program, and ONNX."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import convext
from convext.mnist.run_folder import replacing

PROGRAM = "model.pt2"
ONNX = "model.onnx"
CLASSES = "classes.json"  # in the program an extra file, in ONNX a property
INPUT, OUTPUT = "images", "scores"
TOLERANCE = 1e-4  # of scores, in units of the largest if above 1; sums differ in their order
_CHECKED = (1, 3)  # batches of so many images


@dataclass(frozen=True)
class Exported:
    """What `export` wrote.

    Attributes:
        program: the path of model.pt2, for `torch.export.load`.
        onnx: the path of model.onnx.
        program_difference, onnx_difference: the largest between their scores and the model's on
            a few random images, in units of the largest score if that is above 1.
    """

    program: Path
    onnx: Path
    program_difference: float
    onnx_difference: float

    def __str__(self) -> str:
        return (
            f"{self.program}: torch.export program, stock layers; scores within "
            f"{self.program_difference:.1e} of the run's\n"
            f"{self.onnx}: ONNX, {INPUT} to {OUTPUT}; scores within "
            f"{self.onnx_difference:.1e} of the run's"
        )


def export(
    model: nn.Module, size: tuple[int, int, int], classes: Sequence[str], folder: str | Path
) -> Exported:
    """Writes a model as a torch.export program and as ONNX, and checks both by running them.

    They hold the equivalent of stock layers (`convext.restore_layers` on a copy), so that neither
    needs convext, in evaluation mode. They take images (N, C, H, W), float32 in [0, 1], for any N,
    and give scores (N, K), whose softmax the probabilities are. Both have the classes' names, as a
    JSON list: the program as its extra file "classes.json", ONNX as its property "classes".

    Args:
        model: from images to class scores; left as it is.
        size: (C, H, W) of an image.
        classes: their names, K.
        folder: where to write; made if need be. Files of another export are replaced.

    Raises:
        OSError: it can't be written there.
        RuntimeError: a file that does not compute what the model does; nothing is written then.
    """
    import onnx
    import onnxscript  # noqa: F401  torch.onnx needs it; where it is missing, this says so
    from onnx.reference import ReferenceEvaluator

    folder = Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    model = copy.deepcopy(model).eval()
    stock = convext.restore_layers(copy.deepcopy(model))
    names = json.dumps(list(classes))
    batches = [torch.rand(n, *size, generator=torch.Generator().manual_seed(n)) for n in _CHECKED]
    with _quiet():
        # An example of one image would make a program for one image.
        example = torch.zeros(2, *size)
        dynamic = ({0: torch.export.Dim("N")},)
        program = torch.export.export(stock, (example,), dynamic_shapes=dynamic)
        translated = torch.onnx.export(
            program, dynamo=True, input_names=[INPUT], output_names=[OUTPUT]
        )
        saved = io.BytesIO()
        torch.export.save(program, saved, extra_files={CLASSES: names})
        loaded = torch.export.load(saved).module()
    translated.model.metadata_props["classes"] = names
    graph = translated.model_proto
    onnx.checker.check_model(graph, full_check=True)
    evaluator = ReferenceEvaluator(graph)

    def run_onnx(images: Tensor) -> Tensor:
        return torch.from_numpy(evaluator.run([OUTPUT], {INPUT: images.numpy()})[0])

    program_difference = _difference(PROGRAM, loaded, model, batches)
    onnx_difference = _difference(ONNX, run_onnx, model, batches)
    for name, content in ((PROGRAM, saved.getvalue()), (ONNX, graph.SerializeToString())):
        with replacing(folder / name) as temporary:
            temporary.write_bytes(content)
    return Exported(folder / PROGRAM, folder / ONNX, program_difference, onnx_difference)


def _difference(
    name: str, found: Callable[[Tensor], Tensor], model: nn.Module, batches: Sequence[Tensor]
) -> float:
    largest = 0.0
    with torch.no_grad():
        for images in batches:
            scores = model(images)
            unit = max(1.0, float(scores.abs().max()))
            difference = float((found(images) - scores).abs().max()) / unit
            if not difference <= TOLERANCE:  # which a number that is none is not, either
                raise RuntimeError(
                    f"{name}: its scores differ from the model's by {difference:.1e}, where at "
                    f"most {TOLERANCE:.0e} was expected"
                )
            largest = max(largest, difference)
    return largest


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Within the block, the exporters' progress, warnings and advice are not shown."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)
