"""What leaves the house about a run: one page to send, a model card, a folder to hand on.

An evaluated run comes in, files for people go out. May import: evaluate, explain and what those may import. Open
`report.py` first; `export.py` hands a model on.
"""
