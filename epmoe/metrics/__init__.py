"""What people and trackers see of a run: records, terminal, router health, chart."""
