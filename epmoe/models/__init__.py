"""The decoder: single-device code that knows no rank."""
