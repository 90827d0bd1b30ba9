"""A small world of shapes, whose truth and whose habits are known: pictures, questions, a language and a model."""
