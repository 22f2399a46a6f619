"""What people run: the batch summarizer and the bench."""
