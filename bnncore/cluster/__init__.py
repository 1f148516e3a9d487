"""Training spread over a Ray cluster: the only room that knows Ray."""
