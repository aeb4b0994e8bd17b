"""Denoisers: restoring images whose noise nobody can subtract exactly."""
