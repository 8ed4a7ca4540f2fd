"""YAML and overrides -> Recipe: typed, frozen, every key checked before torch is imported.

Read `sections.py` first: what may be said in a recipe, in which unit, and which section owns what.
"""
