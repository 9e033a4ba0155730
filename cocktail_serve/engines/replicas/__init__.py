"""Several engines of one pool behind the seam of one: where each request goes, and what becomes of it there."""
