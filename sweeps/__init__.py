"""Optuna studies over blur schedules and step counts."""
