"""What is read again before a question, found by its words and by its attention."""
