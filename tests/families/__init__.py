"""Every family of the installed transformers that generates text, as a tiny random model, and what becomes of it."""
