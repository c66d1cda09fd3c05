"""Specs to finished runs: which ones (select), what they would take (plan, cost), one (run, stages), many (pool, slurm).

Beside these, what a machine gives a run (runtime) and whether its inputs are those it began with (inputs). What a run
computes lies below: training, probing, evaluation.
"""
