"""From a model, items and a spec to trained weights: the order of data, a step, checkpoints, what was trained.

Methods and base models are made elsewhere; this wing trains whatever requires a gradient.
"""
