"""What a model answers: protocols by way of lm-eval, and saved texts scored again (rescore, without torch).

What a task is stands in `tasks`; means and intervals over runs are `report`.
"""
