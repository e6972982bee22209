"""What is read again before a question: by its words, and by what it attends to."""
