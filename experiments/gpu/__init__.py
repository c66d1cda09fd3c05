"""Stages of `experiments.gpu_visit`: one file each, and what they share."""
