"""Reading a store: rows in any order into the caller's buffer, at memory speed, checked on the way.

Open `reader.py` first; `copying.py` is its inner loop, `remote.py` reads a store where it lies, over a network, and
`recover.py` what can still be known of a damaged one. May import: formats.
"""
