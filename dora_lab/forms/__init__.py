"""How a family of models is fed and asked: items to examples, examples to batches, questions to answers.

Here belongs what a family's prompts, masks and extra inputs are; not how a step is made (`training`), nor what an
answer is worth (`metrics`).
"""
