"""The parts of the toolkit; the scripts at the top level put them together."""
