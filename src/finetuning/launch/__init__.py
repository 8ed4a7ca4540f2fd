"""How processes are started, what machine they are on, and how they share the examples of a step.

Read `strategy.py` first: what was requested of the launcher, and what actually runs.
"""
