"""Damage, hostile input and failing systems."""
