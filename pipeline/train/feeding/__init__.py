"""What a training step eats: images and features of a batch, from where they fit.

A `Dataset`, a store and a split come in, batches go out. May import: data, cache. Open `feed.py` first; `in_memory.py`
holds what many runs share, `matching.py` finds a sample's row.
"""
