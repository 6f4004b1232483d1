"""The bytes of a store: a Zarr v3 folder, one HDF5 file, and the second copy of everything but the rows.

`FORMAT.md`, one folder up, specifies them; `mapped.py` is what both formats share when read. May import no other room.
"""
