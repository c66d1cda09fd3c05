"""One file for each experiment, found by name; one may import another: `from experiments import commonsense`."""
