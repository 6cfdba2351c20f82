"""Whole-volume inference, scores in the scan's own geometry, and pictures of them."""
