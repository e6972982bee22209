"""An HTTP server in the dialects of OpenAI and Anthropic. Needs the extra `server`."""
