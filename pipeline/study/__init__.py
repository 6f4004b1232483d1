"""Many runs in one table: who makes which run, what they say together, and the files that show it.

Run folders come in, a table and a curve go out. May import: train, evaluate and what those may import. Open `runs.py`
first.
"""
