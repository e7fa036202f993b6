"""Figures, one script each: python3 -m figs.NAME --help."""
