"""Long contexts: what a model makes of lengths that it was not trained at."""
