"""The AI cloud: a Flower strategy that adds what it cannot read."""
