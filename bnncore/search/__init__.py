"""The search for the best ensemble under a memory budget."""
