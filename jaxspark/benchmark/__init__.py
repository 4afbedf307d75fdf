"""What decoding costs here: ratios of things run alternately in one process."""
