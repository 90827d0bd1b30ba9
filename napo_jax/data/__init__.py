"""From stored rows to batches of fixed shape."""
