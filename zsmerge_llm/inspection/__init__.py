"""What a session's cache still holds, as data and as a page."""
