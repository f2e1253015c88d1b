"""The preflight: what would go wrong with jobs here."""
