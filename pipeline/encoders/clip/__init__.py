"""CLIP's image tower as an encoder: the image feature that its texts are compared with, and a ViT's maps."""
