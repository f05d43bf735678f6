"""`leaf demo`: the whole method on an embedded pair, or on real models."""
