"""absl launchers: `jaxspark NAME --help`, in a clone `python -m launch.NAME` too."""
