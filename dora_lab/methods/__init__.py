"""Fine-tuning methods, one file each: what a layer becomes, what is trained, and the contract that adapted layers keep.

A file here that defines `prepare` is a method; see `inject`. Methods know no files, no runs and no models by name.
"""
