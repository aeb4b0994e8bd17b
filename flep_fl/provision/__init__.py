"""Startup kits: the keys and the shared settings that each party of a federation starts from."""
