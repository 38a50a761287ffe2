"""Lambda layers as modules."""
