"""Tables and figures from finished runs, read from MLflow alone: only the tracking URI is needed.

Importing this package imports nothing heavy, so every script answers ``--help`` at once.
"""
