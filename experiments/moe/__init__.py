"""What a mixture of experts learns, beside dense models."""
