"""The form of text in both directions: messages, templates, grammars, tool calls, reasoning."""
