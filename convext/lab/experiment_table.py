"""An experiment's results as a table: for a terminal, in colour, in Markdown."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from convext.lab.experiment import METRICS, Results

if TYPE_CHECKING:
    from rich.table import Table


def cells(results: Results) -> list[tuple[str, ...]]:
    """The head, and a row for each variant that was trained."""
    metrics = results.experiment.metrics
    head = ("variant", *(METRICS[metric].title for metric in metrics))
    rows = [
        (label, *(results.cell(label, metric) for metric in metrics)) for label in results.trained
    ]
    return [head, *rows]


def text(results: Results) -> str:
    """Title, table, claim and what was measured."""
    lines = cells(results)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = [
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    rule = "-" * len(table[0])
    words = (textwrap.fill(paragraph, 100) for paragraph in below(results))
    return "\n".join([title(results), "", table[0], rule, *table[1:], "", *words])


def table(results: Results) -> Table:
    """The same for rich, without the words."""
    from rich import box
    from rich.table import Table

    head, *rows = cells(results)
    made = Table(title=title(results), box=box.SIMPLE_HEAD, title_style="", title_justify="left")
    for place, name in enumerate(head):
        made.add_column(name, justify="right" if place else "left", no_wrap=place > 0)
    for row in rows:
        made.add_row(*row)
    return made


def markdown(results: Results, picture: str) -> str:
    """A section of a page: question, command, claim, table, picture, what was measured."""
    head, *rows = cells(results)
    experiment, found = results.experiment, results.settings
    lines = [
        f"## {experiment.name}: {experiment.question}",
        f"    convext lab {experiment.name} --data {found['data']} --seeds {found['seeds']} "
        f"--epochs {found['epochs']} --train-images {found['train_images']} "
        f"--threads {found['threads']}",
        f"The lesson says: {experiment.claim}",
        "\n".join(
            [
                f"| {' | '.join(head)} |",
                f"|---|{'---:|' * (len(head) - 1)}",
                *(f"| {' | '.join(row)} |" for row in rows),
            ]
        ),
        f"{setting(results)}.",
        f"![{experiment.question}]({picture})",
        *below(results)[1:],
    ]
    return "\n\n".join(lines) + "\n"


def title(results: Results) -> str:
    """Question and setting."""
    return f"{results.experiment.question} {setting(results)}"


def setting(results: Results) -> str:
    """What was trained on, for how long."""
    found = results.settings
    return (
        f"{found['data']}, {found['train_images']:,} images, epochs: {found['epochs']}, "
        f"seeds: {found['seeds']}, threads: {found['threads']}; mean ± standard deviation of seeds"
    )


def below(results: Results) -> list[str]:
    """Claim, what was measured, what was refused; a paragraph each."""
    experiment = results.experiment
    return [
        f"The lesson says: {experiment.claim}",
        f"Measured: {experiment.measured(results)}",
        *(f"{label}: not trained. {message}" for label, message in results.refused.items()),
    ]
