"""Which trained model a name means (run folder, recipe, Hub address), and asking it.

Read `generation.py` first.
"""
