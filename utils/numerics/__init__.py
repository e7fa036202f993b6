"""Derivatives of networks, fast; knows no objective."""
