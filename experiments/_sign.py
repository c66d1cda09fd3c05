"""What experiment `sign` was given before its runs: found in the sweep of `small`, frozen."""

RATES: dict[str, float] = {}
DELTA_D = 0.0  # mean over layers and kinds, full fine-tuning at its rate without decay
RESCALED: dict[str, tuple[str, ...]] = {}
