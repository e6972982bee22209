"""One answer, from a request's options to text, reasoning and tool calls; and the loops that generate answers."""
