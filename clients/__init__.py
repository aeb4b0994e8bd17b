"""One analyst site: ``python -m clients kit=KITS/SITE archive=ARCHIVES/SITE``."""
