"""Two stages: features of a frozen Segment Anything encoder, then SLCA classifiers on top of them."""
