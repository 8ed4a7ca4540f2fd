"""The run folder: what one run leaves behind, and what is printed and drawn from it.

Read `folder.py` first.
"""
