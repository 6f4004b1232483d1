"""What each command does: the only room, besides `cli`, that sees the configuration together with the work.

A `Config` comes in, a report of plain values goes out. May import: every room but `cli`. Open `commands.py` first.
"""
