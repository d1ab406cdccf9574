"""What a mixture of experts learns, beside dense models, and how fast it is."""
