"""The configuration: its schema, the file it is written in, its checks, and the grid of a study over it.

A file of YAML and `--set` overrides come in, a frozen `Config` goes out. Only `stages` and `cli` ever see one: every
other room takes plain arguments. May import: errors. Open `schema/` first.
"""
