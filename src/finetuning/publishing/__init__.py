"""Run folder -> subfolder of a Hub repository: merged weights, model card, manifest, one commit,
verified.

Read `bundle.py` first: what is published, and how it is gathered; `publishable.py` says what may
be.
"""
