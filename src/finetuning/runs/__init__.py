"""The run folder: what one run leaves behind, and what is printed and drawn from it.

Read `folder.py` first; `environment.py`, `metrics.py` and `samples.py` write and read its files.
"""
