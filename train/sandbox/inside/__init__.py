"""Scripts that run inside sandboxes, by whatever Python is there; nothing here is imported outside."""
