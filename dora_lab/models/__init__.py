"""Base models: opened from folders and the hub's cache, whole and finite; the shapes of those that the paper names.

`shapes` is arithmetic and imports no torch; adapters are put on in `formats` and `methods`.
"""
