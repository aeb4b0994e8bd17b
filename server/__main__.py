"""Run the AI cloud: ``python -m server kit=KITS/cloud``."""

from server.app import main

if __name__ == "__main__":
    main()
