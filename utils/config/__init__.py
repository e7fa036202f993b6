"""Options in, objects out."""
