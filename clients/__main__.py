"""Run one analyst site: ``python -m clients kit=KITS/SITE archive=ARCHIVES/SITE``."""

from clients.app import main

if __name__ == "__main__":
    main()
