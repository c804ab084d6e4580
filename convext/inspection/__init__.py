"""Looking inside a network: any torch.nn.Module, stock layers or ours.

Every function returns data first; drawing is a step of its own.
"""

from convext.inspection.conv_matrix import ConvMatrix, conv_matrix
from convext.inspection.summary import LayerRow, Summary, summary

__all__ = ["ConvMatrix", "LayerRow", "Summary", "conv_matrix", "summary"]
