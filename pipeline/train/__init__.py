"""Stage two: the classifier on stored features and raw images, the epoch chosen on val, and the folder of a run.

A `Dataset`, a store and plain options come in, a run folder goes out. May import: data, model, cache. Open `train.py`
first.
"""
