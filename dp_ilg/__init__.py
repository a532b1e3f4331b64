"""Differentially private Adam for JAX with importance-shaped noise."""
