"""Pieces that several test modules build on."""
