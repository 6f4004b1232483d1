"""Hiera: SAM 2 and 2.1, through transformers."""
