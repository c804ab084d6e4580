"""Looking inside a network: any torch.nn.Module, stock layers or ours.

Every function returns data first; drawing is a step of its own.
"""

from convext.inspection import features, filters
from convext.inspection.conv_matrix import ConvMatrix, conv_matrix
from convext.inspection.filter_plot import plot_filters
from convext.inspection.page import write_page
from convext.inspection.precedents import LayerCells, Trace, dependents, precedents
from convext.inspection.receptive_field import (
    FieldCheck,
    FieldRow,
    ReceptiveFields,
    receptive_field,
)
from convext.inspection.show import (
    Activations,
    LayerFilters,
    LayerMaps,
    show_activations,
    show_filters,
)
from convext.inspection.summary import LayerRow, Summary, summary
from convext.inspection.terms import Read, Terms
from convext.inspection.workbook import write_workbook

__all__ = [
    "Activations",
    "ConvMatrix",
    "FieldCheck",
    "FieldRow",
    "LayerCells",
    "LayerFilters",
    "LayerMaps",
    "LayerRow",
    "Read",
    "ReceptiveFields",
    "Summary",
    "Terms",
    "Trace",
    "conv_matrix",
    "dependents",
    "features",
    "filters",
    "plot_filters",
    "precedents",
    "receptive_field",
    "show_activations",
    "show_filters",
    "summary",
    "write_page",
    "write_workbook",
]
