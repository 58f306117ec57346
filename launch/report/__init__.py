"""``coterie report``: what a run recorded, as one HTML page."""
