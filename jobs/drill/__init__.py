"""The drill: a tiny run is interrupted on purpose, and must not differ."""
