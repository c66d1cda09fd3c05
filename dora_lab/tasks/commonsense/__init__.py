"""The commonsense tasks, one file each: the eight of the paper's table 1 and any other; the released files of
LLM-Adapters; the same protocol as task definitions for lm-eval.
"""
