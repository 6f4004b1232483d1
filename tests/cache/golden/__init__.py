"""Stores of every released format version, a few kilobytes each, kept for ever."""
