"""Faulty inputs: made by a seed, read by this program and by an independent reader."""
