"""The command line and the tasks it runs."""
