"""Speaking to the Hub: addresses, what may be fetched, downloads that are verified, retries.

Read `client.py` first: one place decides how long to wait, and what an error of the Hub means in
one line.
"""
