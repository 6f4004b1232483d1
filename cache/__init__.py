"""Feature stores on disk: written once, read at memory speed, shared between people."""
