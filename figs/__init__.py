"""Figures, one script each: python3 -m figs.NAME --help."""

from utils.system.process import import_matplotlib

import_matplotlib()  # before any figure imports it
