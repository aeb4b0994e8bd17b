"""Flower: the apps, what they are wired to, and the processes that run them."""
