"""Speed and memory on machines we do not have: footprints, rooflines, replay."""
