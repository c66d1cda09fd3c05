"""Adapter files, read and written here and nowhere else: PEFT's, the authors', LyCORIS; shards; the manifest of a base.

`read` turns a file of anybody's into one neutral value and back; `live` puts such values on live models.
"""
