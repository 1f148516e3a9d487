"""The one bridge from torch to a packed `Program`. What lies behind it knows no torch."""
