"""What a run will need: memory, steps, time and disk, without loading any weights.

Read `budget.py` first; `step_memory.py` runs a training step on fake tensors and adds up what it
allocates.
"""
