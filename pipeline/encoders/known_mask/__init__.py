"""The known mask as a tap: an encoder that has nothing to compute."""
