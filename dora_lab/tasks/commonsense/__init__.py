"""The eight commonsense tasks of the paper's table 1, one file each; the released files of LLM-Adapters."""
