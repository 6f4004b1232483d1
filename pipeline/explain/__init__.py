"""Where a run looks: gates and Grad-CAM as pictures, and how well they find the lesion.

A run folder, images and a store come in, pictures and scores go out. May import: evaluate and what that may import.
Open `explain.py` first.
"""
