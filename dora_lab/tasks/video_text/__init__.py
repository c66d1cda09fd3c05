"""The paper's table 3, VALUE's four tasks about clips: what their files hold, and the rules that score them.

Read and asked as VL-Adapter does it (its loaders in NVlabs/DoRA, 5d369be), captions scored as VALUE's own evaluator
does it (VALUE-Leaderboard/StarterCode, 8f665f9); where the data lies: `tasks.value`. A task is there twice: "tvqa" is
learnt, "tvqa_val" is asked.
"""
