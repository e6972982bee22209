"""Every field that the vendors' clients know, and what this server does with it: the tables of docs/conformance.md."""
