"""SAM's ViT in its sizes, and the miniature SAM of the demo."""
