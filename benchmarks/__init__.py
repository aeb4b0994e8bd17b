"""Measurements beside the package: speed, randomness, rate and distortion. Each is one command."""
