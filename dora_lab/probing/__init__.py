"""ΔM and ΔD: while training (callback), between saved models (saved_models, pairs), and what singular values say.

The mathematics is `decompose`; figures and statistics of the rows are `report`.
"""
