"""Which trained model a name means (run folder, recipe, Hub address), and asking it.

Read `answers.py` first.
"""
