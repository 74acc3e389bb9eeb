"""What people look at: trackers, the live display, router health and its chart."""
