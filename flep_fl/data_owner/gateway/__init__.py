"""The gateway: the one way in for devices' images and the one way out for released records."""
