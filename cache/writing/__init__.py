"""Making a store: plan, whole shards, one commit by rename; resumed, shared between processes of a machine, never torn.

Open `writer.py` first; `partial.py` is the folder of a store in the making. May import: formats, reading.
"""
