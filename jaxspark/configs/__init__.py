"""Presets: functions that return frozen configurations."""
