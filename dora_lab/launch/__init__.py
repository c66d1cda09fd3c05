"""Specs to finished runs: which ones (select; given: a model and data of anybody's), what they take (plan, cost; trial:
a few timed steps), on what machine (runtime), one (run, by way of its stages, with the inputs that it began with), many
(pool, slurm).

What a run computes lies below: training, probing, evaluation.
"""
