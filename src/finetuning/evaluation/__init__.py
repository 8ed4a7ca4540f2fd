"""Is it better? Answers to the evaluation set, scored, with intervals.

Read `scores.py` first.
"""
