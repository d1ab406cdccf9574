"""Scaling laws: sweeps of small runs, laws that are fitted to them, and what they predict."""
