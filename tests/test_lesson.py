"""docs/lesson13.md: each snippet runs and holds, and each question of the lesson has an answer."""

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from convext.mnist.model import lesson_cnn

PAGE = Path(__file__).resolve().parents[1] / "docs" / "lesson13.md"
TEXT = PAGE.read_text(encoding="utf-8")

pytestmark = pytest.mark.filterwarnings("ignore::Warning:fastai")  # theirs, for one test here

# What the lesson asks for, in its order, and the heading that answers it.
QUESTIONS = {
    "feature": "what-is-a-feature",
    "top edge detector": "which-kernel-finds-top-edges",
    "3x3 at a pixel": "what-does-a-3x3-kernel-compute-at-one-pixel",
    "kernel on zeros": "what-does-a-kernel-give-on-zeros",
    "padding": "what-is-padding",
    "stride": "what-is-stride",
    "list comprehension": "how-does-a-nested-list-comprehension-apply-a-kernel",
    "shapes": "which-shapes-do-input-and-weight-have",
    "channel": "what-is-a-channel",
    "conv as matrix": "how-is-a-convolution-a-matrix-multiplication",
    "CNN": "what-is-a-convolutional-neural-network",
    "refactoring": "why-refactor-the-definition-of-a-network",
    "Flatten": "what-is-flatten-and-where-is-it-needed",
    "NCHW": "what-does-nchw-mean",
    "7*7*(1168-16)": "why-does-the-third-layer-do-771168-16-multiplications",
    "receptive field": "what-is-a-receptive-field",
    "two stride-2 convolutions": "how-large-is-it-after-two-stride-2-convolutions",
    "precedents": "how-are-precedents-traced",
    "recent ideas": "where-do-new-ideas-turn-up",
    "colour": "how-is-a-colour-picture-a-tensor",
    "colour input": "how-does-a-convolution-take-a-colour-input",
    "DataLoaders and first": "how-can-the-data-in-dataloaders-be-seen",
    "doubling filters": "why-double-the-filters-at-each-stride-2-convolution",
    "larger first kernel": "why-is-the-first-kernel-larger",
    "ActivationStats": "what-does-activationstats-save",
    "callbacks": "how-is-a-callback-reached-after-training",
    "layer statistics": "what-does-plot_layer_stats-show",
    "near zero": "why-are-activations-near-zero-a-problem",
    "batch size": "what-does-a-larger-batch-bring-and-cost",
    "low rate at the start": "why-not-start-with-a-high-learning-rate",
    "1cycle": "what-is-1cycle-training",
    "high learning rate": "what-does-a-high-learning-rate-bring",
    "low rate at the end": "why-end-with-a-low-learning-rate",
    "momentum": "what-is-cyclical-momentum",
    "Recorder": "which-callback-keeps-the-hyperparameters",
    "color_dim": "what-is-one-column-of-color_dim",
    "bad training": "what-does-bad-training-look-like",
    "batch norm": "what-does-batch-norm-learn",
    "batch norm's statistics": "which-statistics-does-batch-norm-use-and-when",
    "generalisation": "why-do-networks-with-batch-norm-generalise-better",
    "other features": "which-features-came-before-cnns",
    "other norms": "which-other-normalisations-are-there",
    "activation order": "activation-before-or-after-batch-norm",
}


@dataclass(frozen=True)
class Section:
    """One question: its heading's anchor, its prose, and its snippets with their line numbers."""

    anchor: str
    prose: str
    snippets: tuple[tuple[int, str], ...]


def anchor(heading: str) -> str:
    """The name that a Markdown page on the web gives a heading, for links."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def sections() -> list[Section]:
    found = []
    for match in re.finditer(r"^### (.+)\n((?:(?!^##).*\n?)*)", TEXT, re.MULTILINE):
        heading, body = match.groups()
        snippets = tuple(
            (TEXT.count("\n", 0, match.start(2) + code.start(1)), code[1])
            for code in re.finditer(r"^```python\n(.*?)^```$", body, re.MULTILINE | re.DOTALL)
        )
        prose = re.sub(r"^```.*?^```$", "", body, flags=re.MULTILINE | re.DOTALL)
        found.append(Section(anchor(heading), prose, snippets))
    return found


SECTIONS = sections()


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.anchor)
def test_the_snippet_runs_and_holds(section):
    ((line, code),) = section.snippets
    if "load_digits" in code:
        pytest.importorskip("sklearn", reason="the digits need the extra convext[digits]")
    if "inspection.features" in code:
        pytest.importorskip("skimage", reason="features need the extra convext[features]")
    assert re.search(r"^ *(assert |torch\.testing\.assert_close\()", code, re.MULTILINE)
    # Padded by lines, so that a failure names the page's own line.
    exec(compile("\n" * line + code, str(PAGE), "exec"), {"__name__": section.anchor})


def test_every_question_has_an_answer_and_nothing_else_is_asked():
    assert [section.anchor for section in SECTIONS] == list(QUESTIONS.values())


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.anchor)
def test_an_answer_is_a_few_sentences(section):
    assert 1 <= len(re.findall(r"(?<!et al)\.(?=\s)", section.prose)) <= 4


def test_links_lead_to_headings_and_all_are_linked():
    headings = [anchor(h) for h in re.findall(r"^##+ (.+)$", TEXT, re.MULTILINE)]
    links = re.findall(r"\]\(#([^)]+)\)", TEXT)
    assert len(set(headings)) == len(headings)
    assert set(links) == set(headings)


def test_papers_named_are_listed_and_the_other_way_round():
    answers, sources = TEXT.split("\n## Sources\n")
    name = r"([A-Z]\w+)(?: and [A-Z]\w+| et al\.)?"
    named = set(re.findall(rf"{name} \(?((?:19|20)\d\d)\b", " ".join(answers.split())))
    listed = set(re.findall(r"^- (\w+).*?\(((?:19|20)\d\d)\)", sources, re.MULTILINE))
    assert len(listed) == sources.count("\n- ")
    assert named - {("June", "2024")} == listed


# --------------------------------------------------------------------------------------------------
# What the page says of fastai, asked of fastai


@pytest.fixture(scope="module")
def learner(tmp_path_factory):
    """A Learner that has trained the lesson's network for an epoch of five batches, on noise."""
    reason = "fastai is not installed (tests/requirements-no-deps.txt says how)"
    pytest.importorskip("fastai.learner", reason=reason, exc_type=ImportError)
    from fastai import basics
    from fastai.callback import schedule  # noqa: F401  (it patches fit_one_cycle into Learner)
    from fastai.callback.hook import ActivationStats

    torch.manual_seed(0)
    data = TensorDataset(torch.rand(80, 1, 28, 28), torch.randint(10, (80,)))
    loader = basics.DataLoaders(DataLoader(data, 16), DataLoader(data, 16))
    learner = basics.Learner(
        loader,
        lesson_cnn(),
        loss_func=F.cross_entropy,
        cbs=ActivationStats(with_hist=True),
        path=tmp_path_factory.mktemp("fastai"),
    )
    outputs = []
    learner.model.conv4.register_forward_hook(
        lambda layer, _, output: outputs.append(output.detach().clone()) if layer.training else None
    )
    with learner.no_bar(), learner.no_logging():
        learner.fit_one_cycle(1, 0.06)
    learner.outputs = outputs
    return learner


def test_activation_stats_are_those_of_the_page(learner):
    layers = [name for name, m in learner.model.named_children() if list(m.parameters())]
    stats = learner.activation_stats.stats
    assert [len(batch) for batch in stats] == [len(layers)] * 5
    for batch, output in zip(stats, learner.outputs, strict=True):
        entry = batch[layers.index("conv4")]
        assert set(entry) == {"mean", "std", "near_zero", "hist"}
        assert entry["near_zero"] == pytest.approx((output <= 0.05).float().mean().item())
        assert torch.equal(entry["hist"], output.histc(40, 0, 10))
    column = learner.activation_stats.hist(layers.index("conv4"))
    assert column.shape == (40, 5)
    torch.testing.assert_close(column[:, 0], stats[0][layers.index("conv4")]["hist"].log1p())


def test_the_recorder_has_the_schedule(learner):
    rates, momenta = learner.recorder.hps["lr"], learner.recorder.hps["mom"]
    assert len(learner.recorder.lrs) == len(learner.recorder.losses) == len(rates) == 5
    assert rates[0] == pytest.approx(0.06 / 25)
    assert momenta[0] == pytest.approx(0.95)
    assert learner.recorder is next(cb for cb in learner.cbs if type(cb).__name__ == "Recorder")


def test_first_gives_one_batch(learner):
    from fastcore.basics import first

    images, labels = first(learner.dls.train)
    assert (images.shape, labels.shape) == ((16, 1, 28, 28), (16,))
