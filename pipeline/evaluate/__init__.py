"""What a run is worth: metrics with intervals, comparisons, and predictions for new images.

A run folder and a data set come in, figures and plots go out. May import: train, model, data, encoders. Open
`evaluate.py` first.
"""
