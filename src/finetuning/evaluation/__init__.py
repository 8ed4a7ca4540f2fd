"""Is it better? Answers to the evaluation set, scored, with intervals.

Read `scores.py` first; `models.py` asks, `results.py` keeps what was answered, and the modules
named `comparison` put runs side by side.
"""
