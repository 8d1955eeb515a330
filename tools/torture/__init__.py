"""Break a small training in every way, go on each time, and compare with one that nothing disturbed (`__main__`)."""
