"""What an adversary can do. Imported by no room; every attack works on what a real run left."""
