"""Our kernels beside PyTorch's: what `convext bench` runs, and what `benchmarks/` builds on.

layers.py names what is measured, cases.py and models.py make the calls, timing.py times them in
turn, machine.py finds the peaks they are held against, results.py holds the figures, goals.py what
they should be, report.py and plots.py show them.
"""
