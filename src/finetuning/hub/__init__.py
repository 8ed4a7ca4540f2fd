"""Speaking to the Hub: addresses, what may be fetched, downloads that are verified, retries.

Read `client.py` first, where one function retries, then `failures.py`: how long to wait, and what
an error of the Hub means in one line.
"""
