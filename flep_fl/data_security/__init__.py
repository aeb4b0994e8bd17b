"""Private AI for data security: the three-layer image cipher and the denoisers; no storage, no network."""
