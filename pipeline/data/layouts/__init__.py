"""Where samples come from: an image folder, a CSV table, a MedMNIST archive, the generated demo.

A path and plain options come in, a `Dataset` goes out. May import: the rest of `data`, errors. A layout is one file.
"""
