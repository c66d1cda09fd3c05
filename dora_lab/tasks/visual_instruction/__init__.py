"""Tasks of a LLaVA: the benchmarks that table 12 has, from LLaVA's evaluation files.

Not its training data, which are conversations (`tasks.conversations`) in a folder of their own (`tasks.llava`).
"""
