"""The private database: the owner's images, sealed at rest, and the log of what left it."""
