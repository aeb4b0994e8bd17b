"""The AI cloud: ``python -m server kit=KITS/cloud``."""
