"""What a file is before anything reads it: names, hashes, headers, strict JSON, types; the hub's cache; whole writes.

Nothing here knows runs, tasks or models, or imports torch.
"""
