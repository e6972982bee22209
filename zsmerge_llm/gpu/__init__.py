"""Everything for a GPU. Nothing here has been measured on one yet."""
