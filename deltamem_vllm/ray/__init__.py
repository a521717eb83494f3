"""What runs on Ray: batches on Ray Data (`batch`)."""
