"""What a run leaves and reads."""
