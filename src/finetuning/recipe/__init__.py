"""YAML and overrides -> Recipe: typed, frozen, every key checked before torch is imported.

Read `sections.py` first: what may be said in a recipe, in which unit, and which section owns what;
then `recipe.py`, which puts them together and loads them.
"""
