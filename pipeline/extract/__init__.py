"""Stage one: every image through the frozen encoder once, into a store that a kill cannot tear.

A `Dataset` and an `Encoder` come in, a complete feature store goes out. May import: data, encoders, cache. Open
`extract.py` first: it plans, and `encode.py` is its loop.
"""
