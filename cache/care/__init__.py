"""Looking after finished stores: verify, repair, inspect, compare, convert, describe.

Each file is one verb of `pipeline store`. May import: formats, reading, writing.
"""
