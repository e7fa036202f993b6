"""The machine and the process; knows no image."""
