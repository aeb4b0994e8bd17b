"""Thin entry points; each ``python -m scripts.NAME --help`` lists its options."""
