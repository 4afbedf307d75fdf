"""What models are built from; one idea per file."""
