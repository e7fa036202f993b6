"""Bytes on disk; knows no distilled set."""
