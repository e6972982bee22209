"""Identity and persistence of conversations."""
