"""Stores that travel: push and pull, the manifest that is checked name by name.

Open `share.py` first. May import: formats, reading, writing, care.
"""
