"""Answers made with the image or the question taken away: what judges and reports them."""
