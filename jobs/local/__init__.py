"""The queue of one machine: background jobs, one on each GPU."""
