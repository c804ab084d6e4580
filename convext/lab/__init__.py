"""The training lab: what a network does while it trains, and experiments that change one thing."""

from convext.lab.activation_stats import ActivationStats, LayerStats
from convext.lab.recorder import Recorder

__all__ = ["ActivationStats", "LayerStats", "Recorder"]
