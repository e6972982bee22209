"""Inputs made up by hypothesis."""
