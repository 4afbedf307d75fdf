"""absl launchers: `python -m launch.<name> --help`."""
