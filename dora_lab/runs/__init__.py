"""The run directory: record, streams, checkpoints, lock; what code and machine it had; what is wrong with it (doctor).

What a run computes is no matter here. Nothing imports torch: records are read anywhere.
"""
