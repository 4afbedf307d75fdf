"""Many devices as one program."""
