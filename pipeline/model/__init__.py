"""What learns: a classifier put together from a backbone and the uses that it makes of taps.

Images, features and affine maps come in, logits go out. May import: clip. Open `classifier.py` first.
"""
