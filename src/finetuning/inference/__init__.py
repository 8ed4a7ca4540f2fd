"""Which trained model a name means (run folder, recipe, Hub address), and asking it.

Read `generation.py` first; `resolve.py` finds the model that a name means, `trained_model.py` loads
it.
"""
