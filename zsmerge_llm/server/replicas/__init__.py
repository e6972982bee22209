"""Several servers behind one address. Needs the extra `server`."""
