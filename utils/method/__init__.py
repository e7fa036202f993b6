"""The paper; knows no option and no file."""
