"""Masks of everything in an image, from the prompt encoder and mask decoder that belong to a frozen image encoder."""
