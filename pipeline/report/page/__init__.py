"""What the page is made of: HTML that escapes by construction, charts as SVG, tables, and a file for each part of it.

`report.py` beside this folder puts the parts in their order. A part takes the evidence and yields markup.
"""
