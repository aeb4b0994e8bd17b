"""Tier 2, model security: encrypted, signed and verifiable sums of models."""
