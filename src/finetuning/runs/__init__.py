"""The run folder: what one run leaves behind, and what is printed, drawn and compared from it.

Read `folder.py` first.
"""
