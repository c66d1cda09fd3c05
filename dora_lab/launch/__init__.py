"""Specs to finished runs: which ones (select), what they would take (plan, cost), one (run), many (pool, slurm).

What a run computes lies below: training, probing, evaluation.
"""
