"""The known mask as taps: an encoder that has nothing to compute."""
