"""One run, from the base model to a finished run folder: steps, checkpoints, resuming, stopping.

Read `train.py` first, then `trainer.py`, what a step computes, and `resumable.py`, how a run
survives being killed.
"""
