"""What a file is before anything reads it: names, hashes, headers, strict JSON; the hub's cache; whole writes.

Nothing here knows runs, tasks or models, or imports torch.
"""
