"""The processes of a job: start-up, agreement, signals, lost peers."""
