"""Asking an adapter: rows without answers go in, and what it makes of them comes out."""
