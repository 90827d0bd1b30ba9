"""Benchmarks: the questions that their own files ask, and files of answers to the numbers that papers print."""
