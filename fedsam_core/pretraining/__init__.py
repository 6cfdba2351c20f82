"""Pre-training of the small SAM on scenes drawn by a program: no scan, photograph or download is involved."""
